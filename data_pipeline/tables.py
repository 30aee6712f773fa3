"""Parquet files and arrow streams, whose rows have the text in one column.

In: a parquet or arrow `InputFile` and the local path where it (or a copy of it) lies. Out: a document or a rejection for each
row; the parts of a file that is large. A damaged file, or part of one, is rejected before its first document.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from data_pipeline.documents import Document, Rejected
from data_pipeline.input_file import InputFile
from data_pipeline.packed import KEPT_BYTES
from data_pipeline.rows import decode_text, kept_metadata, name_of, reject, start_of

ROWS_PER_BATCH = 256
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


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
        yield reject(file, row, None, "damaged_file", str(error), start_of(path))
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
