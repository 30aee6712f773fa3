"""What the manifest says of files, shards and documents, each a small frozen record.

In: counts, hashes, names, as the pipeline finds them. Out: records that check themselves, and add up.
"""

from collections import Counter
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A frozen part of the manifest that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileRecord(Record):
    """A file of the dataset."""

    bytes: Count
    sha256: Sha256


class InputRecord(Record):
    """A file that was read, or a part of one; the parts of a file tile it in order."""

    source: str
    file: str
    """Path below the source's root, with `/`."""
    bytes: Count
    sha256: Sha256


class Counts(Record):
    """Tokens (end-of-text tokens included), documents, and bytes of their text in UTF-8."""

    num_tokens: Count = 0
    num_documents: Count = 0
    num_bytes: Count = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            num_tokens=self.num_tokens + other.num_tokens,
            num_documents=self.num_documents + other.num_documents,
            num_bytes=self.num_bytes + other.num_bytes,
        )


class PackingRecord(Record):
    """What becomes of a shard's documents at a sequence length, packed and, to compare, laid end to end and chopped."""

    num_packs: Count
    """Samples of best-fit packing."""
    documents_cut: Count
    padding_tokens: Count
    documents_cut_when_chopped: Count


class ShardRecord(Counts):
    """A shard: `<folder>/<name>.bin`, `.idx`, `.crc32c`, `.documents.parquet` and `.packed-<T>.npy`."""

    name: str
    """The shard's prefix, relative to the dataset's folder."""
    files: dict[str, FileRecord]
    """By path relative to the dataset's folder."""
    sources: dict[str, Counts]
    """The only source that gave something, with all of it."""
    packings: dict[str, PackingRecord] = {}
    """By sequence length T, for those of `data.packed_lengths`."""

    @property
    def source(self) -> str:
        """The source that gave it."""
        (source,) = self.sources
        return source

    def sha256_of(self, suffix: str) -> str:
        """The hash of its file `<name><suffix>`. Raises KeyError when there is none."""
        return self.files[self.name + suffix].sha256

    def num_packs(self, length: int) -> int:
        """Its samples of best-fit packing. Raises KeyError for a sequence length it was not packed for."""
        return self.packings[str(length)].num_packs


class DocumentCounts(Record):
    """What became of every document: read == kept + the sums of dropped and quarantined."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = {}
    """By reason: what a rule or deduplication decided against."""
    quarantined: dict[str, int] = {}
    """By reason: what could not be read."""

    def __add__(self, other: "DocumentCounts") -> "DocumentCounts":
        return DocumentCounts(
            read=self.read + other.read,
            kept=self.kept + other.kept,
            dropped=_add_counts(self.dropped, other.dropped),
            quarantined=_add_counts(self.quarantined, other.quarantined),
        )

    @property
    def adds_up(self) -> bool:
        """Whether every document that was read became exactly one thing."""
        return self.read == self.kept + sum(self.dropped.values()) + sum(self.quarantined.values())


def _add_counts(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(one) + Counter(other)).items()))


def counts_of(counts: Counts) -> Counts:
    """The counts alone, of a record that has more."""
    return Counts(num_tokens=counts.num_tokens, num_documents=counts.num_documents, num_bytes=counts.num_bytes)
