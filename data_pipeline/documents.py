"""The two records that leave a source: a document that is kept, and a rejection that says why one is not.

Every row of every input becomes exactly one of them, so that read == kept + quarantined can be asserted.
"""

import hashlib
from dataclasses import dataclass

HASH_HEX_DIGITS = 24  # 96 bits: among 10^12 documents, two share an id with a chance of 10^-5
SHOWN_BYTES = 32


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    source: str
    """The source's name in the run file."""
    file: str
    """Path relative to the source's root, with `/`."""
    position: int
    """Line of a jsonl file, from 1; row of a parquet or arrow file, from 0; 0 where a file is a document."""
    text: str

    @property
    def document_id(self) -> str:
        """Stable name of the document: it depends on where the text stands, not on how it was built."""
        return identify_document(self.source, self.file, self.position)


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used, and what a person needs to find and mend it."""

    source: str
    file: str
    position: int
    """As in `Document`; for a file that is damaged as a whole, 0."""
    offset: int | None
    """Byte in the (decompressed) file where the document starts, or where the bad bytes are; None for a table's row."""
    reason: str
    """One word of the list in `formats.py`, for counting."""
    detail: str
    first_bytes: str
    """The first bytes at `offset`, in hexadecimal."""


def identify_document(source: str, file: str, position: int) -> str:
    """The first 96 bits of SHA-256 over (source, file, position), in hexadecimal."""
    return hashlib.sha256(f"{source}\0{file}\0{position}".encode()).hexdigest()[:HASH_HEX_DIGITS]


def place_document(document_id: str) -> float:
    """A document's place in [0, 1), uniform and fixed by its id: below the held-out fraction it is held out."""
    # 52 bits: every such fraction is exact in a float, so 1.0 is never reached by rounding.
    return int(document_id[:13], 16) / 16**13


def show_bytes(content: bytes) -> str:
    """The first bytes as hexadecimal pairs, for a quarantine record."""
    return content[:SHOWN_BYTES].hex(" ")
