"""For tests that read single files: what is known of a file, what came out of it, lines of JSON and how to pack them."""

import gzip
import os
from pathlib import Path

import zstandard

from data_pipeline.documents import Document
from data_pipeline.formats import read_file
from data_pipeline.input_file import InputFile

LARGEST = 1000
THOROUGH = os.environ.get("FAULTS") == "1"
LINES = b"".join(b'{"text": "document %d"}\n' % number for number in range(500))
TEXTS = [f"document {number}" for number in range(500)]
PACKERS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
IDENTIFIED = {"id_field": "id", "metadata_fields": ("url", "date", "score")}


def describe(path: Path, kind, part=None, id_field=None, metadata_fields=()) -> InputFile:
    status = path.stat()
    return InputFile(
        source="mine",
        root=str(path.parent),
        name=path.name,
        kind=kind,
        num_bytes=status.st_size,
        version=str(status.st_mtime_ns),
        text_field="text",
        id_field=id_field,
        metadata_fields=tuple(metadata_fields),
        part=part,
        part_bytes=status.st_size,
    )


def outcome(items):
    """Texts of the kept, (reason, position, offset) of the rejected."""
    return [item.text if isinstance(item, Document) else (item.reason, item.position, item.offset) for item in items]


def read(path: Path, kind, largest=LARGEST, part=None):
    return outcome(read_file(describe(path, kind, part), path, largest))
