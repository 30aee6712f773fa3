"""JSON lines that nobody should write, and packed files that were cut off.

In: a case. Out: whether every line became exactly one thing, by the count of an oracle that shares no code with the pipeline:
Python's own `json` on lines split by hand.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import zstandard

from configs.data_section import DataSection, SourceSection, TokenizerSection
from data_pipeline.manifest import SPLITS, load_manifest
from data_pipeline.shards import read_spans
from tests.faults.builds import build_here
from tests.faults.campaign import Case, Outcome

LINES_PER_CASE = 500
CUTS_PER_CASE = 20
LONGEST_LINE = 100_000
LARGEST_DOCUMENT = 80_000
BLANK = b" \t\n\r\x0b\x0c"
BOM = b"\xef\xbb\xbf"
GOOD_START = b'{"text": "the first line is a good one"}'
Found = dict[tuple[str, int], int]
"""Bytes of text by file and position."""
BAD_UTF8 = (
    b"\x80", b"\xbf\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xed\xa0\x80", b"\xed\xb0\x80\xed\xa0\x80",
    b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\xfe", b"\xff", b"\xc3", b"\xe6\x9d",
    b"\xf0\x9f\xa6",
)  # fmt: skip
ESCAPES = (r"\ud800", r"\udfff", r"\ud83e\udd8a", r"\udd8a\ud83e", r"\u0000", r"\u2028", r"\/", r"\x", r"\u12", r"\ufeff", "\\")
ODD_VALUES = ("null", "true", "3", "-0", "1e5", "[]", "{}", '["a"]', "NaN", "-Infinity", '""', "1e999", "0x1", "01", "'a'", "")
ODD_CHARACTERS = (
    "\x00",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1e",
    "\x85",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ufffe",
    "\U0010ffff",
    "\r",
    "\t",
    "e\u0301",
)


def check_lines(case: Case) -> Outcome:
    """500 fuzzed lines in three files, plain and in parts, .gz and .zst: none crashes the build, and all are counted."""
    corpus = case.folder / "corpus"
    corpus.mkdir()
    share = LINES_PER_CASE // 3
    contents = {"a.jsonl": share, "b.jsonl.gz": share, "c.jsonl.zst": LINES_PER_CASE - 2 * share}
    expected: Found = {}
    num_read = 0
    for name, num_lines in contents.items():
        lines = [GOOD_START, *(make_line(case.chosen) for _ in range(num_lines - 1))]
        content = case.chosen.choice((b"", BOM)) + case.chosen.choice((b"\n", b"\r\n")).join(lines)
        _write(corpus / name, content)
        kept, read = read_independently(content)
        num_read += read
        expected |= {(name, position): size for position, size in kept.items()}
    problems = _compare_documents(case.folder / "d", corpus, expected, num_read)
    return Outcome(LINES_PER_CASE, problems)


def check_cuts(case: Case) -> Outcome:
    """Packed files that are cut off at random places: nothing of them enters, and each is named as damaged once."""
    corpus = case.folder / "corpus"
    corpus.mkdir()
    (corpus / "good.jsonl").write_bytes(GOOD_START)
    lines = [json.dumps({"text": f"{number} {case.chosen.random()}"}).encode() for number in range(case.chosen.randrange(1, 400))]
    content = b"\n".join(lines)
    expected = {("good.jsonl", 0): 28}
    whole, _ = read_independently(content)
    num_damaged = 0
    for number in range(CUTS_PER_CASE):
        name = f"cut-{number:02d}.jsonl{case.chosen.choice(('.gz', '.zst'))}"
        packed, num_padding = pack(content, name, case.chosen)
        place = case.chosen.choice((case.chosen.randrange(len(packed) + 1), len(packed) - case.chosen.randrange(min(12, len(packed)))))
        (corpus / name).write_bytes(packed[:place])
        if place < len(packed) - num_padding:
            num_damaged += 1
        else:
            expected |= {(name, position): size for position, size in whole.items()}
    problems = _compare_documents(case.folder / "d", corpus, expected, len(expected) + num_damaged, num_damaged)
    return Outcome(CUTS_PER_CASE, problems)


def prepare_nothing(folder: Path, chosen: random.Random) -> None:
    """The cases share nothing."""


def make_line(chosen: random.Random) -> bytes:
    """A line of one of many kinds; it may hold line ends, and so be several."""
    return chosen.choice(MAKERS)(chosen)[:LONGEST_LINE]


def read_independently(content: bytes) -> tuple[dict[int, int], int]:
    """Which lines of a file are documents, by where they start, with the bytes of their text; and how many lines it has."""
    kept: dict[int, int] = {}
    num_read = position = 0
    for line in content.split(b"\n"):
        start, position = position, position + len(line) + 1
        line = line[:-1] if line[-1:] == b"\r" else line
        line = line[len(BOM) :] if start == 0 and line[: len(BOM)] == BOM else line
        if not line.strip(BLANK):
            continue
        num_read += 1
        text = None if len(line) > LARGEST_DOCUMENT else _text_of(line)
        if text is not None:
            kept[start] = len(text)
    return kept, num_read


def pack(content: bytes, name: str, chosen: random.Random) -> tuple[bytes, int]:
    """A file's content packed as its name says, and how many of the last bytes are but padding."""
    if name.endswith(".gz"):
        padding = chosen.choice((0, 0, chosen.randrange(1, 600)))
        return gzip.compress(content, chosen.randrange(1, 10), mtime=0) + bytes(padding), padding
    compressor = zstandard.ZstdCompressor(
        chosen.randrange(1, 6), write_checksum=chosen.random() < 0.5, write_content_size=chosen.random() < 0.5
    )
    return compressor.compress(content), 0


def _text_of(line: bytes) -> bytes | None:
    """The text of a line in UTF-8, if it has one."""
    try:
        text = json.loads(line.decode("utf-8"))["text"]
        return text.encode("utf-8") or None if isinstance(text, str) else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _compare_documents(root: Path, corpus: Path, expected: Found, num_read: int, num_damaged: int = 0) -> list[str]:
    data = DataSection(
        root=str(root),
        sources=(SourceSection(name="fuzzed", path=str(corpus)),),
        tokenizer=TokenizerSection(vocabulary_size=300, training_bytes=20_000),
        work_unit_bytes=60_000,
        shard_tokens=300_000,
        largest_document_bytes=LARGEST_DOCUMENT,
        quarantine_limit=1.0,
    )
    ended = build_here(data)
    if ended.status != 0:
        return [str(ended)]
    manifest = load_manifest(root)
    counts = manifest.documents
    found = _stored_documents(root)
    problems: list[str] = []
    if not counts.adds_up or counts.read != num_read or counts.kept != len(expected):
        problems.append(f"wanted {num_read} read and {len(expected)} kept, found {counts}")
    if num_damaged and counts.quarantined != {"damaged_file": num_damaged}:
        problems.append(f"wanted {num_damaged} damaged files, found {counts.quarantined}")
    for key in sorted({key for key, _ in found.items() ^ expected.items()})[:3]:
        problems.append(f"{key[0]} at {key[1]}: {found.get(key)} bytes of text, wanted {expected.get(key)}")
    return problems


def _stored_documents(root: Path) -> Found:
    found: Found = {}
    for split in SPLITS:
        for shard in load_manifest(root).shards(split):
            rows = read_spans(root / shard.name).to_pylist()
            found |= {(row["file"], row["position"]): row["num_bytes"] for row in rows}
    return found


def _write(path: Path, content: bytes) -> None:
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(content))


def _length(chosen: random.Random, longest: int = LONGEST_LINE) -> int:
    """A length from 0 on; long ones are rare, so that ten thousand lines stay some 50 MB."""
    return int(longest ** (chosen.random() ** 1.5))


def _good(chosen: random.Random) -> bytes:
    text = "".join(
        chosen.choices(
            ["a", "bc ", "é", "東", "🦊", '\\"', "\\n", *(chosen.choice(ODD_CHARACTERS[5:11]) for _ in range(2))],
            k=1 + _length(chosen) // 4,
        )
    )
    return f'{{"text": "{text}", "more": {{"number": {chosen.random()}}}}}'.encode()


def _random_bytes(chosen: random.Random) -> bytes:
    return chosen.randbytes(_length(chosen))


def _mutated(chosen: random.Random) -> bytes:
    line = bytearray(_good(chosen))
    for _ in range(chosen.randrange(1, 4)):
        place = chosen.randrange(len(line) + 1)
        match chosen.randrange(4):
            case 0:
                line[place:place] = chosen.randbytes(chosen.randrange(1, 5))
            case 1:
                del line[place : place + chosen.randrange(1, 9)]
            case 2:
                line[place : place + 1] = bytes([chosen.choice(b'"\\{}[]:,0e-+. \x00\x1f\x7f\xff')])
            case _:
                line[place:place] = line[: chosen.randrange(20)]
    return bytes(line)


def _huge_number(chosen: random.Random) -> bytes:
    digits = "".join(chosen.choices("0123456789", k=1 + _length(chosen, 20_000)))
    number = chosen.choice(
        (f"1{digits}", f"-{digits}", f"0.{digits}", f"1e{digits[:400]}", f"1{digits}.5e-{digits[:9]}", "9" * 4300, "9" * 4301)
    )
    return chosen.choice(
        (f'{{"text": "a", "n": {number}}}', f'{{"text": {number}}}', f"{number}", f'{{"text": "a", "n": [{number}]}}')
    ).encode()


def _nested(chosen: random.Random) -> bytes:
    # Not near the depths of 1000 and 1024, where orjson and Python's json part ways.
    depth = chosen.choice((chosen.randrange(1, 450), chosen.randrange(1200, 45_000)))
    opening, closing = chosen.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    value = opening * depth + "1" + closing * (depth if chosen.random() < 0.8 else depth - 1)
    return chosen.choice((f'{{"text": "a", "n": {value}}}', value, f'{{"text": {value}}}')).encode()


def _bad_utf8(chosen: random.Random) -> bytes:
    before, behind = ("é" * _length(chosen, 300)).encode(), b"tail" * chosen.randrange(3)
    return b'{"text": "' + before + chosen.choice(BAD_UTF8) + behind + b'", "n": "' + chosen.choice((b"", chosen.choice(BAD_UTF8))) + b'"}'


def _escaped(chosen: random.Random) -> bytes:
    parts = [chosen.choice((*ESCAPES, "a", " ", "é")) for _ in range(chosen.randrange(1, 6))]
    field = chosen.choice(("text", "other"))
    return f'{{"{field}": "{"".join(parts)}", "text{chosen.choice(("", "2"))}": "b{chosen.choice(ESCAPES)}"}}'.encode()


def _odd_value(chosen: random.Random) -> bytes:
    value = chosen.choice(ODD_VALUES)
    return chosen.choice(
        (
            f'{{"text": {value}}}',
            f'{{"text": "a", "n": {value}}}',
            f"{value}",
            f'{{"body": {value}}}',
            f'[{{"text": {value}}}]',
            f'{{"text": "a", "text": {value}}}',
        )
    ).encode()


def _odd_characters(chosen: random.Random) -> bytes:
    character = chosen.choice(ODD_CHARACTERS)
    return chosen.choice(
        (
            f'{{"text": "a{character}b"}}',
            f'{character}{{"text": "a"}}',
            f'{{"text": "a"}}{character}',
            character,
            f'{{"text{character}": "a"}}',
        )
    ).encode()


def _blank(chosen: random.Random) -> bytes:
    return bytes(chosen.choices(BLANK, k=_length(chosen, 50)))


MAKERS: tuple[Callable[[random.Random], bytes], ...] = (
    _good, _good, _good, _random_bytes, _mutated, _mutated, _huge_number, _nested, _bad_utf8, _escaped, _odd_value, _odd_characters, _blank,
)  # fmt: skip
