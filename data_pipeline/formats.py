"""One input file to documents: text, Python source, JSON lines (plain, .gz, .zst), parquet, arrow.

In: an `InputFile`. Out: one `Document` or one `Rejected` for each document it holds, in the file's order, in memory
bounded by the largest document. Bytes are decoded strictly: what cannot be read is named, never mended or dropped.

Reasons: bad_utf8, bad_encoding (a Python file's declaration is unknown or wrong), bad_json, not_an_object,
missing_field, not_text, lone_surrogate, too_large, empty, damaged_file (of such a file no document enters at all).
"""

import codecs
import gzip
import io
import json
import os
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow
import pyarrow.parquet
import zstandard

from data_pipeline.documents import SHOWN_BYTES, Document, Rejected, show_bytes

Kind = Literal["text", "python", "jsonl", "parquet", "arrow"]
BLOCK_BYTES = 1 << 20
ZSTD_INPUT_BYTES = 256  # that much zstd may unpack to 8 MB, so it is fed in small portions
ROWS_PER_BATCH = 256
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class InputFile:
    """A file of a source (or a range of an arrow file's rows), as it was when the build was planned."""

    source: str
    root: str
    """The source's folder, absolute."""
    name: str
    """Path below `root`, with `/`."""
    kind: Kind
    num_bytes: int
    mtime_ns: int
    """Modification time, nanoseconds."""
    text_field: str
    rows: tuple[int, int] | None = None
    """First row and the row behind the last one; None: the whole file."""

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return Path(self.root) / self.name


def read_file(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Every document of a file; a text above `largest_bytes` (a line above it, in jsonl) is rejected as too_large.

    Raises OSError when the file is gone or may not be read (a damaged one is rejected instead).
    """
    return READERS[file.kind](file, largest_bytes)


def read_text(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """A file is a document in UTF-8; a byte order mark is no part of it."""
    content = _read_up_to(file.path, largest_bytes)
    if content is None:
        yield _reject(file, 0, 0, "too_large", f"more than {largest_bytes} bytes", _start_of(file.path))
        return
    yield _decode(file, 0, 0, content)


def read_python(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """A file is a document in the encoding it declares (PEP 263), UTF-8 without a declaration."""
    content = _read_up_to(file.path, largest_bytes)
    if content is None:
        yield _reject(file, 0, 0, "too_large", f"more than {largest_bytes} bytes", _start_of(file.path))
        return
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        reason = "bad_utf8" if error.encoding.startswith("utf") else "bad_encoding"
        yield _reject(file, 0, error.start, reason, f"not {error.encoding}: {error.reason}", content[error.start :])
        return
    except (SyntaxError, LookupError, UnicodeError) as error:
        yield _reject(file, 0, 0, "bad_encoding", str(error), content)
        return
    yield _check_text(file, 0, 0, text)


def read_jsonl(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each line is a JSON object with the text in one field; a line of nothing but white space is no document."""
    try:
        if file.name.endswith((".gz", ".zst")):
            _read_through(file.path)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        yield _reject(file, 0, 0, "damaged_file", str(error), _start_of(file.path))
        return
    with _open_lines(file.path) as stream:
        for number, offset, line in _split_lines(stream, largest_bytes):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > largest_bytes:
                yield _reject(file, number, offset, "too_large", f"a line of more than {largest_bytes} bytes", line)
            elif line.strip():
                yield _parse_line(file, number, offset, line)


def read_parquet(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each row is a document, its text in one column."""

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            yield from table.iter_batches(ROWS_PER_BATCH, columns=[file.text_field], use_threads=False)

    return _read_table(file, largest_bytes, lambda: column_names(file), batches)


def read_arrow(file: InputFile, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each row of an arrow stream (what Hugging Face `save_to_disk` writes) is a document, its text in one column."""

    def batches() -> Iterator[pyarrow.RecordBatch]:
        first, behind = file.rows or (0, count_arrow_rows(file.path))
        with pyarrow.memory_map(str(file.path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            table = stream.read_all().select([file.text_field])  # mapped: nothing is read before its row is
            yield from table.slice(first, behind - first).to_batches(ROWS_PER_BATCH)

    return _read_table(file, largest_bytes, lambda: column_names(file), batches)


READERS: dict[Kind, Callable[[InputFile, int], Iterator[Document | Rejected]]] = {
    "text": read_text,
    "python": read_python,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def count_arrow_rows(path: Path) -> int:
    """Rows of an arrow stream. Raises ArrowException, OSError or EOFError for a damaged one."""
    with path.open("rb") as stream:
        stream.seek(-min(len(ARROW_END), path.stat().st_size), os.SEEK_END)
        if stream.read() != ARROW_END:  # arrow takes a stream that is cut between two batches for a whole one
            raise EOFError("the arrow stream ends before its end mark")
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        return sum(batch.num_rows for batch in batches)


def column_names(file: InputFile) -> list[str]:
    """The columns of a parquet or arrow file. Raises ArrowException or OSError for a damaged one."""
    if file.kind == "parquet":
        return pyarrow.parquet.read_schema(file.path).names
    with pyarrow.memory_map(str(file.path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        return stream.schema.names


def first_fields(file: InputFile, largest_bytes: int) -> list[str] | None:
    """The fields of a file's first row; None where the file is text, has no row, or its first row cannot be read."""
    if file.kind in ("parquet", "arrow"):
        try:
            return column_names(file)
        except (pyarrow.ArrowException, OSError):
            return None
    if file.kind != "jsonl":
        return None
    try:
        with _open_lines(file.path) as stream:
            for _, _, line in _split_lines(stream, largest_bytes):
                if line.strip():
                    row = json.loads(line.removeprefix(codecs.BOM_UTF8))
                    return list(row) if isinstance(row, dict) else None
    except (ValueError, RecursionError, EOFError, zlib.error, OSError, zstandard.ZstdError):
        pass  # the reader itself will reject it, with its reason
    return None


def _reject(file: InputFile, position: int, offset: int | None, reason: str, detail: str, content: bytes) -> Rejected:
    return Rejected(file.source, file.name, position, offset, reason, detail[:300], show_bytes(content))


def _check_text(file: InputFile, position: int, offset: int | None, text: str) -> Document | Rejected:
    if not text:
        return _reject(file, position, offset, "empty", "a text without a character", b"")
    return Document(file.source, file.name, position, text)


def _decode(file: InputFile, position: int, offset: int | None, content: bytes) -> Document | Rejected:
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        # The error counts from behind the byte order mark.
        start = error.start + len(content) - len(error.object)
        place = None if offset is None else offset + start
        return _reject(file, position, place, "bad_utf8", f"not utf-8: {error.reason}", content[start:])
    return _check_text(file, position, offset, text)


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(SHOWN_BYTES)


def _read_up_to(path: Path, largest_bytes: int) -> bytes | None:
    with path.open("rb") as stream:
        content = stream.read(largest_bytes + 1)
    return None if len(content) > largest_bytes else content


class _ZstdFrames(io.RawIOBase):
    """Unpacks zstd frames. The library's own stream reader takes a cut frame for the end of the file; this raises EOFError."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._blocks = self._unpack()
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _unpack(self) -> Iterator[bytes]:
        frame = None
        num_frames = 0
        while portion := self._stream.read(ZSTD_INPUT_BYTES):
            while portion:
                if frame is None:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                    num_frames += 1
                yield frame.decompress(portion)
                portion = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
        if frame is not None or not num_frames:
            raise EOFError("the zstd file ends before its last frame does")


def _open_lines(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile reads like any binary file
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(path.open("rb")), BLOCK_BYTES)  # type: ignore[return-value]
    return path.open("rb", BLOCK_BYTES)


def _read_through(path: Path) -> None:
    """Unpack a whole file for its checksums' sake, so that a damaged one is known before its first document enters."""
    if path.stat().st_size == 0:
        raise EOFError("a compressed file of no bytes")
    with _open_lines(path) as stream:
        while stream.read(BLOCK_BYTES):
            pass


def _split_lines(stream: BinaryIO, largest_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, byte offset and content of each line, without its line end; of a longer line only its start."""
    number = offset = 0
    while line := stream.readline(largest_bytes + 2):  # room for the line end, \r\n
        number += 1
        size = len(line)
        kept = line.removesuffix(b"\n").removesuffix(b"\r")
        while not line.endswith(b"\n") and (line := stream.readline(BLOCK_BYTES)):
            size += len(line)
            kept = kept if len(kept) > largest_bytes else kept + line.removesuffix(b"\n")[: largest_bytes + 1]
        yield number, offset, kept
        offset += size


def _parse_line(file: InputFile, number: int, offset: int, line: bytes) -> Document | Rejected:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _reject(file, number, offset + error.start, "bad_utf8", f"not utf-8: {error.reason}", line[error.start :])
    except (ValueError, RecursionError) as error:
        return _reject(file, number, offset, "bad_json", str(error), line)
    if not isinstance(row, dict):
        return _reject(file, number, offset, "not_an_object", f"found a {type(row).__name__}", line)
    if file.text_field not in row:
        return _reject(file, number, offset, "missing_field", f"no {file.text_field!r} among {sorted(row)}", line)
    text = row[file.text_field]
    if not isinstance(text, str):
        return _reject(file, number, offset, "not_text", f"{file.text_field!r} is a {type(text).__name__}", line)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return _reject(file, number, offset, "lone_surrogate", f"half a character: {text[error.start]!r}", line)
    return _check_text(file, number, offset, text)


def _read_table(
    file: InputFile,
    largest_bytes: int,
    names: Callable[[], Iterable[str]],
    batches: Callable[[], Iterator[pyarrow.RecordBatch]],
) -> Iterator[Document | Rejected]:
    """Rows of batches; the file is read twice, so that a damaged one is known before its first document enters."""
    try:
        found = list(names())
        if file.text_field not in found:
            yield _reject(file, 0, None, "missing_field", f"no column {file.text_field!r} among {found}", b"")
            return
        is_text = all(_is_text(batch.column(0).type) for batch in batches())
    except (FileNotFoundError, PermissionError):
        raise
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        yield _reject(file, 0, None, "damaged_file", str(error), _start_of(file.path))
        return
    if not is_text:
        yield _reject(file, 0, None, "not_text", f"the column {file.text_field!r} does not hold text", b"")
        return
    row = file.rows[0] if file.rows else 0
    for batch in batches():
        # As bytes: arrow does not check that text is UTF-8, and would raise for the whole batch.
        for content in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            if content is None:
                yield _reject(file, row, None, "not_text", f"{file.text_field!r} is null", b"")
            elif len(content) > largest_bytes:
                yield _reject(file, row, None, "too_large", f"{len(content)} bytes, more than {largest_bytes}", content)
            else:
                yield _decode(file, row, None, content)
            row += 1


def _is_text(kind: pyarrow.DataType) -> bool:
    # A dictionary of text is text too: parquet files of pandas categories have them.
    if pyarrow.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
