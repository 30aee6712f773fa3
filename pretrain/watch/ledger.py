"""Where a run's time went, over all its attempts: the goodput ledger.

In: what the run folder says: `timeline.jsonl` (what the loop did when), `attempts.jsonl` (how attempts began and ended), the lease of an
attempt that is running. Out: a `Ledger` whose parts add up to the wall time since the run's beginning. No torch.

    productive    steps that nobody had to do again, without their waiting for data
    recomputed    steps that a later attempt did again, and what a rank that died did since its last row
    start_up      from an attempt's beginning to its first step: processes, imports, the checkpoint
    compile       its first step, in which layers are compiled
    data_wait     waiting for data
    checkpoint    what training stalled for to save
    evaluation    held-out text, tasks
    ending        from the last save to the end of the processes
    idle          between attempts, while nobody waited for a queue
    queue         from a launch's writing to its first attempt, and between its attempts where the launcher brought it back

Rows are at most ten seconds apart, steps between two rows are taken to be equally long, and each second belongs to one part. Where
clocks of two hosts disagree, a time that lies before what is accounted for already is taken as that.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.errors import EXIT_DONE, EXIT_RESUMABLE
from pretrain.watch.metrics import read_rows
from pretrain.watch.timeline import TIMELINE_FILE

PARTS: tuple[str, ...] = (
    "productive",
    "recomputed",
    "start_up",
    "compile",
    "data_wait",
    "checkpoint",
    "evaluation",
    "ending",
    "idle",
    "queue",
)
PART_OF_PHASE = {
    "start": "start_up",
    "first_step": "compile",
    "step": "productive",
    "evaluate": "evaluation",
    "score": "evaluation",
    "save": "checkpoint",
    "end": "ending",
}
ATTEMPTS_FILE, LEASE_FILE = "attempts.jsonl", "lease.json"
LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long is that of a supervisor that is gone."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class AttemptTime:
    """One attempt. Times are Unix seconds."""

    attempt: int
    began: float
    ended: float
    """Of one that is running: now. Of one whose supervisor vanished: its last sign of life."""
    first_step: int | None
    """Steps that were done when it began; None where it never came so far as to know."""
    last_step: int | None
    cause: str
    """Why it ended; empty while it is running."""
    parts: dict[str, float]
    """Seconds of each of `PARTS`; together `ended - began`."""


@dataclass(frozen=True)
class Ledger:
    """A run's time."""

    parts: dict[str, float]
    """Seconds of each of `PARTS`, in that order; together `wall_seconds`."""
    wall_seconds: float
    began: float
    """Of the first attempt, or of the launch that it waited in a queue for (Unix seconds)."""
    ended: float
    attempts: tuple[AttemptTime, ...]

    @property
    def goodput(self) -> float:
        """The share of the wall time in which something was learnt that stayed; 0 where no time has passed."""
        return self.parts["productive"] / self.wall_seconds if self.wall_seconds else 0.0


def read_ledger(folder: Path, now: float | None = None) -> Ledger:
    """The ledger of a run folder. now: Unix seconds; None: the clock's. Of a run without attempts all is 0."""
    now = time.time() if now is None else now
    attempts = [row for row in read_rows(folder / ATTEMPTS_FILE) if "attempt" in row]
    if (running := _running(folder / LEASE_FILE, now, {row["attempt"] for row in attempts})) is not None:
        attempts.append(running)
    return reckon(read_rows(folder / TIMELINE_FILE), attempts)


def reckon(timeline: Sequence[Row], attempts: Sequence[Row]) -> Ledger:
    """The same from rows. timeline: of all attempts; attempts: as in `attempts.jsonl`, one that is running with `ended`: now."""
    ordered = sorted(attempts, key=lambda row: row["attempt"])
    rows = {row["attempt"]: [one for one in timeline if one.get("attempt") == row["attempt"]] for row in ordered}
    if not ordered:
        return Ledger(dict.fromkeys(PARTS, 0.0), 0.0, 0.0, 0.0, ())
    began = _began(ordered[0])
    if (written := _launched(ordered[0])) is not None:
        began = min(began, written)
    clock, wall, times, before = _Clock(began), dict.fromkeys(PARTS, 0.0), list[AttemptTime](), None
    for number, row in enumerate(ordered):
        for part, seconds in _gap(clock, before, row):
            wall[part] += seconds
        kept = min((some[0]["step"] for later in ordered[number + 1 :] if (some := rows[later["attempt"]])), default=math.inf)
        times.append(_attempt(clock, row, rows[row["attempt"]], kept))
        before = row
    for one in times:
        for part, seconds in one.parts.items():
            wall[part] += seconds
    wall_seconds = clock.now - began
    assert math.isclose(sum(wall.values()), wall_seconds, rel_tol=1e-6, abs_tol=1e-6), "a second belongs to one part"
    return Ledger(wall, wall_seconds, began, clock.now, tuple(times))


class _Clock:
    """How far time is accounted for. It never goes back, so that no part is negative and none overlaps another."""

    def __init__(self, now: float) -> None:
        self.now = now

    def advance(self, to: float) -> float:
        """Seconds until then; 0 where that lies behind."""
        before, self.now = self.now, max(self.now, to)
        return self.now - before


def _gap(clock: _Clock, before: Row | None, row: Row) -> Iterator[tuple[str, float]]:
    """What was between two attempts, or before the first one."""
    launch, written = row.get("launch"), _launched(row)
    if before is not None and before.get("launch") == launch is not None:
        is_same_process = (before.get("host"), before.get("pid")) == (row.get("host"), row.get("pid"))
        is_requeued = before.get("status") in (EXIT_RESUMABLE, None) and not before.get("stopped") and not is_same_process
        yield "queue" if is_requeued else "idle", clock.advance(_began(row))
        return
    if written is not None:
        yield "idle", clock.advance(min(written, _began(row)))
    yield "idle" if written is None else "queue", clock.advance(_began(row))


def _attempt(clock: _Clock, row: Row, rows: Sequence[Row], kept: float) -> AttemptTime:
    """One attempt's time. kept: steps of it that no later attempt did again."""
    parts, began = dict.fromkeys(PARTS, 0.0), clock.now
    parts["start_up"] += clock.advance(rows[0]["time"]) if rows else 0.0
    for one, following in pairwise(rows):
        seconds = clock.advance(following["time"])
        waited = min(seconds, max(0.0, following["waited"] - one["waited"]))
        lost = _share_lost(one["step"], following["step"], kept) if one["phase"] == "step" else 0.0
        parts["data_wait"] += waited
        parts["recomputed"] += lost * (seconds - waited)
        parts[PART_OF_PHASE.get(one["phase"], "ending")] += (1.0 - lost) * (seconds - waited)
    if (ended := _ended(row)) is not None:
        phase = rows[-1]["phase"] if rows else "start"
        parts[_part_of_tail(row, phase)] += clock.advance(ended)
    steps = [one["step"] for one in rows]
    first, last = (steps[0], max(steps)) if steps else (row.get("first_step"), row.get("last_step"))
    return AttemptTime(row["attempt"], began, clock.now, first, last, row.get("cause") or "", parts)


def _share_lost(step: int, following: int, kept: float) -> float:
    """Of the steps between two rows, or of the one that was being done: how many a later attempt did again."""
    if following <= step:
        return 1.0 if step >= kept else 0.0
    return min(1.0, max(0.0, (following - kept) / (following - step)))


def _part_of_tail(row: Row, phase: str) -> str:
    """What the time from the last row to an attempt's end was spent on."""
    if row.get("is_running") or phase in ("start", "first_step"):
        return PART_OF_PHASE.get(phase, "ending")
    if row.get("status") == EXIT_DONE or row.get("stopped"):
        return "ending"
    return "recomputed" if phase == "step" else PART_OF_PHASE.get(phase, "ending")


def _began(row: Row) -> float:
    return float(row["began"]) if "began" in row else _unix_seconds(row["started"])


def _ended(row: Row) -> float | None:
    """None where nobody saw the end."""
    if row.get("ended") is not None:
        return float(row["ended"])
    return _unix_seconds(row["end"]) if row.get("end") is not None else None


def _launched(row: Row) -> float | None:
    """When an attempt's launch was written: its id begins with that time; None where there is none, or one of another making."""
    with suppress(ValueError):
        return datetime.strptime(str(row.get("launch"))[:15], "%Y%m%d-%H%M%S").replace(tzinfo=timezone.utc).timestamp()
    return None


def _unix_seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _running(lease: Path, now: float, recorded: set[int]) -> dict[str, Any] | None:
    """The attempt that holds the run folder; one whose supervisor is gone and not yet written down ends with its last row."""
    with suppress(OSError, ValueError):
        row, renewed = json.loads(lease.read_text()), lease.stat().st_mtime
        if isinstance(row, dict) and row.get("attempt") is not None and row["attempt"] not in recorded:
            return {**row, "ended": now, "is_running": True} if now - renewed < LEASE_SECONDS else row
    return None
