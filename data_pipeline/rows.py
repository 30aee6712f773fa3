"""A row or a text of a file to its document, or to the reason why it is none; the same for every format.

In: a row as a mapping, or a text decoded or in bytes, and where it stands. Out: a `Document` or a `Rejected`. Nothing is
mended. A value of metadata that JSON cannot hold is left out.

Reasons: not_an_object, missing_field, not_text, lone_surrogate, empty, bad_utf8, too_large (`formats.py` lists them all).
"""

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.documents import SHOWN_BYTES, Document, Rejected, show_bytes
from data_pipeline.input_file import InputFile


def read_mapping(file: InputFile, position: int, row: Any, largest_bytes: int) -> Document | Rejected:
    """A row that is a Python object (of a function or of a hub data set) to its document."""
    shown = repr(row)[:SHOWN_BYTES].encode("utf-8", "backslashreplace")
    if not isinstance(row, Mapping):
        return reject(file, position, None, "not_an_object", f"found a {type(row).__name__}", shown)
    item = read_row(file, position, None, dict(row), shown, None, is_json=False)
    if isinstance(item, Document) and len(item.text) > largest_bytes // 4 and (size := len(item.text.encode())) > largest_bytes:
        return reject(file, position, None, "too_large", f"{size} bytes, more than {largest_bytes}", item.text[:SHOWN_BYTES].encode())
    return item


def read_row(
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


def check_text(file: InputFile, position: int, offset: int | None, text: str) -> Document | Rejected:
    """The document of a text that was decoded, unless it is empty, or has half characters (utf-7 can spell them)."""
    if not text:
        return reject(file, position, offset, "empty", "a text without a character", b"")
    if not is_unicode(text):
        return reject(file, position, offset, "lone_surrogate", "half a character", text.encode("utf-8", "backslashreplace"))
    return Document(file.source, file.name, position, text)


def reject(
    file: InputFile, position: int, offset: int | None, reason: str, detail: str, content: bytes, line: int | None = None
) -> Rejected:
    """The rejection of one document of a file; `content`: the bytes at `offset`, of which the first are shown."""
    return Rejected(file.source, file.name, position, offset, reason, detail[:300], show_bytes(content), line)


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


def is_unicode(text: str) -> bool:
    """Whether a text has no half characters, which UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def start_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(SHOWN_BYTES)
