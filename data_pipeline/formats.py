"""One input file to documents: text, Python source, JSON lines (plain, .gz, .zst), parquet, arrow, a user's own function.

In: an `InputFile` and the local path where it (or a copy of it) lies. Out: one `Document` or one `Rejected` for each
document it holds, in the file's order, in memory bounded by the largest document; the hash of what a part stands for. Bytes
are decoded strictly: what cannot be read is named, never mended or dropped.

Reasons: bad_utf8, bad_encoding (a Python file's declaration, or that of a web page, is unknown or wrong), bad_json,
not_an_object, missing_field, not_text, lone_surrogate, too_large, empty, damaged_file (of such a file, or part of a file
that is split, no document enters at all).
"""

import codecs
import hashlib
import io
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from configs.errors import UserError
from configs.functions import load_function
from data_pipeline.documents import Document, Rejected
from data_pipeline.input_file import InputFile, index_path
from data_pipeline.json_lines import find_lines, range_blocks, read_jsonl, reading_from, split_lines
from data_pipeline.packed import BLOCK_BYTES, DAMAGES, unpack_stream
from data_pipeline.rows import check_text, decode_text, read_mapping, reject, start_of
from data_pipeline.tables import read_arrow, read_parquet


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
        yield reject(file, 0, 0, "too_large", f"more than {largest_bytes} bytes", start_of(path))
        return
    yield decode_text(file, 0, 0, content)


def read_python(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """A file is a document in the encoding it declares (PEP 263), UTF-8 without a declaration."""
    content = _read_up_to(path, largest_bytes)
    if content is None:
        yield reject(file, 0, 0, "too_large", f"more than {largest_bytes} bytes", start_of(path))
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


def hash_input(file: InputFile, path: Path) -> tuple[str, int] | None:
    """SHA-256 and number of the bytes that the file's part stands for; over all parts of a file they are its bytes once.

    A range of jsonl stands for its lines; the first range of a parquet or arrow file for the whole of it, and those
    behind for nothing (None); a megatron pair for the .idx and then the .bin. Raises OSError.
    """
    if file.kind == "megatron":
        return _hash_blocks(block for one in (index_path(path), path) for block in range_blocks(one, 0, one.stat().st_size))
    size = path.stat().st_size
    if file.part is None or (file.kind != "jsonl" and file.part[0] == 0):
        return _hash_blocks(range_blocks(path, 0, size))
    if file.kind != "jsonl":
        return None
    with path.open("rb") as stream:
        first, behind = find_lines(file.part, size, reading_from(stream))
    return _hash_blocks(range_blocks(path, first, behind))


def _read_up_to(path: Path, largest_bytes: int) -> bytes | None:
    with path.open("rb") as stream:
        content = stream.read(largest_bytes + 1)
    return None if len(content) > largest_bytes else content


def _hash_blocks(blocks: Iterable[bytes]) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    for block in blocks:
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size
