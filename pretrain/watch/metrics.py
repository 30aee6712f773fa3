"""Values, and the file that is the truth about them.

In: what the loop saw in a step. Out: rows of `metrics.jsonl`, one JSON object a line, each step exactly once however
often the run was killed: at resume the file is cut back to the checkpoint's step. `read_run` makes one table of them. No torch.
"""

import errno
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from configs.durable import write_file

if TYPE_CHECKING:
    import pyarrow as pa

METRICS_FILE = "metrics.jsonl"
"""Its name in the run folder."""
PORTION_STEPS = 50_000
"""Steps that become columns at once."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line torn by a kill is left out."""
    return list(iterate_rows(path))


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """What `read_rows` gives, one after the other."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = orjson.loads(line)
            except ValueError:  # it takes no NaN, which json writes
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
            if isinstance(row, dict):
                yield row


def read_run(folder: Path) -> "pa.Table":
    """The metrics of a run folder as a table: a row for each step that has any, ascending; null where a step has no such value.

    Rows of one step (a logged one, an evaluation, norms) are merged by column, and of what a step has twice the later one counts. Of a
    step that two attempts wrote, which no run does by itself, all is the later attempt's. A torn last line is left out. `step` is int64;
    other columns are what their values are, and text (JSON) where these have several types.
    """
    import pyarrow as pa

    portions: list[pa.Table] = []
    merged: dict[int, dict[str, Any]] = {}
    newest = -1  # of the portions
    for row in iterate_rows(folder / METRICS_FILE):
        if not isinstance(step := row.get("step"), int):
            continue
        if step <= newest:  # in no order: at once, then
            return _complete(_as_table(_merge(iterate_rows(folder / METRICS_FILE))))
        if len(merged) >= PORTION_STEPS and step not in merged:  # rows of Python take ten times the room of columns
            newest = max(merged)
            portions.append(_as_table(merged))
            merged = {}
        _merge([row], merged)
    portions.append(_as_table(merged))
    try:
        return _complete(pa.concat_tables(portions, promote_options="permissive"))
    except pa.ArrowException:  # a column whose type changes from portion to portion
        return _complete(_as_table(_merge(iterate_rows(folder / METRICS_FILE))))


def _merge(rows: Iterable[dict[str, Any]], merged: dict[int, dict[str, Any]] | None = None) -> dict[int, dict[str, Any]]:
    """The values of each step, added to those that are there."""
    merged = {} if merged is None else merged
    for row in rows:
        if isinstance(step := row.get("step"), int):
            before = merged.get(step, {})
            merged[step] = (before if before.get("attempt", 0) == row.get("attempt", 0) else {}) | row
    return merged


def _as_table(merged: Mapping[int, dict[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    rows = [row for _, row in sorted(merged.items())]
    names = dict.fromkeys(("step", *(name for row in rows for name in row)))
    return pa.table({name: _as_column([row.get(name) for row in rows], is_step=name == "step") for name in names})


def _as_column(values: list[Any], is_step: bool) -> "pa.Array":
    import pyarrow as pa

    if is_step:
        return pa.array(values, pa.int64())
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def _complete(table: "pa.Table") -> "pa.Table":
    """With numbers for the type of columns that hold nothing."""
    import pyarrow as pa

    return table.cast(pa.schema([(field.name, pa.float64() if pa.types.is_null(field.type) else field.type) for field in table.schema]))


def cut_back(path: Path, step: int) -> None:
    """Remove rows after `step` (they will be written again) and a torn last line."""
    if path.is_file():
        kept = [row for row in read_rows(path) if row.get("step", 0) <= step]
        write_file(path, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in kept))


class MetricsLog:
    """Appends rows to `metrics.jsonl`, one complete line at a time. A full disk delays rows; it never ends the run.

    The file stays open: `cut_back` puts another one in its place, so an attempt that slept through its replacement wakes up with a file
    that has no name any more, and adds nothing to that of the new attempt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        with suppress(OSError):  # told when there is a row
            self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._torn = _ends_torn(path)

    def write(self, row: dict[str, Any]) -> str | None:
        """Append one row, and those that could not be written before; what is not finite becomes null. Returns what went wrong, if
        anything."""
        self._waiting.append(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        try:
            self._file = self._file or self._path.open("ab", buffering=0)
            content = (b"\n" if self._torn else b"") + b"".join(self._waiting)
            if (written := self._file.write(content)) < len(content):
                raise OSError(errno.ENOSPC, f"only {written} of {len(content)} bytes could be written", str(self._path))
        except OSError as error:
            self._torn = True  # a part of a line may be there: the next one begins below it
            return str(error)
        self._waiting, self._torn = [], False
        return None


def _ends_torn(path: Path) -> bool:
    """Whether the last line lacks its end, as a kill may leave it."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
    return False  # there is no file, or nothing in it


class Throughput:
    """What happened between two reports, by a monotonic clock."""

    def __init__(self, tokens_seen: int) -> None:
        self._tokens, self._waited, self._time = tokens_seen, 0.0, time.monotonic()

    def since_last(self, tokens_seen: int, seconds_waited: float) -> tuple[float, float]:
        """Tokens per second since the last call (or since the start), over all ranks, and the share of that time that this
        rank waited for data. `seconds_waited`: since the start."""
        now = time.monotonic()
        seconds = max(1e-9, now - self._time)
        rate, share = (tokens_seen - self._tokens) / seconds, (seconds_waited - self._waited) / seconds
        self._tokens, self._waited, self._time = tokens_seen, seconds_waited, now
        return rate, share
