"""Lines of JSON: each is kept or named, none is lost, however the file is cut into parts and blocks."""

import json
import random
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import json_lines
from data_pipeline.documents import Document, Rejected
from data_pipeline.formats import hash_input, read_file
from data_pipeline.json_lines import find_lines, reading_from, split_jsonl, split_lines
from tests.data_pipeline.reading import IDENTIFIED, LARGEST, THOROUGH, describe


def test_a_rejection_says_where_to_look(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"body": "b", "id": 3}\n')
    _, rejected = read_file(describe(path, "jsonl"), path, LARGEST)
    assert isinstance(rejected, Rejected)
    assert (rejected.source, rejected.file, rejected.position, rejected.offset) == ("mine", "lines.jsonl", 14, 14)
    assert rejected.line == 2
    assert "['body', 'id']" in rejected.detail
    assert bytes.fromhex(rejected.first_bytes) == b'{"body": "b", "id": 3}'


def verdict(row: bytes) -> str | None:
    """The oracle of one line: its text, or None where it is none, by Python's own json."""
    try:
        text = json.loads(row.decode("utf-8"))["text"]
        text.encode("utf-8")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return text or None


def check_lines(path: Path, rows: list[bytes], end=b"\n") -> None:
    """Every line that is not blank becomes one item, at its place, and says what the oracle says."""
    path.write_bytes(end.join(rows))
    starts = list(accumulate((len(row) + len(end) for row in rows[:-1]), initial=0))[: len(rows)]
    wanted = [(start, row) for start, row in zip(starts, rows, strict=True) if row.strip()]
    items = list(read_file(describe(path, "jsonl"), path, LARGEST))
    assert [item.position for item in items] == [start for start, _ in wanted]
    for (_, row), item in zip(wanted, items, strict=True):
        if len(row.removesuffix(b"\r")) > LARGEST:
            assert isinstance(item, Rejected) and item.reason == "too_large"
        else:
            assert verdict(row) == (item.text if isinstance(item, Document) else None), row


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b""))))
def test_random_lines_are_kept_or_named(tmp_path_factory, lines):
    """Against an oracle of one line: nothing is lost, nothing is mended."""
    check_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl", [b'{"text": "' + line + b'"}' for line in lines])


def random_line(chosen: random.Random) -> bytes:
    """Sound rows, rows with a byte changed, cut ones, blank ones, too long ones, and noise."""
    text = "".join(chosen.choices(["a", " ", "é", "東", "🦊", "\u2028", "\r", "\0", '"', "\\", "x" * 50], k=chosen.randrange(30)))
    row = json.dumps({"n": chosen.choice([1, 1.5, float("nan"), None, 10**30]), "text": text}, ensure_ascii=chosen.random() < 0.5).encode()
    kind = chosen.randrange(8)
    if kind == 0:
        row = bytearray(row)
        row[chosen.randrange(len(row))] = chosen.randrange(256)
    elif kind == 1:
        row = row[: chosen.randrange(len(row))]
    elif kind == 2:
        row = chosen.randbytes(chosen.randrange(60))
    elif kind == 3:
        row = chosen.choice(
            [b"", b" ", b"\t\r", b"null", b'{"text": "' + b"x" * chosen.randrange(900, 1100) + b'"}', b'{"text": "\\udc00"}']
        )
    return bytes(row).replace(b"\n", b" ").removeprefix(b"\xef\xbb\xbf")


def test_ten_thousand_random_lines(tmp_path, seed, monkeypatch):
    chosen = random.Random(seed)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 4096)
    for _ in range(100 if THOROUGH else 10):
        check_lines(tmp_path / "lines.jsonl", [random_line(chosen) for _ in range(1000)], chosen.choice([b"\n", b"\r\n"]))


def test_parts_of_lines_give_what_the_whole_file_gives(tmp_path, seed, monkeypatch):
    """At any boundaries: marks, line ends, blank lines, lines longer than a part, characters cut through."""
    chosen = random.Random(seed)
    path = tmp_path / "lines.jsonl"
    for _ in range(2000 if THOROUGH else 50):
        monkeypatch.setattr(json_lines, "BLOCK_BYTES", chosen.choice([3, 64, 1 << 20]))
        lines = [random_line(chosen) for _ in range(chosen.randrange(25))]
        end = chosen.choice([b"\n", b"\r\n"])
        content = chosen.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines) + chosen.choice([b"", end])
        path.write_bytes(content)
        file = describe(path, "jsonl")
        whole = list(read_file(file, path, LARGEST))
        parts = split_jsonl(file, chosen.choice([1, 3, 50, 500]) if len(content) < 3000 else chosen.randrange(20, 3000))
        assert sum(part.part_bytes for part in parts) == len(content)
        items = [item for part in parts for item in read_file(part, path, LARGEST)]
        assert [replace(item, line=None) if isinstance(item, Rejected) else item for item in items] == [
            replace(item, line=None) if isinstance(item, Rejected) else item for item in whole
        ]
        told = [item.line for item in items if isinstance(item, Rejected)]
        assert [line for line in told if line] == [item.line for item in whole if isinstance(item, Rejected)][: sum(map(bool, told))]
        hashed = [hash_input(part, path) for part in parts]
        with path.open("rb") as stream:
            ranges = [find_lines(part.part, len(content), reading_from(stream)) for part in parts]
        assert [(sha256(content[first:behind]).hexdigest(), behind - first) for first, behind in ranges] == hashed
        assert b"".join(content[first:behind] for first, behind in ranges) == content


def test_blocks_of_any_size_give_the_same_lines(seed):
    chosen = random.Random(seed)
    for _ in range(300):
        content = bytes(chosen.choices(b"ab\r\n", k=chosen.randrange(80)))
        size, largest = chosen.randrange(1, 20), chosen.randrange(1, 12)
        lines = list(split_lines((content[at : at + size] for at in range(0, len(content), size)), 5, largest))
        wanted = content.removesuffix(b"\n").split(b"\n") if content else []
        assert len(lines) == len(wanted)
        at = 5
        for (start, line), whole in zip(lines, wanted, strict=True):
            assert start == at
            kept = whole.removesuffix(b"\r")
            assert line == kept if len(kept) <= largest else len(line) > largest and kept.startswith(line[: largest + 1])
            at += len(whole) + 1


def test_names_and_metadata_of_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [
        {"text": "a", "id": "one", "url": "u", "score": {"x": [1, None]}},
        {"text": "b", "id": 2, "score": float("nan"), "date": "\ud800"},
        {"text": "c", "id": 1.5, "date": "2024"},
        {"text": "d", "id": True},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    items = list(read_file(describe(path, "jsonl", **IDENTIFIED), path, LARGEST))
    assert [(item.name, dict(item.metadata)) for item in items if isinstance(item, Document)] == [
        ("one", {"url": "u", "score": {"x": [1, None]}}),
        ("2", {"score": None}),
        (None, {"date": "2024"}),
        (None, {}),
    ]
