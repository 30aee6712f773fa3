"""One input file to documents: text, Python source, JSON lines (plain, .gz, .zst), parquet, arrow, a user's own function.

In: an `InputFile` and the local path where it (or a copy of it) lies. Out: one `Document` or one `Rejected` for each
document it holds, in the file's order, in memory bounded by the largest document. Bytes are decoded strictly: what cannot
be read is named, never mended or dropped.

A line of JSON is accepted when orjson accepts it or Python's own json does (which also takes NaN, and half a character in a
field that is not asked for). Of equal keys the last one counts. A value of metadata that JSON cannot hold is left out.

Reasons: bad_utf8, bad_encoding (a Python file's declaration, or that of a web page, is unknown or wrong), bad_json,
not_an_object, missing_field, not_text, lone_surrogate, too_large, empty, damaged_file (of such a file, or part of a file
that is split, no document enters at all).
"""

import codecs
import hashlib
import io
import json
import os
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from configs.errors import UserError
from configs.functions import load_function
from data_pipeline.documents import SHOWN_BYTES, Document, Rejected, show_bytes

BLOCK_BYTES = 1 << 20
PACKED_BLOCK_BYTES = 1 << 16  # of what is unpacked: small, because zlib copies what a member leaves over
KEPT_BYTES = 64_000_000  # unpacked content up to this is kept from the check for damage, above it is unpacked again
ROWS_PER_BATCH = 256
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
DAMAGES = (EOFError, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class InputFile:
    """A file of a source, or a part of it, as it was when the build was planned."""

    source: str
    root: str
    """The source's folder, absolute, or a URL's part before `name`; for hub, the data set's name."""
    name: str
    """Path below `root`, with `/`; for hub, the split's name."""
    kind: str
    """text, python, jsonl, parquet, arrow, warc, hub, megatron, or `module:function`."""
    num_bytes: int
    """Of the whole file; of both files of a megatron pair; for hub what is known of it, or 0."""
    version: str
    """What tells a changed file without reading it: its time of modification in ns, its ETag, its revision."""
    text_field: str
    id_field: str | None
    metadata_fields: tuple[str, ...]
    part: tuple[int, int] | None
    """Half-open range of bytes (jsonl: the lines that start there), row groups (parquet) or rows (arrow); for hub, which
    shard of how many; None: the whole file."""
    part_bytes: int
    """About how many bytes the part is; `num_bytes` for a whole file."""
    settings: tuple[tuple[str, str], ...] = ()
    """The source's settings: keys and their values as JSON."""
    function_sha256: str = ""
    """Of the file that defines the function, where the kind is one."""

    @property
    def location(self) -> str:
        """The local path or the URL."""
        return f"{self.root}/{self.name}" if self.is_remote else str(self.path)

    @property
    def path(self) -> Path:
        """Where a local file lies."""
        return Path(self.root) / self.name

    @property
    def is_remote(self) -> bool:
        """Whether the file must be fetched first."""
        return "://" in self.root

    @property
    def packed(self) -> str:
        """.gz or .zst where the name ends so, else nothing."""
        name = self.name.partition("?")[0] if self.is_remote else self.name
        return next((suffix for suffix in (".gz", ".zst") if name.lower().endswith(suffix)), "")


def read_file(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Every document of a file (or of its part); a text above `largest_bytes` (a line above it, in jsonl) is too_large.

    path: where the file or its copy lies. Raises OSError when it is gone or may not be read (a damaged one is rejected
    instead); UserError when the user's function was changed; whatever that function raises.
    """
    return READERS.get(file.kind, read_rows_of_function)(file, path, largest_bytes)


def read_text(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """A file is a document in UTF-8; a byte order mark is no part of it."""
    content = _read_up_to(path, largest_bytes)
    if content is None:
        yield reject(file, 0, 0, "too_large", f"more than {largest_bytes} bytes", _start_of(path))
        return
    yield decode_text(file, 0, 0, content)


def read_python(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """A file is a document in the encoding it declares (PEP 263), UTF-8 without a declaration."""
    content = _read_up_to(path, largest_bytes)
    if content is None:
        yield reject(file, 0, 0, "too_large", f"more than {largest_bytes} bytes", _start_of(path))
        return
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        reason = "bad_utf8" if error.encoding.startswith("utf") else "bad_encoding"
        yield reject(file, 0, error.start, reason, f"not {error.encoding}: {error.reason}", content[error.start :])
        return
    except (SyntaxError, LookupError, UnicodeError, ValueError) as error:
        if b"coding" in b"".join(content.splitlines()[:2]):
            yield reject(file, 0, 0, "bad_encoding", str(error), content)
        else:  # nothing was declared: one of the first lines is not the UTF-8 that it should be
            yield decode_text(file, 0, 0, content)
        return
    yield check_text(file, 0, 0, text)


def read_jsonl(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each line is a JSON object with the text in one field; a line of nothing but white space is no document."""
    first = 0
    if file.packed:
        kept: list[bytes] = []
        try:
            for _ in keep_blocks(unpack(path, file.packed), kept):
                pass
        except DAMAGES as error:
            yield reject(file, 0, 0, "damaged_file", str(error), _start_of(path))
            return
        blocks = iter(kept) if kept else unpack(path, file.packed)
    else:
        with path.open("rb") as stream:
            first, behind = find_lines(file.part, path.stat().st_size, reading_from(stream))
        blocks = _range_blocks(path, first, behind)
    number = 0 if first == 0 else None
    for start, line in split_lines(blocks, first, largest_bytes):
        if number is not None:
            number += 1
        content_start = start
        if start == 0 and line.startswith(codecs.BOM_UTF8):
            content_start = len(codecs.BOM_UTF8)
            line = line[content_start:]
        if len(line) > largest_bytes:
            yield reject(file, start, start, "too_large", f"a line of more than {largest_bytes} bytes", line, number)
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            if not line or line.isspace():
                continue
            yield _parse_slowly(file, start, content_start, line, number)
            continue
        yield _read_row(file, start, start, row, line, number)


def read_parquet(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each row is a document, its text in one column."""

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.parquet.ParquetFile(path) as table:
            groups = range(*(file.part or (0, table.num_row_groups)))
            yield from table.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=_columns(file, table.schema_arrow), use_threads=False)

    def first_row() -> int:
        with pyarrow.parquet.ParquetFile(path) as table:
            return sum(table.metadata.row_group(group).num_rows for group in range(file.part[0] if file.part else 0))

    return _read_table(file, path, largest_bytes, first_row, batches)


def read_arrow(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each row of an arrow stream (what Hugging Face `save_to_disk` writes) is a document, its text in one column."""

    def batches() -> Iterator[pyarrow.RecordBatch]:
        first, behind = file.part or (0, count_arrow_rows(path))
        with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            table = stream.read_all().select(_columns(file, stream.schema))  # mapped: nothing is read before its row is
            yield from table.slice(first, behind - first).to_batches(ROWS_PER_BATCH)

    return _read_table(file, path, largest_bytes, lambda: file.part[0] if file.part else 0, batches)


def read_rows_of_function(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each mapping that the user's function yields for the file is a document."""
    for number, row in enumerate(call_function(file, path)):
        yield read_mapping(file, number, row, largest_bytes)


READERS: dict[str, Callable[[InputFile, Path, int], Iterator[Document | Rejected]]] = {
    "text": read_text,
    "python": read_python,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def call_function(file: InputFile, path: Path) -> Iterable[Any]:
    """What the user's function gives for a local path. Raises UserError when it is not the one the build was planned with."""
    function, sha256 = load_function(file.kind)
    if sha256 != file.function_sha256:
        raise UserError(f"data source {file.source!r}: {file.kind} was changed while the build ran; start the build again.")
    return function(path, **{key: json.loads(value) for key, value in file.settings})


def read_mapping(file: InputFile, position: int, row: Any, largest_bytes: int) -> Document | Rejected:
    """A row that is a Python object (of a function or of a hub data set) to its document."""
    shown = repr(row)[:SHOWN_BYTES].encode("utf-8", "backslashreplace")
    if not isinstance(row, Mapping):
        return reject(file, position, None, "not_an_object", f"found a {type(row).__name__}", shown)
    item = _read_row(file, position, None, dict(row), shown, None, is_json=False)
    if isinstance(item, Document) and len(item.text) > largest_bytes // 4 and (size := len(item.text.encode())) > largest_bytes:
        return reject(file, position, None, "too_large", f"{size} bytes, more than {largest_bytes}", item.text[:SHOWN_BYTES].encode())
    return item


def first_fields(file: InputFile, stream: BinaryIO, largest_bytes: int) -> list[str] | None:
    """The fields of a file's first row; None where the file is text, has no row, or its first row cannot be read."""
    try:
        if file.kind == "parquet":
            return pyarrow.parquet.read_schema(stream).names
        if file.kind == "arrow":
            return pyarrow.ipc.open_stream(stream).schema.names
        if file.kind != "jsonl":
            return None
        blocks = unpack_stream(stream, file.packed) if file.packed else iter(lambda: stream.read(BLOCK_BYTES), b"")
        for start, line in split_lines(blocks, 0, largest_bytes):
            if line and not line.isspace():
                row = json.loads(line.removeprefix(codecs.BOM_UTF8) if start == 0 else line)
                return list(row) if isinstance(row, dict) else None
    except (ValueError, RecursionError, OSError, pyarrow.ArrowException, *DAMAGES):
        pass  # the reader itself will reject it, with its reason
    return None


def split_jsonl(file: InputFile, work_unit_bytes: int) -> list[InputFile]:
    """A file of lines in ranges of `work_unit_bytes`, from its size alone; a compressed one stays whole."""
    if file.packed or file.num_bytes <= work_unit_bytes:
        return [file]
    starts = range(0, file.num_bytes, work_unit_bytes)
    ranges = [(start, min(start + work_unit_bytes, file.num_bytes)) for start in starts]
    return [replace(file, part=(start, behind), part_bytes=behind - start) for start, behind in ranges]


def split_parquet(file: InputFile, stream: BinaryIO, work_unit_bytes: int) -> list[InputFile]:
    """A parquet file in ranges of row groups of about `work_unit_bytes`; a damaged one stays whole. Raises OSError."""
    try:
        metadata = pyarrow.parquet.read_metadata(stream)
    except pyarrow.ArrowException:
        return [file]  # the reader will reject it, with its reason
    parts: list[InputFile] = []
    first = size = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        more = sum(row_group.column(column).total_compressed_size for column in range(row_group.num_columns))
        if group > first and size + more > work_unit_bytes:
            parts.append(replace(file, part=(first, group), part_bytes=size))
            first, size = group, 0
        size += more
    return [*parts, replace(file, part=(first, metadata.num_row_groups), part_bytes=size)] if parts else [file]


def split_arrow(file: InputFile, path: Path, work_unit_bytes: int) -> list[InputFile]:
    """An arrow file in ranges of rows of about `work_unit_bytes`; a damaged one stays whole."""
    try:
        num_rows = count_arrow_rows(path)
    except (pyarrow.ArrowException, OSError, EOFError):
        return [file]  # the reader will reject it, with its reason
    step = max(1, num_rows * work_unit_bytes // file.num_bytes)
    ranges = [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    parts = [replace(file, part=(start, behind), part_bytes=file.num_bytes * (behind - start) // num_rows) for start, behind in ranges]
    return parts if len(parts) > 1 else [file]


def count_arrow_rows(path: Path) -> int:
    """Rows of an arrow stream. Raises ArrowException, OSError or EOFError for a damaged one."""
    with path.open("rb") as stream:
        stream.seek(-min(len(ARROW_END), path.stat().st_size), os.SEEK_END)
        if stream.read() != ARROW_END:  # arrow takes a stream that is cut between two batches for a whole one
            raise EOFError("the arrow stream ends before its end mark")
    with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
        return sum(batch.num_rows for batch in batches)


def hash_input(file: InputFile, path: Path) -> tuple[str, int] | None:
    """SHA-256 and number of the bytes that the file's part stands for; over all parts of a file they are its bytes once.

    A range of jsonl stands for its lines; the first range of a parquet or arrow file for the whole of it, and those
    behind for nothing (None); a megatron pair for the .idx and then the .bin. Raises OSError.
    """
    if file.kind == "megatron":
        return _hash_blocks(block for one in (index_path(path), path) for block in _range_blocks(one, 0, one.stat().st_size))
    size = path.stat().st_size
    if file.part is None or (file.kind != "jsonl" and file.part[0] == 0):
        return _hash_blocks(_range_blocks(path, 0, size))
    if file.kind != "jsonl":
        return None
    with path.open("rb") as stream:
        first, behind = find_lines(file.part, size, reading_from(stream))
    return _hash_blocks(_range_blocks(path, first, behind))


def index_path(path: Path) -> Path:
    """The .idx that stands beside a .bin."""
    return path.with_name(path.name.removesuffix(".bin") + ".idx")


def find_lines(part: tuple[int, int] | None, num_bytes: int, read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """The half-open range of bytes of the lines that start in `part`; `read(start, stop)` gives a file's bytes."""
    if part is None:
        return 0, num_bytes
    first = find_line_start(part[0], part[1], read)
    if first >= part[1]:  # a line that starts before this part goes on behind it
        return part[1], part[1]
    return first, find_line_start(part[1], num_bytes, read)


def find_line_start(at: int, limit: int, read: Callable[[int, int], bytes]) -> int:
    """The first byte from `at` on where a line starts; `limit` where none starts before it."""
    if at == 0:
        return 0
    position = at - 1
    while position < limit and (block := read(position, min(position + BLOCK_BYTES, limit))):
        if (found := block.find(b"\n")) >= 0:
            return position + found + 1
        position += len(block)
    return limit


def reading_from(stream: BinaryIO) -> Callable[[int, int], bytes]:
    """`read(start, stop)` of a local file that is open."""

    def read(start: int, stop: int) -> bytes:
        stream.seek(start)
        return stream.read(stop - start)

    return read


def split_lines(blocks: Iterable[bytes], offset: int, largest_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Where each line starts and its content without the line end; of a longer line its first `largest_bytes` + 1 or more.

    offset: where the first block starts, in bytes.
    """
    pieces: list[bytes] = []  # of the line that the blocks before did not end
    size = 0  # its bytes so far, also those that are not kept
    for block in blocks:
        lines = block.split(b"\n")
        rest = lines.pop()
        for line in lines:
            length = len(line)
            if size:
                line = b"".join((*pieces, line))
                length += size
                pieces, size = [], 0
            yield offset, line.removesuffix(b"\r")
            offset += length + 1
        if rest:
            if size <= largest_bytes + 1:
                pieces.append(rest)
            size += len(rest)
    if size:
        yield offset, b"".join(pieces).removesuffix(b"\r")


def unpack(path: Path, packed: str) -> Iterator[bytes]:
    """The content of a .gz or .zst file in blocks of bounded size. Raises one of `DAMAGES`, at the latest at its end; OSError."""
    with path.open("rb") as stream:
        if packed == ".zst":
            _check_zstd_frames(stream, path.stat().st_size)
            stream.seek(0)
        yield from unpack_stream(stream, packed)


def unpack_stream(stream: BinaryIO, packed: str) -> Iterator[bytes]:
    """As `unpack`, from an open file; that a zstd frame is cut is not noticed here."""
    return _unpack_zstd(stream) if packed == ".zst" else _unpack_gzip(stream)


def keep_blocks(blocks: Iterable[bytes], kept: list[bytes]) -> Iterator[bytes]:
    """Hand blocks on; at the end `kept` holds them all, or none where they are more than `KEPT_BYTES`."""
    size = 0
    for block in blocks:
        size += len(block)
        if size <= KEPT_BYTES:
            kept.append(block)
        else:
            kept.clear()
        yield block


def reject(
    file: InputFile, position: int, offset: int | None, reason: str, detail: str, content: bytes, line: int | None = None
) -> Rejected:
    """The rejection of one document of a file; `content`: the bytes at `offset`, of which the first are shown."""
    return Rejected(file.source, file.name, position, offset, reason, detail[:300], show_bytes(content), line)


def check_text(file: InputFile, position: int, offset: int | None, text: str) -> Document | Rejected:
    """The document of a text that was decoded, unless it is empty, or has half characters (utf-7 can spell them)."""
    if not text:
        return reject(file, position, offset, "empty", "a text without a character", b"")
    if not is_unicode(text):
        return reject(file, position, offset, "lone_surrogate", "half a character", text.encode("utf-8", "backslashreplace"))
    return Document(file.source, file.name, position, text)


def decode_text(file: InputFile, position: int, offset: int | None, content: bytes) -> Document | Rejected:
    """The document of bytes in UTF-8; a byte order mark is no part of it."""
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        # The error counts from behind the byte order mark.
        start = error.start + len(content) - len(error.object)
        place = None if offset is None else offset + start
        return reject(file, position, place, "bad_utf8", f"not utf-8: {error.reason}", content[start:])
    return check_text(file, position, offset, text)


def name_of(value: Any) -> str | None:
    """A document's name from its id field: text, or a whole number in digits; else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and is_unicode(value) else None


def kept_metadata(row: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The fields of a row as JSON holds them: dates as ISO text, NaN as null; what it cannot hold is left out."""
    kept: dict[str, Any] = {}
    for field in fields:
        if field in row:
            value = row[field]
            try:
                kept[field] = orjson.loads(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
            except (TypeError, ValueError):  # bytes, half a character, a whole number beyond 64 bits
                continue
    return kept


def _parse_slowly(file: InputFile, start: int, content_start: int, line: bytes, number: int | None) -> Document | Rejected:
    """A line that orjson refused: Python's json takes it after all, or tells why not."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return reject(file, start, content_start + error.start, "bad_utf8", f"not utf-8: {error.reason}", line[error.start :], number)
    except (ValueError, RecursionError) as error:
        return reject(file, start, start, "bad_json", str(error), line, number)
    return _read_row(file, start, start, row, line, number, is_json=False)


def _read_row(
    file: InputFile, position: int, offset: int | None, row: Any, content: bytes, line: int | None, is_json: bool = True
) -> Document | Rejected:
    """A row to its document. is_json: it comes from orjson, which lets no half characters through."""
    if not isinstance(row, dict):
        return reject(file, position, offset, "not_an_object", f"found a {type(row).__name__}", content, line)
    if file.text_field not in row:
        return reject(file, position, offset, "missing_field", f"no {file.text_field!r} among {sorted(map(str, row))}", content, line)
    text = row[file.text_field]
    if not isinstance(text, str):
        return reject(file, position, offset, "not_text", f"{file.text_field!r} is a {type(text).__name__}", content, line)
    if not text:
        return reject(file, position, offset, "empty", "a text without a character", b"", line)
    if not is_json and not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return reject(file, position, offset, "lone_surrogate", f"half a character: {text[error.start]!r}", content, line)
    name = None if file.id_field is None else name_of(row.get(file.id_field))
    if is_json:
        metadata = {field: row[field] for field in file.metadata_fields if field in row}
    else:
        metadata = kept_metadata(row, file.metadata_fields)
    return Document(file.source, file.name, position, text, name, metadata)


def is_unicode(text: str) -> bool:
    """Whether a text has no half characters, which UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(SHOWN_BYTES)


def _read_up_to(path: Path, largest_bytes: int) -> bytes | None:
    with path.open("rb") as stream:
        content = stream.read(largest_bytes + 1)
    return None if len(content) > largest_bytes else content


def _range_blocks(path: Path, first: int, behind: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(first)
        while first < behind and (block := stream.read(min(BLOCK_BYTES, behind - first))):
            first += len(block)
            yield block


def _hash_blocks(blocks: Iterable[bytes]) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    for block in blocks:
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _unpack_gzip(stream: BinaryIO) -> Iterator[bytes]:
    member = None
    num_members = 0
    while portion := stream.read(PACKED_BLOCK_BYTES):
        while portion:
            if member is None:
                portion = portion.lstrip(b"\0") if num_members else portion  # members may be padded
                if not portion:
                    break
                member = zlib.decompressobj(wbits=31)  # a gzip header and its checksum are wanted
                num_members += 1
            yield member.decompress(portion, BLOCK_BYTES)
            portion = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None or not num_members:
        raise EOFError("the gzip file ends before its last member does")


def _unpack_zstd(stream: BinaryIO) -> Iterator[bytes]:
    with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=False) as unpacked:
        while block := unpacked.read(BLOCK_BYTES):
            yield block


def _check_zstd_frames(stream: BinaryIO, num_bytes: int) -> None:
    """Raises EOFError when the file ends within a frame, which the library takes for the end of the content.

    It goes from block header to block header (RFC 8878, 3.1.1) without unpacking.
    """
    cut = EOFError("the zstd file ends before its last frame does")
    position = 0
    while position < num_bytes or position == 0:
        stream.seek(position)
        start = stream.read(8)
        if len(start) < 8:
            raise cut
        if start[:4] != ZSTD_MAGIC:
            if 0x50 <= start[0] <= 0x5F and start[1:4] == b"\x2a\x4d\x18":  # a frame to skip
                position += 8 + int.from_bytes(start[4:8], "little")
                continue
            return  # no frame at all: unpacking says so
        descriptor = start[4]
        is_single = descriptor >> 5 & 1
        content_size = (is_single, 2, 4, 8)[descriptor >> 6]
        position += 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3] + content_size
        is_last = False
        while not is_last:
            stream.seek(position)
            header = stream.read(3)
            if len(header) < 3:
                raise cut
            number = int.from_bytes(header, "little")
            is_last = bool(number & 1)
            position += 3 + (1 if number >> 1 & 3 == 1 else number >> 3)
        position += 4 * (descriptor >> 2 & 1)
    if position > num_bytes:
        raise cut


def _columns(file: InputFile, schema: pyarrow.Schema) -> list[str]:
    wanted = [file.text_field, *filter(None, [file.id_field]), *file.metadata_fields]
    return [name for name in dict.fromkeys(wanted) if name in schema.names]


def _read_table(
    file: InputFile,
    path: Path,
    largest_bytes: int,
    first_row: Callable[[], int],
    batches: Callable[[], Iterator[pyarrow.RecordBatch]],
) -> Iterator[Document | Rejected]:
    """Rows of batches; all are read before the first document enters, so that a damaged file is known by then."""
    row = 0
    is_first = file.part is None or file.part[0] == 0  # what is wrong with a whole file is told once, however it is split
    kept: list[pyarrow.RecordBatch] | None = []
    size = 0
    try:
        row = first_row()
        with path.open("rb") as stream:
            found = pyarrow.parquet.read_schema(stream).names if file.kind == "parquet" else pyarrow.ipc.open_stream(stream).schema.names
        if file.text_field not in found:
            if is_first:
                yield reject(file, row, None, "missing_field", f"no column {file.text_field!r} among {found}", b"")
            return
        is_text = True
        for batch in batches():
            is_text = is_text and _is_text(batch.column(file.text_field).type)
            size += batch.nbytes
            if kept is not None and size <= KEPT_BYTES:
                kept.append(batch)
            else:
                kept = None
    except (FileNotFoundError, PermissionError):
        raise
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        yield reject(file, row, None, "damaged_file", str(error), _start_of(path))
        return
    if not is_text:
        if is_first:
            yield reject(file, row, None, "not_text", f"the column {file.text_field!r} does not hold text", b"")
        return
    for batch in batches() if kept is None else kept:
        names, metadata = _read_beside(file, batch)
        # As bytes: arrow does not check that text is UTF-8, and would raise for the whole batch.
        for number, content in enumerate(batch.column(file.text_field).cast(pyarrow.large_binary()).to_pylist(), row):
            if content is None:
                yield reject(file, number, None, "not_text", f"{file.text_field!r} is null", b"")
            elif len(content) > largest_bytes:
                yield reject(file, number, None, "too_large", f"{len(content)} bytes, more than {largest_bytes}", content)
            else:
                item = decode_text(file, number, None, content)
                if isinstance(item, Document) and (names or metadata):
                    name = names[number - row] if names else None
                    item = replace(item, name=name, metadata=metadata[number - row] if metadata else {})
                yield item
        row += batch.num_rows


def _read_beside(file: InputFile, batch: pyarrow.RecordBatch) -> tuple[list[str | None], list[dict[str, Any]]]:
    """Names and metadata of a batch's rows; empty lists where none are asked for."""

    def values(name: str) -> list[Any]:
        try:
            return batch.column(name).to_pylist()
        except UnicodeDecodeError:  # one value's bytes make the whole column unreadable, so each is asked for itself
            return [_value_or_bytes(scalar) for scalar in batch.column(name)]

    names: list[str | None] = []
    if file.id_field in batch.schema.names:
        names = [name_of(value) for value in values(str(file.id_field))]
    columns = {name: values(name) for name in file.metadata_fields if name in batch.schema.names}
    if not columns:
        return names, []
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return names, [kept_metadata(row, columns) for row in rows]


def _value_or_bytes(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""  # which JSON cannot hold


def _is_text(kind: pyarrow.DataType) -> bool:
    # A dictionary of text is text too: parquet files of pandas categories have them.
    if pyarrow.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
