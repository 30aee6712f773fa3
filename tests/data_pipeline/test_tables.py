"""Parquet and arrow: rows of every type of text, parts, names and metadata, damage."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import tables
from data_pipeline.documents import Document
from data_pipeline.formats import hash_input, read_file
from data_pipeline.tables import split_parquet
from tests.data_pipeline.reading import IDENTIFIED, LARGEST, TEXTS, describe, read


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
    monkeypatch.setattr(tables, "KEPT_BYTES", 10)  # what is not kept is read again
    assert [item for part in parts for item in read_file(part, path, LARGEST)] == whole
    assert [hash_input(part, path) is not None for part in parts] == [True] + [False] * (len(parts) - 1)
