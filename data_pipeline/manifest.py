"""The manifest: what was built, from what, with what. It is written last, so where it stands the build is finished.

In: a dataset's folder. Out: its `Manifest`. Nothing in it depends on when, where or by how many workers the dataset was
built: equal input gives an equal file.

It is JSON, sealed by its hash; the inputs and the shards of each split are tables there, see `record_tables.py`.
"""

import gc
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from configs.durable import sha256_of_file, write_file
from configs.errors import UserError
from configs.sealed import seal, sealed_text
from data_pipeline.record_tables import InputTable, ShardTable
from data_pipeline.records import Count, Counts, DocumentCounts, Record, Sha256, ShardRecord, counts_of

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
PLAN = "plan.json"  # beside the manifest, which must not depend on when a file was touched
TOKENIZER = "tokenizer.json"
UNITS = "units"
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
VERSION_OF = re.compile(rb'\{\s*"format_version": (\d+)')


def _refuse_other_splits(splits: dict[Split, Sequence[ShardRecord]]) -> dict[Split, Sequence[ShardRecord]]:
    if missing := [split for split in SPLITS if split not in splits]:
        raise ValueError(f"{', '.join(missing)} is missing")
    return splits


class Manifest(Record):
    """Everything that training needs to know about a dataset, and everything that made it what it is."""

    format_version: int
    tokenizer_sha256: Sha256
    vocabulary_size: Count
    """Highest id + 1, added tokens included."""
    end_of_text: str
    end_of_text_id: Count
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
    inputs: InputTable
    """Every file that was read, in order."""
    splits: Annotated[dict[Split, ShardTable], AfterValidator(_refuse_other_splits)]

    @property
    def documents(self) -> DocumentCounts:
        """What became of all documents."""
        return sum(self.sources.values(), DocumentCounts())

    def shards(self, split: Split) -> Sequence[ShardRecord]:
        """The shards of a split in their order; none of them is empty. They are made as they are gone over."""
        return self.splits[split]

    def total(self, split: Split) -> Counts:
        """Tokens, documents and bytes of a split."""
        return sum(map(counts_of, self.shards(split)), Counts())


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
        with _without_collecting():
            return Manifest.model_validate_json(sealed_text(content), strict=True)
    except ValueError as error:
        what = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{path}: not a manifest ({what}); `pretrain data build RUN.yaml --rebuild` makes it again.") from None


@contextmanager
def _without_collecting() -> Generator[None]:
    """Ten thousands of rows make Python look for garbage, of which there is none, among all that was ever imported: 75 ms."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def manifest_hash(folder: Path) -> str:
    """SHA-256 of `manifest.json`: it names every byte of the dataset. Raises UserError when there is none."""
    load_manifest(folder)
    return sha256_of_file(folder / MANIFEST)


def _first_problem(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    place, what = ".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")
    return f"{place}: {what}" if place else what
