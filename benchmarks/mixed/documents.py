"""What a mixed corpus consists of: its sources, and documents with what must become of them.

Who makes the corpus fills these in and writes them down; who checks a dataset knows the sources and the names from here.
"""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from data_pipeline.documents import identify_document

ROOT = Path(__file__).resolve().parent.parent.parent
RUN_FILE = "configs/data/mixed.yaml"
FOLDER, DATASET = "datasets/mixed-corpus", "datasets/mixed"
MARKER = "planted-to-be-dropped"
MAIL_HOST = "mixed-corpus.example"
MAIL_PLACEHOLDERS = ("someone@example.com", "somebody.else@example.org")
BLOCKED_DOMAIN, BLOCKED_URL = "blocked.example", "allowed.example/one/blocked"
KEPT = "kept"
Kind = Literal["python", "text", "jsonl", "parquet", "wet"]


@dataclass(frozen=True)
class Source:
    """A source of the run file."""

    name: str
    kind: Kind
    share: float
    """Of the bytes."""
    pool: str
    """Which texts it takes first."""
    files: tuple[str, ...] = ()
    """Of those that hold many documents."""
    text_field: str = "text"
    id_field: str | None = "id"


SOURCES = (
    Source("python", "python", 0.2, "python", id_field=None),
    Source("manuals", "text", 0.1, "manuals", id_field=None),
    Source("kernel", "jsonl", 0.13, "kernel", tuple(f"kernel-{number}.jsonl.gz" for number in range(4))),
    Source("wordnet", "jsonl", 0.14, "wordnet", tuple(f"entries-{number}.jsonl.zst" for number in range(3)), "body", "number"),
    Source("headers", "jsonl", 0.28, "headers", ("headers.jsonl",)),
    Source("stubs", "parquet", 0.1, "stubs", ("stubs-0.parquet", "stubs-1.parquet")),
    Source("web", "wet", 0.05, "web", ("pages-0.warc.wet.gz", "pages-1.warc.wet.gz")),
)
PLACES = {source.name: number for number, source in enumerate(SOURCES)}


@dataclass
class Planned:
    """A document, or what stands in its place, and what must become of it."""

    source: Source
    text: str
    file: str = ""
    """Path below the source's folder."""
    pool: str = ""
    content: bytes | None = None
    """The line, file, value or record as it is written, where that is not simply the text."""
    is_null: bool = False
    """A value of parquet that is not there."""
    url: str = ""
    expected: str = KEPT
    stage: Literal["kept", "dropped", "quarantined"] = KEPT
    digest: bytes = b""
    """Of the text after cleaning."""
    name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    position: int = 0

    @property
    def order(self) -> tuple[int, bytes, int]:
        """Of two documents that are alike, the one with the lower order stays."""
        return PLACES[self.source.name], os.fsencode(self.file), self.position

    @property
    def identity(self) -> str:
        """The document's id in the dataset."""
        return identify_document(self.source.name, self.file, self.position)


def hash_text(text: str) -> bytes:
    """128 bits that name a text."""
    return blake2b(text.encode("utf-8"), digest_size=16).digest()


def split_shingles(text: str, num_words: int = 5) -> set[tuple[str, ...]]:
    """The runs of words of a text, written out."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[start : start + num_words]) for start in range(max(1, len(words) - num_words + 1))}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """The share of what both have in what either has."""
    return len(one & other) / max(1, len(one | other))
