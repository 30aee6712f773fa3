"""Odd files: every one has a defined outcome, every document is kept or named, none is lost."""

import datetime
import gzip
import json
import os
import random
import tracemalloc
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.functions import load_function
from data_pipeline import formats
from data_pipeline.documents import Document, Rejected
from data_pipeline.formats import InputFile, find_lines, hash_input, read_file, reading_from, split_jsonl, split_lines, split_parquet

LARGEST = 1000
THOROUGH = os.environ.get("FAULTS") == "1"


def describe(path: Path, kind, part=None, id_field=None, metadata_fields=()) -> InputFile:
    status = path.stat()
    return InputFile(
        source="mine",
        root=str(path.parent),
        name=path.name,
        kind=kind,
        num_bytes=status.st_size,
        version=str(status.st_mtime_ns),
        text_field="text",
        id_field=id_field,
        metadata_fields=tuple(metadata_fields),
        part=part,
        part_bytes=status.st_size,
    )


def outcome(items):
    """Texts of the kept, (reason, position, offset) of the rejected."""
    return [item.text if isinstance(item, Document) else (item.reason, item.position, item.offset) for item in items]


def read(path: Path, kind, largest=LARGEST, part=None):
    return outcome(read_file(describe(path, kind, part), path, largest))


@pytest.mark.parametrize(
    ("kind", "content", "wanted"),
    [
        ("text", b"plain", ["plain"]),
        ("text", b"no final newline\r\nCRLF stays\r\n", ["no final newline\r\nCRLF stays\r\n"]),
        ("text", b"\xef\xbb\xbfmark", ["mark"]),
        ("text", b"a\0b", ["a\0b"]),
        ("text", b"", [("empty", 0, 0)]),
        ("text", b"\xef\xbb\xbf", [("empty", 0, 0)]),
        ("text", b" \n", [" \n"]),
        ("text", b"abc\xffd", [("bad_utf8", 0, 3)]),
        ("text", b"\xef\xbb\xbfab\xff", [("bad_utf8", 0, 5)]),
        ("text", b"cut \xf0\x9f\xa6", [("bad_utf8", 0, 4)]),
        ("text", "half \ud800".encode("utf-8", "surrogatepass"), [("bad_utf8", 0, 5)]),
        ("text", b"\xff\xfeU\0T\0F\0", [("bad_utf8", 0, 0)]),
        ("text", b"x" * LARGEST, ["x" * LARGEST]),
        ("text", b"x" * (LARGEST + 1), [("too_large", 0, 0)]),
        ("python", "# coding: koi8-r\ns = 'привет'\n".encode("koi8-r"), ["# coding: koi8-r\ns = 'привет'\n"]),
        ("python", b"#!/usr/bin/python\n# -*- coding: latin-1 -*-\n\xe9", ["#!/usr/bin/python\n# -*- coding: latin-1 -*-\né"]),
        ("python", b"\xef\xbb\xbfx = 1\r\n", ["x = 1\r\n"]),
        ("python", b"# coding: uft-8\n", [("bad_encoding", 0, 0)]),
        ("python", b"\xef\xbb\xbf# coding: latin-1\n", [("bad_encoding", 0, 0)]),
        ("python", b"# coding: ascii\n\n'\xe9'", [("bad_encoding", 0, 18)]),
        ("python", b"x = 1\n\n\n'\xe9'", [("bad_utf8", 0, 9)]),
        ("python", b"'\xe9'", [("bad_utf8", 0, 1)]),
        ("python", b"# coding: utf-7\n# +2AA-\n", [("lone_surrogate", 0, 0)]),
        ("python", b"# coding: unicode_escape\n\\ud800", [("lone_surrogate", 0, 0)]),
        ("python", b"# coding: hex\n61", [("bad_encoding", 0, 0)]),
        ("python", b"", [("empty", 0, 0)]),
        ("python", b"#" * (LARGEST + 1), [("too_large", 0, 0)]),
        ("jsonl", b"", []),
        ("jsonl", b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        ("jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\r\\n"}\r\n', ["a", "b\r\n"]),
        ("jsonl", b'{"text": "a\xe2\x80\xa8b"}\n{"text": "\\u0000"}\n', ["a\u2028b", "\0"]),
        ("jsonl", b'{"text": ""}\n', [("empty", 0, 0)]),
        ("jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', ["a", ("bad_json", 14, 14), "c"]),
        ("jsonl", b'{"text": "a"}\n{"text": "b', ["a", ("bad_json", 14, 14)]),
        ("jsonl", b'{"text": "\xff"}\n{"text": "c"}\n', [("bad_utf8", 0, 10), "c"]),
        ("jsonl", b'["text"]\n"text"\nnull\n', [("not_an_object", 0, 0), ("not_an_object", 9, 9), ("not_an_object", 16, 16)]),
        ("jsonl", b'{"body": "a"}\n', [("missing_field", 0, 0)]),
        ("jsonl", b'{"text": null}\n{"text": 3}\n{"text": ["a"]}\n', [("not_text", 0, 0), ("not_text", 15, 15), ("not_text", 27, 27)]),
        ("jsonl", b'{"text": "\\ud800"}\n{"text": "\\ud83e\\udd8a"}\n', [("lone_surrogate", 0, 0), "🦊"]),
        ("jsonl", b"[" * 900 + b"\n" + b'{"text": "b"}\n', [("bad_json", 0, 0), "b"]),
        ("jsonl", b'{"text": "' + b"x" * LARGEST + b'"}\n{"text": "b"}\n', [("too_large", 0, 0), "b"]),
        ("jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 3 * LARGEST, ["a", ("too_large", 14, 14)]),
        ("jsonl", b'{"text": "' + b"x" * (LARGEST - 12) + b'"}\r\n{"text": "b"}', ["x" * (LARGEST - 12), "b"]),
        ("jsonl", b'\xef\xbb\xbf{"text": "\xff"}', [("bad_utf8", 0, 13)]),
        ("jsonl", b'{"text": "a", "n": NaN}\n{"text": "b", "n": -Infinity}\n', ["a", "b"]),
        ("jsonl", b'{"text": "a", "n": "\\ud800"}\n{"text": "b", "\\ud800": 1}\n', ["a", "b"]),
        ("jsonl", b'{"text": "a", "text": "b"}\n{"text": "a", "text": 1}', ["b", ("not_text", 27, 27)]),
        ("jsonl", b'{"text": "a"}\x0b\n\x0b\x0c\n{"text": "c"} ', [("bad_json", 0, 0), "c"]),
        ("jsonl", b'{"text": "a", "n": ' + b"9" * 900 + b'}\n{"text": "b"}\n', ["a", "b"]),
    ],
)  # fmt: skip
def test_odd_files(tmp_path, kind, content, wanted):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert read(path, kind) == wanted


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
    monkeypatch.setattr(formats, "BLOCK_BYTES", 4096)
    for _ in range(100 if THOROUGH else 10):
        check_lines(tmp_path / "lines.jsonl", [random_line(chosen) for _ in range(1000)], chosen.choice([b"\n", b"\r\n"]))


def test_parts_of_lines_give_what_the_whole_file_gives(tmp_path, seed, monkeypatch):
    """At any boundaries: marks, line ends, blank lines, lines longer than a part, characters cut through."""
    chosen = random.Random(seed)
    path = tmp_path / "lines.jsonl"
    for _ in range(2000 if THOROUGH else 50):
        monkeypatch.setattr(formats, "BLOCK_BYTES", chosen.choice([3, 64, 1 << 20]))
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


LINES = b"".join(b'{"text": "document %d"}\n' % number for number in range(500))
TEXTS = [f"document {number}" for number in range(500)]
PACKERS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_of_several_parts(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](LINES[:3001]) + PACKERS[suffix](LINES[3001:]))
    assert read(path, "jsonl") == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_compressed_file_enters_whole_or_not_at_all(tmp_path, suffix, seed):
    """Cut at 120 places, and with a bit flipped at 120: all documents, or one rejection and none."""
    chosen = random.Random(seed)
    path = tmp_path / f"lines.jsonl{suffix}"
    packed = PACKERS[suffix](LINES)
    for size in range(len(packed)) if THOROUGH else {0, 1, len(packed) - 1, *chosen.sample(range(len(packed)), 120)}:
        path.write_bytes(packed[:size])
        assert read(path, "jsonl") == [("damaged_file", 0, 0)], size
    num_rejected = 0
    flips = chosen.sample(range(len(packed)), 120)
    for at in flips:
        flipped = bytearray(packed)
        flipped[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        found = read(path, "jsonl")
        assert found in (TEXTS, [("damaged_file", 0, 0)]), at  # some bits of a header mean nothing
        num_rejected += found != TEXTS
    assert num_rejected > 100


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_huge_line_takes_little_memory(tmp_path, suffix):
    """A line of 100 MB (a few kB when packed) under a limit of 1 MB."""
    path = tmp_path / f"lines.jsonl{suffix}"
    content = b'{"text": "' + b"x" * 100_000_000 + b'"}\n{"text": "b"}\n'
    path.write_bytes(PACKERS[suffix](content) if suffix else content)
    file = describe(path, "jsonl")
    del content
    tracemalloc.start()
    found = outcome(read_file(file, path, 1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("too_large", 0, 0), "b"]
    assert peak < 80_000_000, peak


def table(*texts: str | None) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string()), "id": list(range(len(texts)))})


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    rows = pa.concat_tables([table("a", None, "", "ü"), pa.table({"text": broken, "id": [4]}), table("x" * 1001, "z")])
    pq.write_table(rows, path)
    assert read(path, "parquet") == [
        "a",
        ("not_text", 1, None),
        ("empty", 2, None),
        "ü",
        ("bad_utf8", 4, None),
        ("too_large", 5, None),
        "z",
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_types(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["a", "ü", "a"]).cast(kind)}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", "parquet") == ["a", "ü", "a"]


def test_parquet_of_many_batches(tmp_path):
    pq.write_table(table(*TEXTS), tmp_path / "rows.parquet", row_group_size=130)
    assert read(tmp_path / "rows.parquet", "parquet") == TEXTS


def test_unusable_parquet_is_one_rejection(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), path)
    assert read(path, "parquet") == [("not_text", 0, None)]
    pq.write_table(pa.table({"body": ["a"] * 9}), path, row_group_size=3)
    assert read(path, "parquet") == [("missing_field", 0, None)]
    assert [read(path, "parquet", part=(group, group + 1)) for group in range(3)] == [[("missing_field", 0, None)], [], []]
    pq.write_table(table(*TEXTS), path)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert read(path, "parquet") == [("damaged_file", 0, None)]


def test_arrow_stream_and_its_row_ranges(tmp_path):
    path = tmp_path / "data.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table("").schema) as stream:
        for batch in table(*TEXTS).to_batches(100):
            stream.write_batch(batch)
        boundary = file.tell()
    assert read(path, "arrow") == TEXTS
    assert read(path, "arrow", part=(250, 420)) == TEXTS[250:420]
    positions = [item.position for item in read_file(describe(path, "arrow", (250, 420)), path, LARGEST)]
    assert positions == list(range(250, 420))
    path.write_bytes(path.read_bytes()[:boundary])  # between two batches: arrow itself notices nothing
    assert read(path, "arrow") == [("damaged_file", 0, None)]


IDENTIFIED = {"id_field": "id", "metadata_fields": ("url", "date", "score")}


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


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_names_and_metadata_of_tables(tmp_path, kind):
    day = datetime.date(2024, 2, 29)
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"u\xff\xff")])
    rows = pa.table({"more": [0, 0], "text": ["a", "b"], "id": [7, None], "url": broken, "date": [day, None], "score": [1.5, float("nan")]})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(rows, path)
    else:
        with pa.ipc.new_stream(str(path), rows.schema) as stream:
            stream.write_table(rows)
    items = list(read_file(describe(path, kind, **IDENTIFIED), path, LARGEST))
    assert [(item.name, dict(item.metadata)) for item in items if isinstance(item, Document)] == [
        ("7", {"url": "u", "date": "2024-02-29", "score": 1.5}),
        (None, {"date": None, "score": None}),
    ]


def test_parquet_in_ranges_of_row_groups(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    pq.write_table(table(*TEXTS), path, row_group_size=30, compression="none")
    file = describe(path, "parquet", id_field="id")
    whole = list(read_file(file, path, LARGEST))
    with path.open("rb") as stream:
        parts = split_parquet(file, stream, 2000)
    assert 4 < len(parts) < 17 and [part.part[0] for part in parts[1:]] == [part.part[1] for part in parts[:-1]]
    assert [item for part in parts for item in read_file(part, path, LARGEST)] == whole
    monkeypatch.setattr(formats, "KEPT_BYTES", 10)  # what is not kept is read again
    assert [item for part in parts for item in read_file(part, path, LARGEST)] == whole
    assert [hash_input(part, path) is not None for part in parts] == [True] + [False] * (len(parts) - 1)


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_is_too_much_to_keep_is_unpacked_again(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(formats, "KEPT_BYTES", 1000)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 500)
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](LINES))
    assert read(path, "jsonl") == TEXTS
    path.write_bytes(PACKERS[suffix](LINES)[:-3])
    assert read(path, "jsonl") == [("damaged_file", 0, 0)]


def test_odd_but_sound_compressed_files(tmp_path):
    """Empty parts, parts to be skipped, padding, no content size, another level: as the format allows."""
    path = tmp_path / "lines.jsonl.zst"
    pack = PACKERS[".zst"]
    skipped = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    streamed = zstandard.ZstdCompressor(level=19, write_content_size=False).compressobj()
    parts = [skipped, pack(LINES[:3001]), pack(b""), skipped, streamed.compress(LINES[3001:]) + streamed.flush(), skipped]
    path.write_bytes(b"".join(parts))
    assert read(path, "jsonl") == TEXTS
    for size in (3, 9, len(b"".join(parts[:4])) - 1, len(b"".join(parts)) - 1):
        path.write_bytes(b"".join(parts)[:size])
        assert read(path, "jsonl") == [("damaged_file", 0, 0)]
    path.write_bytes(b"".join(parts) + b"behind")
    assert read(path, "jsonl") == [("damaged_file", 0, 0)]
    path = tmp_path / "lines.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[:3001]) + gzip.compress(b"") + gzip.compress(LINES[3001:]) + b"\0" * 1000)
    assert read(path, "jsonl") == TEXTS


def rows_of_file(path: Path, repeat: int = 1):
    for line in path.read_text().split():
        yield from [{"text": line, "id": len(line), "url": path.suffix}] * repeat
    yield "no mapping"


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    path = tmp_path / "words.odd"
    path.write_text(f"one three {'x' * 1001}")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rows.py").write_text(Path(__file__).read_text())
    _, digest = load_function("my_rows:rows_of_file")
    file = replace(describe(path, "my_rows:rows_of_file", **IDENTIFIED), settings=(("repeat", "2"),), function_sha256=digest)
    items = list(read_file(file, path, LARGEST))
    assert outcome(items) == ["one", "one", "three", "three", ("too_large", 4, None), ("too_large", 5, None), ("not_an_object", 6, None)]
    assert isinstance(items[2], Document) and items[2].name == "5" and items[2].metadata == {"url": ".odd"}
    (tmp_path / "my_rows.py").write_text("rows_of_file = None")
    with pytest.raises(UserError, match="was changed"):
        list(read_file(file, path, LARGEST))
