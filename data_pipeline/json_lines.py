"""Files of lines, each a JSON object with the text in one field: whole, packed, or only the lines that start in a range of bytes.

In: a jsonl `InputFile` (plain, .gz, .zst) and the local path where it (or a copy of it) lies. Out: a document or a rejection
for each line, in memory bounded by the longest line; the parts of a file that is large, and the bytes of a part's lines.

A line of JSON is accepted when orjson accepts it or Python's own json does (which also takes NaN, and half a character in a
field that is not asked for). Of equal keys the last one counts.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import orjson

from data_pipeline.documents import Document, Rejected
from data_pipeline.input_file import InputFile
from data_pipeline.packed import BLOCK_BYTES, DAMAGES, keep_blocks, unpack
from data_pipeline.rows import read_row, reject, start_of


def read_jsonl(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Each line is a JSON object with the text in one field; a line of nothing but white space is no document."""
    first = 0
    if file.packed:
        kept: list[bytes] = []
        try:
            for _ in keep_blocks(unpack(path, file.packed), kept):
                pass
        except DAMAGES as error:
            yield reject(file, 0, 0, "damaged_file", str(error), start_of(path))
            return
        blocks = iter(kept) if kept else unpack(path, file.packed)
    else:
        with path.open("rb") as stream:
            first, behind = find_lines(file.part, path.stat().st_size, reading_from(stream))
        blocks = range_blocks(path, first, behind)
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
        yield read_row(file, start, start, row, line, number)


def split_jsonl(file: InputFile, work_unit_bytes: int) -> list[InputFile]:
    """A file of lines in ranges of `work_unit_bytes`, from its size alone; a compressed one stays whole."""
    if file.packed or file.num_bytes <= work_unit_bytes:
        return [file]
    starts = range(0, file.num_bytes, work_unit_bytes)
    ranges = [(start, min(start + work_unit_bytes, file.num_bytes)) for start in starts]
    return [replace(file, part=(start, behind), part_bytes=behind - start) for start, behind in ranges]


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


def reading_from(stream: BinaryIO) -> Callable[[int, int], bytes]:
    """`read(start, stop)` of a local file that is open."""

    def read(start: int, stop: int) -> bytes:
        stream.seek(start)
        return stream.read(stop - start)

    return read


def range_blocks(path: Path, first: int, behind: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(first)
        while first < behind and (block := stream.read(min(BLOCK_BYTES, behind - first))):
            first += len(block)
            yield block


def _parse_slowly(file: InputFile, start: int, content_start: int, line: bytes, number: int | None) -> Document | Rejected:
    """A line that orjson refused: Python's json takes it after all, or tells why not."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return reject(file, start, content_start + error.start, "bad_utf8", f"not utf-8: {error.reason}", line[error.start :], number)
    except (ValueError, RecursionError) as error:
        return reject(file, start, start, "bad_json", str(error), line, number)
    return read_row(file, start, start, row, line, number, is_json=False)
