"""The records of a manifest as tables of columns, of which each is made when it is asked for.

In: records, or a table of the manifest's JSON. Out: the other one. There the columns are named once, and every row is a line. `jq`
makes objects of them:

    jq -c '.splits.train | .columns as $names | .rows[] | [$names, .] | transpose | map({(.[0]): .[1]}) | add' manifest.json
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, TypeVar, cast, overload

from pydantic import PlainSerializer, PlainValidator, ValidationInfo

from data_pipeline.records import Counts, FileRecord, InputRecord, PackingRecord, Record, ShardRecord, counts_of

INPUT_COLUMNS = ("source", "file", "bytes", "sha256")
SHARD_COLUMNS = ("name", "source", "num_tokens", "num_documents", "num_bytes")
FILE_COLUMNS = ("bytes", "sha256")
"""Of each file of a shard, behind its name without the shard's: `.bin bytes`."""
PACKING_COLUMNS = ("num_packs", "documents_cut", "padding_tokens", "documents_cut_when_chopped")
"""Of each packing, behind its sequence length: `2048 num_packs`."""
TEXT_COLUMNS = ("name", "source", "file")
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
        counts = counts_of(cast(Counts, self))
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
        if [*shard.sources.values()] != [counts_of(shard)]:
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


InputTable = Annotated[Sequence[InputRecord], PlainValidator(_read_inputs), PlainSerializer(_dump_inputs)]
ShardTable = Annotated[Sequence[ShardRecord], PlainValidator(_read_shards), PlainSerializer(_dump_shards)]
