"""What leaves a source: a document, or a rejection that says why there is none; and what a rule drops.

Every row of every input becomes exactly one of these, so that read == kept + dropped + quarantined can be asserted.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HASH_HEX_DIGITS = 24  # 96 bits: among 10^12 documents, two share an id with a chance of 10^-5
SHOWN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    source: str
    """The source's name in the run file."""
    file: str
    """Path relative to the source's root, with `/`."""
    position: int
    """Where it stands in its file: the byte (after unpacking) where its line starts in jsonl, the number of its row from 0 in
    parquet and arrow, of its record from 0 in WARC and in what a function of the user's yields; shard * 2**32 + row in a
    streamed data set; 0 where a file is a document."""
    text: str
    name: str | None = None
    """The value of the source's `id_field`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The values of the source's `metadata_fields`."""

    @property
    def document_id(self) -> str:
        """Stable name of the document: it depends on where the text stands, not on how it was built."""
        return identify_document(self.source, self.file, self.position)


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A document of a source that was tokenised elsewhere."""

    source: str
    file: str
    position: int
    """Its number in the shard, from 0."""
    tokens: np.ndarray[Any, Any]
    """Ids, 1-D, as they were found."""

    @property
    def document_id(self) -> str:
        """As in `Document`."""
        return identify_document(self.source, self.file, self.position)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that cannot be used, and what a person needs to find and mend it."""

    source: str
    file: str
    position: int
    """As in `Document`; for a file that is damaged as a whole, 0."""
    offset: int | None
    """Byte in the (unpacked) file where the document starts, or where the bad bytes are; None for a table's row."""
    reason: str
    """One word of the list in `formats.py`, for counting."""
    detail: str
    first_bytes: str
    """The first bytes at `offset`, in hexadecimal."""
    line: int | None = None
    """Number of the line from 1, where that is known: within a file that is split, only its first part knows."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that a rule of cleaning, or deduplication, decided against."""

    document: Document
    reason: str
    """One word, for counting."""


Rule = Callable[[Document], Document | str]
"""A rule of cleaning gives the document back, changed or not, or the reason why it is dropped: one word, for counting."""


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
