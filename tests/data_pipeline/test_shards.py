"""The shard format, byte for byte, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipeline.shards import DocumentSpan, Shard, ShardWriter, read_spans, token_dtype, write_spans


def write(prefix: Path, documents: list[list[int]], dtype=np.uint16) -> Shard:
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return Shard(prefix)


def test_bytes_of_the_format_are_megatrons(tmp_path):
    """Every byte, written down by hand from megatron/core/datasets/indexed_dataset.py."""
    write(tmp_path / "shard", [[1, 2, 65535], [], [7]])
    assert (tmp_path / "shard.bin").read_bytes() == bytes.fromhex("0100 0200 ffff 0700")
    assert (tmp_path / "shard.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + (1).to_bytes(8, "little")  # version
        + b"\x08"  # uint16
        + (3).to_bytes(8, "little")  # sequences
        + (4).to_bytes(8, "little")  # document indices
        + b"".join(n.to_bytes(4, "little") for n in (3, 0, 1))  # lengths
        + b"".join(n.to_bytes(8, "little") for n in (0, 6, 6))  # pointers, bytes
        + b"".join(n.to_bytes(8, "little") for n in (0, 1, 2, 3))  # documents
    )


def test_32_bit_ids_are_int32(tmp_path):
    write(tmp_path / "shard", [[0, 2**31 - 1]], np.int32)
    assert (tmp_path / "shard.idx").read_bytes()[17] == 4
    assert (tmp_path / "shard.bin").read_bytes() == struct.pack("<ii", 0, 2**31 - 1)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=10))
def test_what_is_written_is_read(tmp_path_factory, documents):
    shard = write(tmp_path_factory.mktemp("s") / "shard", documents)
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    assert shard.document_starts.dtype == np.int64
    assert shard.document_starts.tolist() == [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]


def test_documents_of_several_sequences_are_read(tmp_path):
    """Megatron lets a document hold many sequences; its boundaries are the document's."""
    write(tmp_path / "shard", [[1, 2], [3], [4, 5, 6]])
    index = bytearray((tmp_path / "shard.idx").read_bytes())
    index[26:34] = (3).to_bytes(8, "little")
    index[-32:] = b"".join(n.to_bytes(8, "little") for n in (0, 2, 3))
    (tmp_path / "shard.idx").write_bytes(index)
    assert Shard(tmp_path / "shard").document_starts.tolist() == [0, 3, 6]


def test_offsets_beyond_32_bits(tmp_path):
    """A sparse shard of more than 4 GiB: the last tokens are found."""
    prefix = tmp_path / "large"
    lengths = np.array([2**30, 2**30, 2**29, 3], dtype="<i4")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 4, 5)
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + (starts[:-1] * 2).tobytes() + np.arange(5, dtype="<i8").tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(int(starts[-1]) * 2)
        file.seek(int(starts[-2]) * 2)
        file.write(np.array([5, 6, 7], dtype="<u2").tobytes())
    shard = Shard(prefix)
    assert shard.document(3).tolist() == [5, 6, 7] and shard.num_tokens == 5 * 2**29 + 3


def test_empty_shard(tmp_path):
    shard = write(tmp_path / "shard", [])
    assert (shard.num_tokens, shard.num_documents, shard.document_starts.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(("size", "dtype"), [(257, "uint16"), (65536, "uint16"), (65537, "int32"), (2**31, "int32")])
def test_token_type_holds_every_id(size, dtype):
    assert token_dtype(size) == np.dtype(dtype)
    assert np.iinfo(dtype).max >= size - 1


@pytest.mark.parametrize("size", [0, 2**31 + 1])
def test_no_token_type(size):
    with pytest.raises(ValueError, match="2\\*\\*31"):
        token_dtype(size)


@pytest.mark.parametrize("token", [-1, 65536])
def test_ids_that_do_not_fit_are_refused(tmp_path, token):
    with ShardWriter(tmp_path / "shard", np.dtype(np.uint16)) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.add_document(np.array([1, token]))


def test_every_cut_is_noticed(tmp_path):
    """A file cut at any byte is refused by name, also where only the other file is whole."""
    write(tmp_path / "shard", [[1, 2, 3], [4]])
    for suffix in ("idx", "bin"):
        path = tmp_path / f"shard.{suffix}"
        whole = path.read_bytes()
        for size in [*range(len(whole)), len(whole) + 1]:
            path.write_bytes((whole + b"\0")[:size])
            with pytest.raises(UserError, match=f"shard.{suffix}"):
                Shard(tmp_path / "shard")
        path.write_bytes(whole)
    assert Shard(tmp_path / "shard").num_tokens == 4


@pytest.mark.parametrize(
    ("at", "content", "says"),
    [(0, b"PARQUET", "Megatron index"), (9, b"\2", "version 2"), (17, b"\6", "code 6"), (17, b"\x63", "code 99"), (34, b"\2", "behind")],
)
def test_foreign_files_are_refused(tmp_path, at, content, says):
    write(tmp_path / "shard", [[1, 2, 3], [4]])
    index = bytearray((tmp_path / "shard.idx").read_bytes())
    index[at : at + len(content)] = content
    (tmp_path / "shard.idx").write_bytes(index)
    with pytest.raises(UserError, match=says):
        Shard(tmp_path / "shard")


@pytest.mark.parametrize("missing", ["idx", "bin"])
def test_missing_files_are_named(tmp_path, missing):
    write(tmp_path / "shard", [[1]])
    (tmp_path / f"shard.{missing}").unlink()
    with pytest.raises(UserError, match=f"shard.{missing}: no such file"):
        Shard(tmp_path / "shard")


def test_sidecar(tmp_path):
    spans = [
        DocumentSpan("a1", "web", "x/ü.txt", 0, 0, 3, 10, "name", '{"url": "https://example.org"}'),
        DocumentSpan("b2", "web", "y.jsonl", 2**40, 3, 1, 0),
    ]
    write_spans(tmp_path / "shard", spans, {"tokenizer_sha256": "abc"})
    assert read_spans(tmp_path / "shard").schema.metadata == {b"tokenizer_sha256": b"abc"}
    assert [DocumentSpan(**row) for row in read_spans(tmp_path / "shard").to_pylist()] == spans
    write_spans(tmp_path / "none", [], {})
    assert read_spans(tmp_path / "none").num_rows == 0
    with pytest.raises(UserError, match=r"other.documents.parquet"):
        read_spans(tmp_path / "other")
