"""Archives of the web to documents: WET records as they are, HTML pages by their extracted text.

In: a WARC or WET file, plain, .gz or .zst. Out: a document for each `conversion` record and each `response` record of an
HTML page, with its url, date and record_id as metadata; other records are no documents. A file that is cut or that does not
follow the format is rejected whole, before its first document. fastwarc decodes HTTP (with warcio it takes three to five
times as long); which record ends where is found here, as fastwarc takes a header that is cut for an empty record.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from configs.errors import UserError
from data_pipeline.documents import SHOWN_BYTES, Document, Rejected
from data_pipeline.input_file import InputFile
from data_pipeline.packed import BLOCK_BYTES, DAMAGES, keep_blocks, unpack, unpack_stream
from data_pipeline.rows import check_text, decode_text, is_unicode, kept_metadata, name_of, reject

HEADER_BYTES = 1 << 20
HTML = ("text/html", "application/xhtml+xml")
FIELDS = {"url": "warc-target-uri", "date": "warc-date", "record_id": "warc-record-id"}
HTTP_RESPONSE = re.compile(r"application/http(\s*;.*)?", re.IGNORECASE)


class WebRecord(NamedTuple):
    """A record of an archive."""

    offset: int
    """Byte of the unpacked file where it starts."""
    head: bytes
    """Its header, with the empty line behind it."""
    headers: dict[str, str]
    """By lower-case name."""
    content: bytes
    """Its first bytes, as many as were asked for."""
    num_bytes: int
    """Of the whole content."""

    @property
    def kind(self) -> str:
        """WARC-Type: conversion, response, ..."""
        return self.headers.get("warc-type", "").lower()


def read_warc(file: InputFile, path: Path, largest_bytes: int) -> Iterator[Document | Rejected]:
    """Every document of an archive; its position is its record's number from 0, records that are no documents included.

    Raises OSError when the file is gone or may not be read; UserError when pages are to be read and the extra is missing.
    """
    kept: list[bytes] = []
    try:
        for _ in split_records(keep_blocks(_blocks(file, path), kept), 0):
            pass
    except (ValueError, *DAMAGES) as error:
        with path.open("rb") as stream:
            yield reject(file, 0, 0, "damaged_file", str(error), stream.read(SHOWN_BYTES))
        return
    for number, record in enumerate(split_records(kept or _blocks(file, path), largest_bytes)):
        is_page = record.kind == "response" and HTTP_RESPONSE.fullmatch(record.headers.get("content-type", ""))
        if record.kind != "conversion" and not is_page:
            continue
        if record.num_bytes > largest_bytes:
            detail = f"{record.num_bytes} bytes, more than {largest_bytes}"
            yield reject(file, number, record.offset, "too_large", detail, record.head)
            continue
        item = _read_page(file, number, record, largest_bytes) if is_page else decode_text(file, number, record.offset, record.content)
        if isinstance(item, Document):
            fields = record_fields(record)
            name = None if file.id_field is None else name_of(_field(fields, file.id_field))
            asked = {field: value for field in file.metadata_fields if (value := _field(fields, field)) is not None}
            metadata = kept_metadata(always := {field: fields[field] for field in FIELDS if field in fields}, always)
            item = Document(item.source, item.file, item.position, item.text, name, metadata | kept_metadata(asked, asked))
        if item is not None:
            yield item


def first_record_fields(file: InputFile, stream: BinaryIO) -> list[str] | None:
    """What the first document of an archive can give as id and metadata; None where there is none or it cannot be read."""
    blocks = unpack_stream(stream, file.packed) if file.packed else iter(lambda: stream.read(BLOCK_BYTES), b"")
    try:
        for record in split_records(blocks, 0):
            if record.kind in ("conversion", "response"):
                return list(record_fields(record))
    except (ValueError, OSError, *DAMAGES):
        pass  # the reader itself will reject it, with its reason
    return None


def record_fields(record: WebRecord) -> dict[str, str]:
    """The fields of a record: url, date, record_id, and its header's by their lower-case names."""
    named = {field: record.headers[header].strip("<>") for field, header in FIELDS.items() if header in record.headers}
    return named | record.headers


def split_records(blocks: Iterable[bytes], largest_bytes: int) -> Iterator[WebRecord]:
    """The records of an unpacked archive; of each content at most `largest_bytes`. Raises ValueError or EOFError for damage."""
    stream = io.BufferedReader(BlockStream(iter(blocks)), BLOCK_BYTES)
    offset = 0
    while line := stream.readline(HEADER_BYTES):
        if line in (b"\r\n", b"\n"):  # two of them stand behind each record
            offset += len(line)
            continue
        if not line.startswith(b"WARC/"):
            raise ValueError(f"byte {offset}: found {line[:40]!r}, wanted a record that starts with WARC/")
        head, headers = _read_head(stream, line, offset)
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise ValueError(f"byte {offset}: a record with the Content-Length {length[:40]!r}")
        num_bytes = left = int(length)
        content = stream.read(min(left, largest_bytes))
        left -= len(content)
        while left and (skipped := stream.read(min(left, BLOCK_BYTES))):
            left -= len(skipped)
        if left:
            raise EOFError(f"the last record ends {left} bytes early")
        yield WebRecord(offset, head, headers, content, num_bytes)
        offset += len(head) + num_bytes


class BlockStream(io.RawIOBase):
    """Blocks of bytes as a stream that can be read once."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end. Raises what the blocks raise."""
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def load_extractor() -> tuple[Callable[..., str], Callable[..., str]]:
    """resiliparse's functions for the text of a page and for its encoding. Raises UserError when it is not installed."""
    try:
        text, encoding = import_module("resiliparse.extract.html2text"), import_module("resiliparse.parse.encoding")
    except ImportError:
        raise UserError(
            "HTML pages of a WARC file need the package resiliparse, which is not installed; install the extra `web` "
            "(pip install 'pretrain[web]'), or use WET files, which hold text."
        ) from None
    return text.extract_plain_text, encoding.detect_encoding


def _blocks(file: InputFile, path: Path) -> Iterator[bytes]:
    if file.packed:
        yield from unpack(path, file.packed)
        return
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _read_head(stream: BinaryIO, line: bytes, offset: int) -> tuple[bytes, dict[str, str]]:
    """The rest of a record's header, and its fields."""
    head = [line]
    headers: dict[str, str] = {}
    name = ""
    size = len(line)
    while (line := stream.readline(HEADER_BYTES)) not in (b"\r\n", b"\n"):
        size += len(line)
        if not line.endswith(b"\n"):
            raise EOFError(f"byte {offset}: the file ends within a record's header, or the header has no end")
        if size > HEADER_BYTES:
            raise ValueError(f"byte {offset}: a header of more than {HEADER_BYTES} bytes")
        head.append(line)
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if text[:1] in (" ", "\t") and name:  # the line before goes on
            headers[name] += " " + text.strip()
            continue
        name, _, value = text.partition(":")
        name = name.strip().lower()
        headers[name] = value.strip()
    return b"".join((*head, line)), headers


def _field(fields: dict[str, str], name: str) -> str | None:
    return fields.get(name, fields.get(name.lower()))


def _read_page(file: InputFile, number: int, record: WebRecord, largest_bytes: int) -> Document | Rejected | None:
    """The text of an HTML page; None for a response of another type."""
    from fastwarc.warc import WarcRecord

    try:
        page = WarcRecord.from_bytes(record.head + record.content)
        page.parse_http(auto_decode="all")
        if page.http_content_type not in HTML or page.reader is None:
            return None
        content = page.reader.read(largest_bytes + 1)
        charset = page.http_charset
    except OSError as error:
        return reject(file, number, record.offset, "bad_encoding", f"the HTTP response cannot be decoded: {error}", record.content)
    if len(content) > largest_bytes:
        return reject(file, number, record.offset, "too_large", f"more than {largest_bytes} bytes when unpacked", content)
    extract_text, detect_encoding = load_extractor()
    try:
        html = content.decode(charset or detect_encoding(content, from_html_meta=True))
    except (ValueError, LookupError):  # a UnicodeError is a ValueError; so is a charset with a NUL in its name
        try:  # the server's word was wrong; the page's own, or what its bytes look like
            html = content.decode(detect_encoding(content, from_html_meta=True))
        except (ValueError, LookupError) as error:
            return reject(file, number, record.offset, "bad_encoding", str(error), content)
    if not is_unicode(html):
        return reject(file, number, record.offset, "lone_surrogate", f"half a character, by the charset {charset}", content)
    return check_text(file, number, record.offset, extract_text(html, main_content=True))
