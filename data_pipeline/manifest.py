"""The manifest: what was built, from what, with what. It is written last, so where it stands the build is finished.

In: a dataset's folder. Out: its `Manifest`, and a check of every byte. Nothing in it depends on when, where or by how
many workers the dataset was built: equal input gives an equal file.

It is JSON, sealed by its hash. The inputs and the shards of each split are tables there: the columns are named once, every
row is a line. `jq` makes objects of them:

    jq -c '.splits.train | .columns as $names | .rows[] | [$names, .] | transpose | map({(.[0]): .[1]}) | add' manifest.json
"""

import gc
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, overload

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, ValidationInfo

from configs.durable import sha256_of_file, write_file
from configs.errors import UserError
from configs.sealed import seal, sealed_text
from data_pipeline.shards import Shard

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
PLAN = "plan.json"  # beside the manifest, which must not depend on when a file was touched
TOKENIZER = "tokenizer.json"
UNITS = "units"
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
BLOCK_TOKENS = 1 << 22
VERSION_OF = re.compile(rb'\{\s*"format_version": (\d+)')
INPUT_COLUMNS = ("source", "file", "bytes", "sha256")
SHARD_COLUMNS = ("name", "source", "num_tokens", "num_documents", "num_bytes")
FILE_COLUMNS = ("bytes", "sha256")
"""Of each file of a shard, behind its name without the shard's: `.bin bytes`."""
PACKING_COLUMNS = ("num_packs", "documents_cut", "padding_tokens", "documents_cut_when_chopped")
"""Of each packing, behind its sequence length: `2048 num_packs`."""
TEXT_COLUMNS = ("name", "source", "file")
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


Columns = Mapping[str, tuple[Any, ...]]
Made = TypeVar("Made", bound=Record)


@dataclass(frozen=True)
class Table(Sequence[Made]):
    """Records as columns: ten thousand are read in milliseconds, because each is only made when it is asked for."""

    columns: Columns
    make: Callable[[Columns, int], Made]
    """The record of a row."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, index: int) -> Made: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Made, ...]: ...

    def __getitem__(self, index: int | slice) -> Made | tuple[Made, ...]:
        found = range(len(self))[index]
        return self.make(self.columns, found) if isinstance(found, int) else tuple(self.make(self.columns, row) for row in found)

    def __iter__(self) -> Iterator[Made]:
        return map(partial(self.make, self.columns), range(len(self)))

    def dump(self) -> dict[str, Any]:
        """The table in plain values, for JSON."""
        return {"columns": list(self.columns), "rows": list(zip(*self.columns.values(), strict=True))}


def _column(name: str) -> Any:
    return property(lambda row: row._columns[name][row._row])


class _ShardRow:
    """A shard of a table: to training the same as a `ShardRecord`, which it becomes where more is asked of it.

    It costs a hundredth of one, which matters where all shards are gone through before training starts.
    """

    __slots__ = ("_columns", "_row")

    def __init__(self, columns: Columns, row: int) -> None:
        self._columns, self._row = columns, row

    name, source = _column("name"), _column("source")
    num_tokens, num_documents, num_bytes = _column("num_tokens"), _column("num_documents"), _column("num_bytes")

    @property
    def files(self) -> dict[str, FileRecord]:
        name = self.name
        return {name + suffix: FileRecord(**self._values(suffix, FILE_COLUMNS)) for suffix in _beginnings((*self._columns,), "sha256")}

    @property
    def packings(self) -> dict[str, PackingRecord]:
        return {length: PackingRecord(**self._values(length, PACKING_COLUMNS)) for length in _beginnings((*self._columns,), "num_packs")}

    def sha256_of(self, suffix: str) -> str:
        return self._columns[f"{suffix} sha256"][self._row]

    def num_packs(self, length: int) -> int:
        return self._columns[f"{length} num_packs"][self._row]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked of a copy that is being made, and has nothing yet
            raise AttributeError(name)
        return getattr(self._record(), name)

    def __eq__(self, other: object) -> bool:
        return self._record() == (other._record() if isinstance(other, _ShardRow) else other)

    def __repr__(self) -> str:
        return repr(self._record())

    def _record(self) -> ShardRecord:
        counts = _counts(cast(Counts, self))
        return ShardRecord(name=self.name, files=self.files, sources={self.source: counts}, packings=self.packings, **dict(counts))

    def _values(self, beginning: str, names: Iterable[str]) -> dict[str, Any]:
        return {name: self._columns[f"{beginning} {name}"][self._row] for name in names}


@cache  # each row of a table asks for the same
def _beginnings(columns: tuple[str, ...], ending: str) -> tuple[str, ...]:
    return tuple(name.removesuffix(f" {ending}") for name in columns if name.endswith(f" {ending}"))


def _make_input(columns: Columns, row: int) -> InputRecord:
    return InputRecord(**{name: values[row] for name, values in columns.items()})


# Pydantic's fields cannot be looked up when they are asked for, so a row is no subclass; it has all that a record has.
_make_shard = cast(Callable[[Columns, int], ShardRecord], _ShardRow)


def _tabulate_inputs(inputs: Sequence[InputRecord]) -> Table[InputRecord]:
    if isinstance(inputs, Table):
        return inputs
    return _tabulate(INPUT_COLUMNS, [[*dict(record).values()] for record in inputs], _make_input)


def _tabulate_shards(shards: Sequence[ShardRecord]) -> Table[ShardRecord]:
    """Raises ValueError for shards that are not of one source each, or have not the same kinds of files and packings."""
    if isinstance(shards, Table):
        return shards
    suffixes = [file.removeprefix(shard.name) for shard in shards[:1] for file in shard.files]
    lengths = [length for shard in shards[:1] for length in shard.packings]
    rows: list[list[Any]] = []
    for shard in shards:
        if {*shard.files} != {shard.name + suffix for suffix in suffixes} or {*shard.packings} != {*lengths}:
            raise ValueError(f"{shard.name} has other files or packings than {shards[0].name}")
        if [*shard.sources.values()] != [_counts(shard)]:
            raise ValueError(f"{shard.name} is not of one source")
        row: list[Any] = [getattr(shard, name) for name in SHARD_COLUMNS]
        for suffix in suffixes:
            row += [getattr(shard.files[shard.name + suffix], name) for name in FILE_COLUMNS]
        for length in lengths:
            row += [getattr(shard.packings[length], name) for name in PACKING_COLUMNS]
        rows.append(row)
    return _tabulate(_shard_columns(suffixes, lengths), rows, _make_shard)


def _shard_columns(suffixes: Iterable[str], lengths: Iterable[str]) -> tuple[str, ...]:
    files = (f"{suffix} {name}" for suffix in suffixes for name in FILE_COLUMNS)
    return (*SHARD_COLUMNS, *files, *(f"{length} {name}" for length in lengths for name in PACKING_COLUMNS))


def _all_shard_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    return _shard_columns(_beginnings(names, "sha256"), _beginnings(names, "num_packs"))


def _read_inputs(found: Any, info: ValidationInfo) -> Table[InputRecord]:
    return _read_table(found, lambda _: INPUT_COLUMNS, _make_input) if info.mode == "json" else _tabulate_inputs(found)


def _read_shards(found: Any, info: ValidationInfo) -> Table[ShardRecord]:
    return _read_table(found, _all_shard_columns, _make_shard) if info.mode == "json" else _tabulate_shards(found)


def _read_table(found: Any, complete: Callable[[tuple[str, ...]], tuple[str, ...]], make: Callable[[Columns, int], Made]) -> Table[Made]:
    """A table that `dump` gave. complete: which columns one has that has these. Raises ValueError."""
    if not isinstance(found, dict) or found.keys() != {"columns", "rows"}:
        raise ValueError('not a table of "columns" and "rows"')
    names, rows = found["columns"], found["rows"]
    if not isinstance(names, list) or not isinstance(rows, list):
        raise ValueError('"columns" and "rows" must be lists')
    names = tuple(map(str, names))
    if names != (known := complete(names)) or len({*names}) < len(names):
        wrong = [f"{name} is missing" for name in known if name not in names]
        wrong += [f"{name} is unknown" for name in names if name not in known]
        raise ValueError(f"of its columns {', '.join(wrong) or 'the order is another'}")
    return _tabulate(names, rows, make)


def _tabulate(names: Sequence[str], rows: Sequence[Any], make: Callable[[Columns, int], Made]) -> Table[Made]:
    """Raises ValueError for a row of another size, and for a value of another kind than its column's."""
    if not ({*map(type, rows)} <= {list} and {*map(len, rows)} <= {len(names)}):
        number = next(number for number, row in enumerate(rows) if type(row) is not list or len(row) != len(names))
        raise ValueError(f"row {number} is not a list of {len(names)} values")
    columns: Columns = dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))
    for name, values in columns.items():
        holds, kind = _kind_of(name)
        if not holds(values):
            number = next(number for number, value in enumerate(values) if not holds((value,)))
            raise ValueError(f"row {number}: {name} is {values[number]!r}, not {kind}")
    return Table(columns, make)


def _kind_of(column: str) -> tuple[Callable[[tuple[Any, ...]], bool], str]:
    """Whether values may stand in a column, all of them looked at together, and what that would be."""
    if column.endswith("sha256"):
        return _are_hashes, "64 hexadecimal digits"
    return (_are_texts, "a text") if column in TEXT_COLUMNS else (_are_counts, "a whole number from 0 on")


def _are_texts(values: tuple[Any, ...]) -> bool:
    return {*map(type, values)} <= {str}


def _are_counts(values: tuple[Any, ...]) -> bool:
    return {*map(type, values)} <= {int} and min(values, default=0) >= 0


def _are_hashes(values: tuple[Any, ...]) -> bool:
    if not _are_texts(values) or not {*map(len, values)} <= {64}:
        return False
    digits = "".join(values)
    try:
        return bytes.fromhex(digits).hex() == digits  # four times as fast as a regular expression for each
    except ValueError:
        return False


def _dump_inputs(inputs: Sequence[InputRecord]) -> dict[str, Any]:
    return _tabulate_inputs(inputs).dump()


def _dump_shards(shards: Sequence[ShardRecord]) -> dict[str, Any]:
    return _tabulate_shards(shards).dump()


def _refuse_other_splits(splits: dict[Split, Sequence[ShardRecord]]) -> dict[Split, Sequence[ShardRecord]]:
    if missing := [split for split in SPLITS if split not in splits]:
        raise ValueError(f"{', '.join(missing)} is missing")
    return splits


InputTable = Annotated[Sequence[InputRecord], PlainValidator(_read_inputs), PlainSerializer(_dump_inputs)]
ShardTable = Annotated[Sequence[ShardRecord], PlainValidator(_read_shards), PlainSerializer(_dump_shards)]


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
        return sum(map(_counts, self.shards(split)), Counts())


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


def _first_problem(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    place, what = ".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")
    return f"{place}: {what}" if place else what


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
