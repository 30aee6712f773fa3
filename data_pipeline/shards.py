"""Token shards: Megatron's indexed dataset, one `.bin` of token ids beside one `.idx` that says where documents start.

In: token ids, one array per document. Out: files that also train in Megatron-LM, GPT-NeoX and nanotron; what those
wrote is read here. Beside them stands `<prefix>.documents.parquet`: from which file each span of tokens came.

The index, all little-endian (megatron/core/datasets/indexed_dataset.py): 9 bytes of magic, version <Q, dtype code <B,
number of sequences <Q, number of document indices <Q, then int32 sequence lengths (tokens), int64 sequence starts
(bytes), int64 document indices (sequences; the first is 0, the last the number of sequences).
"""

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from configs.errors import UserError

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest type Megatron reads that holds ids below `vocabulary_size`: uint16, else int32.

    Raises ValueError for a size that is not positive or beyond int32.
    """
    if not 0 < vocabulary_size <= 2**31:
        raise ValueError(f"a vocabulary of {vocabulary_size} entries has no token type; wanted 1 to 2**31")
    return np.dtype(np.uint16) if vocabulary_size <= 65536 else np.dtype(np.int32)


class DocumentSpan(NamedTuple):
    """A row of the sidecar: which document stands at which tokens."""

    document_id: str
    source: str
    file: str
    position: int
    """Where it stands in its file, as in `documents.Document`."""
    first_token: int
    num_tokens: int
    """With the end-of-text token."""
    num_bytes: int
    """Of the text in UTF-8."""
    name: str | None = None
    """The value of the source's `id_field`."""
    metadata: str | None = None
    """The values of the source's `metadata_fields`, as JSON."""


class ShardWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`; each document is one sequence.

    It promises nothing about crashes: write into a temporary folder and commit that. Used in a `with`, it is closed
    at the end (also after an error, when what it wrote is not to be trusted).
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """Open the shard's files. Raises OSError; ValueError for a type the format has no code for."""
        self._dtype = np.dtype(dtype)
        if self._dtype not in CODE_OF_DTYPE or self._dtype.kind == "f":
            raise ValueError(f"token ids cannot be stored as {self._dtype}")
        self._index_path = Path(f"{prefix}.idx")
        self._bin = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115  (closed by close())
        self._lengths = array("i")
        self.num_tokens = 0
        """Tokens added so far."""

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append one document's ids (1-D, integers). Raises ValueError for an id the dtype cannot hold; OSError."""
        self.add_documents([tokens])

    def add_documents(self, documents: Sequence[np.ndarray[Any, Any]]) -> None:
        """Append documents, in this order, as `add_document` does for one."""
        for tokens in documents:
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"a document is a 1-D array of integers, found {tokens.ndim}-D {tokens.dtype}")
        tokens = np.concatenate(documents) if documents else np.empty(0, dtype=self._dtype)
        limits = np.iinfo(self._dtype)
        if tokens.size and (int(tokens.min()) < max(0, limits.min) or int(tokens.max()) > limits.max):
            raise ValueError(f"token ids {int(tokens.min())} to {int(tokens.max())} do not fit into {self._dtype} (0 to {limits.max})")
        self._bin.write(tokens.astype(self._dtype, copy=False).data)
        self._lengths.extend([one.size for one in documents])
        self.num_tokens += tokens.size

    def close(self) -> None:
        """Write the index and close both files. Raises OSError; closing twice does nothing."""
        if self._bin.closed:
            return
        self._bin.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, dtype=np.int32)
        pointers = _starts(lengths)[:-1] * self._dtype.itemsize
        with self._index_path.open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self._dtype], lengths.size, lengths.size + 1))
            index.write(lengths.astype("<i4").tobytes())
            index.write(pointers.astype("<i8").tobytes())
            index.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._bin.close()


class Shard:
    """A shard, mapped into memory: opening costs no reading of tokens, and many processes share the pages."""

    tokens: np.ndarray[Any, Any]
    """All token ids, 1-D, in the file's own type."""
    document_starts: np.ndarray[Any, np.dtype[np.int64]]
    """Where each document starts, in tokens, and behind the last one the number of tokens (documents + 1)."""

    def __init__(self, prefix: Path) -> None:
        """Open `<prefix>.bin` and `<prefix>.idx`. Raises UserError naming the file that is missing, cut or foreign."""
        self.prefix = Path(prefix)
        dtype, lengths, pointers, documents = _read_index(Path(f"{prefix}.idx"))
        starts = _starts(lengths)
        if not np.array_equal(pointers, starts[:-1] * dtype.itemsize):
            raise UserError(f"{prefix}.idx: the sequences do not stand one behind the other; build the shard again.")
        self.tokens = _map_tokens(Path(f"{prefix}.bin"), dtype, int(starts[-1]))
        self.document_starts = starts[documents]

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard, end-of-text tokens included."""
        return int(self.tokens.size)

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return int(self.document_starts.size) - 1

    def document(self, number: int) -> np.ndarray[Any, Any]:
        """The ids of one document, without copying. Raises IndexError outside 0 .. num_documents - 1."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"{self.prefix} has documents 0 to {self.num_documents - 1}, asked for {number}")
        return self.tokens[self.document_starts[number] : self.document_starts[number + 1]]


def write_spans(prefix: Path, spans: list[DocumentSpan], facts: dict[str, str]) -> None:
    """Write the sidecar `<prefix>.documents.parquet`, one row per document in order. Raises OSError.

    `facts` go into the file's metadata: the tokenizer's hash, which gives the ids their meaning.
    """
    import pyarrow
    import pyarrow.parquet

    columns = list(zip(*spans, strict=True)) or [()] * len(DocumentSpan._fields)
    text, few, number = pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.int64()
    types = [text, few, few, number, number, number, number, text, text]
    table = pyarrow.table(
        {name: pyarrow.array(column, kind) for name, column, kind in zip(DocumentSpan._fields, columns, types, strict=True)}
    ).replace_schema_metadata(facts)
    # Through Python's own file, so that a full disk is an OSError with its number.
    with Path(f"{prefix}.documents.parquet").open("wb") as file:
        pyarrow.parquet.write_table(table, file, compression="zstd")


def read_spans(prefix: Path) -> "pyarrow.Table":
    """The sidecar as a table with the columns of `DocumentSpan`. Raises UserError when it is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    path = Path(f"{prefix}.documents.parquet")
    try:
        return pyarrow.parquet.read_table(path, use_threads=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it says which document each token came from, and stands beside each shard.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); check the dataset with `pretrain data verify`.") from None


def _starts(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    starts = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    return starts


def _read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token type, sequence lengths, byte pointers and document indices, checked against one another."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a shard is a .bin and an .idx of the same name.") from None
    if not content.startswith(MAGIC):
        raise UserError(f"{path}: found {content[: len(MAGIC)]!r}, wanted a Megatron index (it starts with {MAGIC!r}).")
    if len(content) < HEADER.size:
        raise UserError(f"{path}: cut off inside its header; found {len(content)} bytes of {HEADER.size}.")
    _, version, code, num_sequences, num_indices = HEADER.unpack_from(content)
    if version != VERSION:
        raise UserError(f"{path}: index version {version}; only version {VERSION} is read here.")
    dtype = np.dtype(DTYPE_OF_CODE.get(code, np.float32))
    if dtype.kind == "f":
        raise UserError(f"{path}: type code {code} is not one of whole numbers, so this holds no token ids.")
    wanted = HEADER.size + 12 * num_sequences + 8 * num_indices
    if len(content) != wanted:
        raise UserError(f"{path}: found {len(content)} bytes, wanted {wanted} for {num_sequences} sequences; it is cut off or damaged.")
    lengths = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_indices, HEADER.size + 12 * num_sequences)
    in_order = num_indices > 0 and documents[0] == 0 and documents[-1] == num_sequences and bool((np.diff(documents) >= 0).all())
    if not in_order or (lengths < 0).any():
        raise UserError(f"{path}: the lengths or document indices are out of order; the file is damaged.")
    return dtype, lengths, pointers, documents


def _map_tokens(path: Path, dtype: np.dtype[Any], num_tokens: int) -> np.ndarray[Any, Any]:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a shard is a .bin and an .idx of the same name.") from None
    if found != num_tokens * dtype.itemsize:
        raise UserError(
            f"{path}: found {found} bytes, wanted {num_tokens * dtype.itemsize} ({num_tokens} tokens, says its index); it is damaged."
        )
    if num_tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))
