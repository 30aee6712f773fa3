"""Odd files: every one has a defined outcome, every document is kept or named, none is lost."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import Document, Rejected
from data_pipeline.formats import InputFile, read_file

LARGEST = 1000


def describe(path: Path, kind, rows=None) -> InputFile:
    status = path.stat()
    return InputFile("mine", str(path.parent), path.name, kind, status.st_size, status.st_mtime_ns, "text", rows)


def outcome(items):
    """Texts of the kept, (reason, position, offset) of the rejected."""
    return [item.text if isinstance(item, Document) else (item.reason, item.position, item.offset) for item in items]


def read(path: Path, kind, largest=LARGEST, rows=None):
    return outcome(read_file(describe(path, kind, rows), largest))


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
        ("python", b"'\xe9'", [("bad_encoding", 0, 0)]),
        ("python", b"# coding: hex\n61", [("bad_encoding", 0, 0)]),
        ("python", b"", [("empty", 0, 0)]),
        ("python", b"#" * (LARGEST + 1), [("too_large", 0, 0)]),
        ("jsonl", b"", []),
        ("jsonl", b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        ("jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\r\\n"}\r\n', ["a", "b\r\n"]),
        ("jsonl", b'{"text": "a\xe2\x80\xa8b"}\n{"text": "\\u0000"}\n', ["a\u2028b", "\0"]),
        ("jsonl", b'{"text": ""}\n', [("empty", 1, 0)]),
        ("jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', ["a", ("bad_json", 2, 14), "c"]),
        ("jsonl", b'{"text": "a"}\n{"text": "b', ["a", ("bad_json", 2, 14)]),
        ("jsonl", b'{"text": "\xff"}\n{"text": "c"}\n', [("bad_utf8", 1, 10), "c"]),
        ("jsonl", b'["text"]\n"text"\nnull\n', [("not_an_object", 1, 0), ("not_an_object", 2, 9), ("not_an_object", 3, 16)]),
        ("jsonl", b'{"body": "a"}\n', [("missing_field", 1, 0)]),
        ("jsonl", b'{"text": null}\n{"text": 3}\n{"text": ["a"]}\n', [("not_text", 1, 0), ("not_text", 2, 15), ("not_text", 3, 27)]),
        ("jsonl", b'{"text": "\\ud800"}\n{"text": "\\ud83e\\udd8a"}\n', [("lone_surrogate", 1, 0), "🦊"]),
        ("jsonl", b"[" * 900 + b"\n" + b'{"text": "b"}\n', [("bad_json", 1, 0), "b"]),
        ("jsonl", b'{"text": "' + b"x" * LARGEST + b'"}\n{"text": "b"}\n', [("too_large", 1, 0), "b"]),
        ("jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 3 * LARGEST, ["a", ("too_large", 2, 14)]),
        ("jsonl", b'{"text": "' + b"x" * (LARGEST - 12) + b'"}\r\n{"text": "b"}', ["x" * (LARGEST - 12), "b"]),
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
    _, rejected = read_file(describe(path, "jsonl"), LARGEST)
    assert isinstance(rejected, Rejected)
    assert (rejected.source, rejected.file, rejected.position, rejected.offset) == ("mine", "lines.jsonl", 2, 14)
    assert "['body', 'id']" in rejected.detail
    assert bytes.fromhex(rejected.first_bytes) == b'{"body": "b", "id": 3}'


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b""))))
def test_random_lines_are_kept_or_named(tmp_path_factory, lines):
    """Against an oracle of one line: nothing is lost, nothing is mended."""
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    rows = [b'{"text": "' + line + b'"}' for line in lines]
    path.write_bytes(b"\n".join(rows))
    items = list(read_file(describe(path, "jsonl"), LARGEST))
    assert [item.position for item in items] == list(range(1, len(rows) + 1))
    for row, item in zip(rows, items, strict=True):
        try:
            text = json.loads(row.decode("utf-8"))["text"]
            text.encode("utf-8")
        except ValueError:
            assert isinstance(item, Rejected)
        else:
            assert item.text == text if isinstance(item, Document) else item.reason == "empty" and text == ""


LINES = b"".join(b'{"text": "document %d"}\n' % number for number in range(500))
TEXTS = [f"document {number}" for number in range(500)]
PACKERS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_of_several_parts(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](LINES[:3001]) + PACKERS[suffix](LINES[3001:]))
    assert read(path, "jsonl") == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_compressed_file_enters_whole_or_not_at_all(tmp_path, suffix):
    """Cut at 120 places, and with a bit flipped at 120: all documents, or one rejection and none."""
    print("seed 7")
    chosen = random.Random(7)
    path = tmp_path / f"lines.jsonl{suffix}"
    packed = PACKERS[suffix](LINES)
    for size in {0, 1, len(packed) - 1, *chosen.sample(range(len(packed)), 120)}:
        path.write_bytes(packed[:size])
        assert read(path, "jsonl") == [("damaged_file", 0, 0)], size
    num_rejected = 0
    for at in chosen.sample(range(len(packed)), 120):
        flipped = bytearray(packed)
        flipped[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        found = read(path, "jsonl")
        assert found in (TEXTS, [("damaged_file", 0, 0)]), at  # some bits of a header mean nothing
        num_rejected += found != TEXTS
    assert num_rejected > 100


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_huge_line_takes_little_memory(tmp_path, suffix):
    """A line of 64 MB (a few kB when packed) under a limit of 1 MB."""
    path = tmp_path / f"lines.jsonl{suffix}"
    content = b'{"text": "' + b"x" * 64_000_000 + b'"}\n{"text": "b"}\n'
    path.write_bytes(PACKERS[suffix](content) if suffix else content)
    file = describe(path, "jsonl")
    del content
    tracemalloc.start()
    found = outcome(read_file(file, 1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("too_large", 1, 0), "b"]
    assert peak < 48_000_000, peak


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
    pq.write_table(pa.table({"body": ["a"]}), path)
    assert read(path, "parquet") == [("missing_field", 0, None)]
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
    assert read(path, "arrow", rows=(250, 420)) == TEXTS[250:420]
    positions = [item.position for item in read_file(describe(path, "arrow", (250, 420)), LARGEST)]
    assert positions == list(range(250, 420))
    path.write_bytes(path.read_bytes()[:boundary])  # between two batches: arrow itself notices nothing
    assert read(path, "arrow") == [("damaged_file", 0, None)]
