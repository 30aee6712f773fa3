"""The sections `data:` of a run file: sources, cleaning, deduplication, tokenizer, shards."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from configs.section import APPLIED, FREE, FUNCTION_PATTERN, IN_NEW_DATA, NAME_PATTERN, REFUSED, Fraction, PositiveInt, Section

SOURCE_FORMATS = ("auto", "text", "jsonl", "parquet", "warc", "datasets", "hub", "megatron")


class SourceSection(Section):
    """One source of documents."""

    name: str
    """Short name, used in the manifest and in reports."""
    path: Annotated[str, Field(min_length=1)]
    """A file, a folder that is searched for files, a glob, or a URL of any of these that fsspec reads (`s3://bucket/x/*.jsonl.zst`,
    `gs://`, `hf://`); for format hub, the name of a data set. `{stdlib}` stands for the running Python's own library."""
    format: str = "auto"
    """auto: by each file's suffix; text (a file is a document), jsonl, parquet, warc (WARC and WET); datasets: a Hugging Face
    `save_to_disk` folder; hub: a Hugging Face data set, streamed; megatron: prefixes of `.bin` and `.idx`, already tokenised;
    or `package.module:function` of your own, which is given a local path and yields one mapping for each document."""
    pattern: str = "**/*"
    """Which files below a folder (a glob); hidden files and folders are left out."""
    text_field: str = "text"
    """The field of a row that holds the text."""
    id_field: str | None = None
    """The field of a row that names the document, kept beside its tokens."""
    metadata_fields: tuple[str, ...] = ()
    """Fields of a row that are kept beside its tokens, and that rules may look at."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Further arguments: of `datasets.load_dataset` for format hub (`name`, `split`, `revision`), of fsspec for a URL, or of
    a function of your own."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError("a source name has 1 to 64 letters, digits, '.', '_' or '-'")
        return name

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name not in SOURCE_FORMATS and not FUNCTION_PATTERN.fullmatch(name):
            raise ValueError(f"wanted one of {', '.join(SOURCE_FORMATS)}, or package.module:function of your own")
        return name


class RuleSection(Section):
    """One rule of cleaning: it keeps a document, changes it, or drops it for a reason. A plain name is short for {rule: name}."""

    rule: str
    """The name of one of ours (`pretrain data rules` lists them), or `package.module:function` of your own."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The rule's arguments by name; those left out have the published values."""
    sources: tuple[str, ...] | None = None
    """Names of the sources whose documents pass the rule; null: all."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, found: Any) -> Any:
        return {"rule": found} if isinstance(found, str) else found


class NearDuplicatesSection(Section):
    """Documents whose words are nearly the same, found by MinHash and locality-sensitive hashing."""

    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Two documents are near duplicates when the estimated Jaccard similarity of their word shingles is at least this."""
    num_permutations: PositiveInt = 128
    """Hash functions of a signature; the estimate's standard error is at most 0.5 / sqrt of it."""
    num_bands: PositiveInt = 16
    """A divisor of `num_permutations`: two documents are compared when all rows of one band agree."""
    shingle_words: PositiveInt = 5
    """Consecutive words that make a shingle."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Chooses the hash functions."""

    @model_validator(mode="after")
    def _bands(self) -> "NearDuplicatesSection":
        if self.num_permutations % self.num_bands:
            raise ValueError(f"num_bands {self.num_bands} does not divide num_permutations {self.num_permutations}")
        return self


class DeduplicationSection(Section):
    """What is dropped because it is there already; the document that comes first in the sources' order stays."""

    exact: bool = True
    """Drop documents whose text, after cleaning, is that of another."""
    near: NearDuplicatesSection | None = None
    """Drop near duplicates too; null: only exact ones."""


class TokenizerSection(Section):
    """The tokenizer: loaded from a file, or trained on the sources."""

    path: str | None = Field(default=None, json_schema_extra=IN_NEW_DATA)
    """A `tokenizer.json` to use as it is; when null, a byte-level BPE is trained on the sources."""
    vocabulary_size: Annotated[int, Field(ge=257)] = 32768
    """Entries to train, special tokens included (256 bytes + 1 at least). Unused with `path`."""
    training_bytes: PositiveInt = 100_000_000
    """At most this much text is sampled, evenly over the work units, to train on."""
    end_of_text: str = "<|endoftext|>"
    """The token placed after every document; generation stops at it."""
    added_tokens: tuple[str, ...] = ()
    """Further entries of a tokenizer that is trained: each is one token wherever it stands in a text (separators, marks of your own).
    Printable ASCII; `vocabulary_size` includes them."""
    engine: Literal["auto", "fastokens", "tokenizers"] = Field(default="auto", json_schema_extra=FREE)
    """What encodes: fastokens (fast, checked against tokenizers) or tokenizers, which defines the ids. auto: fastokens where it
    reads the tokenizer."""
    checked_fraction: Fraction = Field(default=0.002, json_schema_extra=FREE)
    """Share of each work unit's text (at least one document) that is encoded by tokenizers too; one differing id ends the build."""

    @model_validator(mode="after")
    def _added(self) -> "TokenizerSection":
        added = self.added_tokens
        if added and self.path is not None:
            raise ValueError("added_tokens are for a tokenizer that is trained, and path names one that is there; remove one of the two")
        # Other letters than ASCII's stand for other bytes in a byte-level tokenizer, and would not come back as they were.
        if wrong := [token for token in added if not (token and token.isascii() and token.isprintable() and token == token.strip())]:
            raise ValueError(f"added_tokens are printable ASCII without spaces at their ends, found {wrong[0]!r}")
        if len({*added, self.end_of_text}) <= len(added):
            raise ValueError(f"added_tokens are different from one another and from end_of_text {self.end_of_text!r}, found {list(added)}")
        if added and self.vocabulary_size - len(added) < 257:
            raise ValueError(
                f"vocabulary_size {self.vocabulary_size} cannot hold the 256 bytes, the end of a text and {len(added)} added_tokens; "
                f"set it to {257 + len(added)} or more"
            )
        return self


class DataSection(Section):
    """Raw text to token shards: what `pretrain data build` makes."""

    root: str | None = Field(default=None, json_schema_extra=APPLIED)
    """Folder of the built shards and their manifest; when null, `datasets/` + the name of the first source. Training may also name a
    URL that the folder was copied to (`s3://bucket/web`, whatever fsspec reads): its shards are then read through `cache`."""
    cache: str | None = Field(default=None, json_schema_extra=FREE)
    """Folder on the node's own disk for blocks of a dataset that `root` names by URL, shared by the node's ranks; when null,
    `pretrain/staged` below $XDG_CACHE_HOME or ~/.cache."""
    cache_bytes: PositiveInt = Field(default=50_000_000_000, json_schema_extra=FREE)
    """The most that the blocks take there. Where it holds the whole dataset, each block is fetched once."""
    sources: tuple[SourceSection, ...] = ()
    """Where documents come from, at least one."""
    clean: tuple[RuleSection, ...] = ()
    """Rules that every document passes, in this order."""
    deduplicate: DeduplicationSection | None = None
    """What is dropped because it is there twice; null: nothing."""
    tokenizer: TokenizerSection = Field(default=TokenizerSection(), json_schema_extra=REFUSED)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1234, json_schema_extra=REFUSED)
    """Shuffles the documents within each shard."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Share of the documents kept out of training for evaluation, chosen by a hash of each document's id."""
    work_unit_bytes: PositiveInt = 16_000_000
    """Files are gathered into work units of about this many bytes, and large ones split where their format allows it."""
    shard_tokens: PositiveInt = 32_000_000
    """A work unit's tokens are cut into shards of about this many (a document stays whole)."""
    packed_lengths: tuple[PositiveInt, ...] = ()
    """Sequence lengths for which every shard gets an index of best-fit packing (`training.packing: best_fit`)."""
    largest_document_bytes: PositiveInt = 50_000_000
    """A larger document goes to quarantine instead of into memory."""
    quarantine_limit: Fraction = Field(default=0.01, json_schema_extra=FREE)
    """The build stops when more than this share of the documents cannot be read."""
    train_while_building: bool = Field(default=False, json_schema_extra=REFUSED)
    """True: training may begin while the data is being built. Each source is then seen unit by unit, in the build's order, shuffled
    within the unit; training waits where it is faster than the build. The held-out text is that of each source's first unit."""
    verify_before_training: bool = Field(default=False, json_schema_extra=FREE)
    """Whether `pretrain train` reads every shard and compares its SHA-256 first. Either way each block of 64 KiB is compared with its
    CRC32C when it is first read, and a flipped bit ends the run."""
    workers: PositiveInt | None = Field(default=None, json_schema_extra=FREE)
    """Ray tasks at once; when null, one per CPU, of all hosts where Ray is a cluster. The result does not depend on it."""

    @model_validator(mode="after")
    def _sources(self) -> "DataSection":
        names = [source.name for source in self.sources]
        if len(names) != len(set(names)):
            raise ValueError(f"two sources have the same name: {names}")
        unknown = [name for rule in self.clean for name in rule.sources or () if name not in names]
        if unknown:
            raise ValueError(f"clean speaks of sources that there are not: {unknown}; there are {names}")
        if self.is_remote and (self.train_while_building or self.verify_before_training):
            raise ValueError("root is a URL: train_while_building and verify_before_training need a folder")
        return self

    def folder(self) -> str:
        """The dataset's folder, or its URL."""
        return self.root or f"datasets/{self.sources[0].name if self.sources else 'default'}"

    @property
    def is_remote(self) -> bool:
        """Whether the dataset is one of another place, to be read through the cache."""
        return "://" in self.folder()

    def cache_folder(self) -> str:
        """Where blocks of a dataset of another place are kept."""
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.cache or f"{caches}/pretrain/staged"
