"""The manifest: what was built, from what, with what. It is written last, so where it stands the build is finished.

In: a dataset's folder. Out: its `Manifest`, and a check of every byte. Nothing in it depends on when, where or by how
many workers the dataset was built: equal input gives an equal file.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from configs.durable import sha256_of_file, write_file
from configs.errors import UserError
from configs.sealed import seal, sealed_text
from data_pipeline.shards import Shard

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PLAN = "plan.json"  # beside the manifest, which must not depend on when a file was touched
TOKENIZER = "tokenizer.json"
UNITS = "units"
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
BLOCK_TOKENS = 1 << 22
VERSION_OF = re.compile(rb'\{\s*"format_version": (\d+)')


class Record(BaseModel):
    """A frozen part of the manifest that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileRecord(Record):
    """A file of the dataset."""

    bytes: int
    sha256: str


class InputRecord(Record):
    """A file that was read, or a part of one; the parts of a file tile it in order."""

    source: str
    file: str
    """Path below the source's root, with `/`."""
    bytes: int
    sha256: str


class Counts(Record):
    """Tokens (end-of-text tokens included), documents, and bytes of their text in UTF-8."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            num_tokens=self.num_tokens + other.num_tokens,
            num_documents=self.num_documents + other.num_documents,
            num_bytes=self.num_bytes + other.num_bytes,
        )


class PackingRecord(Record):
    """What becomes of a shard's documents at a sequence length, packed and, to compare, laid end to end and chopped."""

    num_packs: int
    """Samples of best-fit packing."""
    documents_cut: int
    padding_tokens: int
    documents_cut_when_chopped: int


class ShardRecord(Counts):
    """A shard: `<folder>/<name>.bin`, `.idx`, `.crc32c`, `.documents.parquet` and `.packed-<T>.npy`."""

    name: str
    """The shard's prefix, relative to the dataset's folder."""
    files: dict[str, FileRecord]
    """By path relative to the dataset's folder."""
    sources: dict[str, Counts]
    """How much of it each source gave."""
    packings: dict[str, PackingRecord] = {}
    """By sequence length T, for those of `data.packed_lengths`."""


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


class Manifest(Record):
    """Everything that training needs to know about a dataset, and everything that made it what it is."""

    format_version: int
    tokenizer_sha256: str
    vocabulary_size: int
    """Highest id + 1, added tokens included."""
    end_of_text: str
    end_of_text_id: int
    """The id behind every document."""
    dtype: str
    """Of the token ids: uint16 or int32."""
    configuration: dict[str, Any]
    """The `data` section, resolved, without the keys that change nothing."""
    rules: tuple[dict[str, Any], ...]
    """What identifies each rule of cleaning: the hashes of the files it reads, of a user's own source."""
    libraries: dict[str, str]
    """The versions of what decided the bytes."""
    sources: dict[str, DocumentCounts]
    """What became of each source's documents."""
    inputs: tuple[InputRecord, ...]
    """Every file that was read, in order."""
    splits: dict[Split, tuple[ShardRecord, ...]]

    @property
    def documents(self) -> DocumentCounts:
        """What became of all documents."""
        return sum(self.sources.values(), DocumentCounts())

    def shards(self, split: Split) -> tuple[ShardRecord, ...]:
        """The shards of a split in their order; none of them is empty."""
        return self.splits[split]

    def total(self, split: Split) -> Counts:
        """Tokens, documents and bytes of a split."""
        return sum((_counts(shard) for shard in self.shards(split)), Counts())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`: from here on the dataset is finished. Raises OSError."""
    write_file(folder / MANIFEST, seal(manifest.model_dump(mode="json")))


def load_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest. Raises UserError: no such dataset, an unfinished or a damaged one."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        finished = len(list((folder / UNITS).glob("[0-9]*"))) if (folder / UNITS).is_dir() else 0
        if finished:
            raise UserError(
                f"{folder}: this dataset is unfinished: {finished} work units are there, but no {MANIFEST}; "
                "`pretrain data build RUN.yaml` continues it."
            ) from None
        raise UserError(f"{folder}: no dataset is here (no {MANIFEST}); build it with `pretrain data build RUN.yaml`.") from None
    version = VERSION_OF.match(content)
    if version is not None and int(version[1]) != FORMAT_VERSION:  # before anything else of it is believed
        raise UserError(
            f"{path}: format version {int(version[1])}, this program reads {FORMAT_VERSION}; build the dataset again into another "
            "data.root."
        )
    try:
        return Manifest.model_validate_json(sealed_text(content), strict=True)
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{path}: not a manifest ({str(error).splitlines()[0]}); `pretrain data build RUN.yaml --rebuild` makes it again."
        ) from None


def manifest_hash(folder: Path) -> str:
    """SHA-256 of `manifest.json`: it names every byte of the dataset. Raises UserError when there is none."""
    load_manifest(folder)
    return sha256_of_file(folder / MANIFEST)


def verify_dataset(folder: Path, progress: Callable[[int], None] | None = None) -> list[str]:
    """Read every byte of a dataset and say what is wrong with it, a sentence per problem; an empty list: nothing.

    `progress` is called with the bytes checked since its last call. Raises UserError as `load_manifest` does.
    """
    manifest = load_manifest(folder)
    problems: list[str] = []
    tell = progress or (lambda _: None)
    problems += _verify_file(folder, TOKENIZER, None, manifest.tokenizer_sha256, tell)
    for split in SPLITS:
        for shard in manifest.shards(split):
            damaged = [
                problem for name, record in shard.files.items() for problem in _verify_file(folder, name, record.bytes, record.sha256, tell)
            ]
            # The tokens of damaged files would only say once more that these are damaged.
            problems += damaged or _verify_tokens(folder, shard, manifest)
    kept = sum(manifest.total(split).num_documents for split in SPLITS)
    counts = manifest.documents
    if counts.kept != kept or not counts.adds_up:
        problems.append(f"{MANIFEST}: its counts of documents do not add up")
    return problems


def dataset_bytes(manifest: Manifest) -> int:
    """Bytes of all shard files: what `verify_dataset` will read, but for the tokenizer."""
    return sum(record.bytes for split in SPLITS for shard in manifest.shards(split) for record in shard.files.values())


def _counts(counts: Counts) -> Counts:
    return Counts(num_tokens=counts.num_tokens, num_documents=counts.num_documents, num_bytes=counts.num_bytes)


def _verify_file(folder: Path, name: str, size: int | None, sha256: str, tell: Callable[[int], None]) -> list[str]:
    path = folder / name
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return [f"{name}: {found} bytes, the manifest has {size}"]
        digest = sha256_of_file(path)
    except FileNotFoundError:
        return [f"{name}: missing"]
    except OSError as error:
        return [f"{name}: cannot be read: {error}"]
    tell(found)
    return [] if digest == sha256 else [f"{name}: its SHA-256 differs from the manifest's; at least one bit has changed"]


def _verify_tokens(folder: Path, record: ShardRecord, manifest: Manifest) -> list[str]:
    try:
        shard = Shard(folder / record.name)
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    if str(shard.tokens.dtype) != manifest.dtype:
        problems.append(f"{record.name}: its tokens are {shard.tokens.dtype}, the manifest has {manifest.dtype}")
    if (shard.num_tokens, shard.num_documents) != (record.num_tokens, record.num_documents):
        problems.append(f"{record.name}: {shard.num_tokens} tokens in {shard.num_documents} documents; the manifest has others")
    blocks = (shard.tokens[start : start + BLOCK_TOKENS] for start in range(0, shard.num_tokens, BLOCK_TOKENS))
    if any(int(block.max()) >= manifest.vocabulary_size or int(block.min()) < 0 for block in blocks):
        problems.append(f"{record.name}.bin: holds token ids outside the vocabulary of {manifest.vocabulary_size}")
    ends = shard.document_starts[1:] - 1
    if shard.num_documents and not np.all(shard.tokens[ends] == manifest.end_of_text_id):
        problems.append(f"{record.name}.bin: a document does not end with the end-of-text token")
    return problems
