"""Where the time of traced steps goes: a pure function of a trace.

In: events of a Chrome trace that torch.profiler wrote, with a span named `step N` around each step. Out: a `Breakdown`: for how long
something was computed, only communicated, only copied, nothing ran at all; the operations that took the time; collectives; the longest
gaps. And the same as a page of Markdown.

On a GPU what counts is what ran on the device: kernels (those of NCCL communicate) and copies. On a CPU it is the operations of torch,
and gloo's collectives, which have threads of their own. A collective is exposed while nothing is computed beside it.
"""

import gzip
import json
import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

STEP_SPAN = "step {}"
"""The name of the span around a step."""
SHOWN, NUM_GAPS = 20, 5
"""Rows of a page's tables; gaps that are kept."""

OPERATION, KERNEL, SPAN = "cpu_op", "kernel", "user_annotation"
COPIES = ("gpu_memcpy", "gpu_memset")
"""torch.profiler's categories of events."""

Interval = tuple[float, float]
"""From, to: microseconds."""


class Event(NamedTuple):
    """Something that took time."""

    category: str
    name: str
    began: float
    ended: float
    """Microseconds, by the trace's clock."""
    thread: Any = None
    """Of the host, or the device's stream."""
    link: int | None = None
    """What an operation and the kernels that it started have in common."""


@dataclass(frozen=True)
class Operation:
    """What one kind of operation, kernel or collective took, in all traced steps."""

    name: str
    seconds: float
    share: float
    """Of the time that the steps took; side by side on several streams or threads they may have more than 1 together."""
    count: int


@dataclass(frozen=True)
class Gap:
    """A time in which nothing ran."""

    seconds: float
    after_seconds: float
    """Since the first step began."""
    behind: str
    before: str
    """What ended before it, what began after it."""


@dataclass(frozen=True)
class Breakdown:
    """Where the time of some steps went. `computation`, `exposed_communication`, `copies` and `nothing` add up to `seconds`."""

    steps: tuple[int, int]
    """The first and the last."""
    device: str
    """`cuda` or `cpu`: whose time it is."""
    seconds: float
    """Of all of them."""
    seconds_per_step: float
    seconds_between_steps: float
    """Of evaluations, saves, rows of metrics.jsonl between two steps; counted nowhere else."""
    computation: float
    """Seconds in which at least one operation or kernel ran that computes."""
    exposed_communication: float
    """Seconds of communication while nothing was computed."""
    copies: float
    """Seconds of copies in the device's memory, or to or from it, while nothing else ran."""
    nothing: float
    """Seconds in which nothing ran: on a GPU it was idle, on a CPU Python was between two operations, or waited."""
    communication: float
    """Seconds of communication, hidden or not."""
    num_gaps: int
    longest_gaps: tuple[Gap, ...]
    operations: tuple[Operation, ...]
    """By their own time, without what they call; on a GPU the time of the kernels that they started."""
    kernels: tuple[Operation, ...]
    """On a GPU."""
    collectives: tuple[Operation, ...]

    @property
    def num_steps(self) -> int:
        """How many were traced."""
        return self.steps[1] - self.steps[0] + 1

    def to_json(self) -> dict[str, Any]:
        """As it stands in `rank-R.json`."""
        return asdict(self)


def read_events(path: Path) -> list[Event]:
    """The events with a duration of a trace that torch.profiler wrote, `.json` or `.json.gz`.

    Raises OSError, and ValueError where it is not whole.
    """

    def keep(found: dict[str, Any]) -> Any:
        """Of each event as soon as it is read what is needed: traces are large."""
        if "ph" not in found:
            return found
        if found["ph"] != "X" or found.get("cat") not in (OPERATION, KERNEL, SPAN, *COPIES):
            return None
        began = float(found["ts"])
        link = found.get("args", {}).get("External id")
        return Event(found["cat"], str(found["name"]), began, began + float(found["dur"]), found.get("tid"), link)

    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        trace = json.load(file, object_hook=keep)
    return [event for event in trace["traceEvents"] if event is not None]


# --- arithmetic of intervals ----------------------------------------------------------------------------------


def unite(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union: ascending, apart from each other, none empty."""
    united: list[Interval] = []
    for began, ended in sorted(intervals):
        if united and began <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], ended))
        elif ended > began:
            united.append((began, ended))
    return united


def subtract(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of a union is in none of another union's intervals. Both as `unite` gives them."""
    left: list[Interval] = []
    first = 0
    for began, ended in intervals:
        while first < len(others) and others[first][1] <= began:
            first += 1
        number = first
        while number < len(others) and others[number][0] < ended:
            if others[number][0] > began:
                left.append((began, others[number][0]))
            began = max(began, others[number][1])
            number += 1
        if began < ended:
            left.append((began, ended))
    return left


def intersect(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What two unions have in common."""
    return subtract(intervals, subtract(intervals, others))


def seconds_of(intervals: Iterable[Interval]) -> float:
    """Their length together."""
    return sum(ended - began for began, ended in intervals) / 1e6


def own_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event with the seconds that it took itself, without those of the events of its thread that lie within it."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    found: list[tuple[Event, float]] = []
    for of_thread in threads.values():
        open_ones: list[tuple[Event, list[float]]] = []  # outermost first, with what lies directly within each
        for event in sorted(of_thread, key=lambda one: (one.began, -one.ended)):
            while open_ones and open_ones[-1][0].ended <= event.began:
                _close(open_ones, found)
            if open_ones:
                open_ones[-1][1].append(min(event.ended, open_ones[-1][0].ended) - event.began)
            open_ones.append((event, []))
        while open_ones:
            _close(open_ones, found)
    return found


def _close(open_ones: list[tuple[Event, list[float]]], found: list[tuple[Event, float]]) -> None:
    event, within = open_ones.pop()
    found.append((event, (event.ended - event.began - sum(within)) / 1e6))


# --- the breakdown -------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    """What ran in some windows of time."""

    device: str
    computing: list[Event]
    collectives: list[Event]
    copying: list[Event]
    operations: list[tuple[str, float]]
    """Names with seconds of their own."""


def break_down(events: Sequence[Event]) -> Breakdown:
    """Where the time of the traced steps went. Raises ValueError where there is none."""
    pattern = re.compile(STEP_SPAN.format(r"(\d+)"))
    spans = {int(match[1]): event for event in events if event.category == SPAN and (match := pattern.fullmatch(event.name))}
    if not spans:
        raise ValueError("the trace holds no step")
    starters = {event.link: event for event in events if event.category == OPERATION and event.link is not None}
    on_device = [event for event in events if event.category in (KERNEL, *COPIES)]
    windows = _windows(sorted(spans.values(), key=lambda span: span.began), on_device, starters)
    there = [event for event in events if _overlap(event, windows)]
    running = _on_gpu(there, windows, starters) if on_device else _on_cpu(there, next(iter(spans.values())).thread)
    groups = running.computing, running.collectives, running.copying
    computed, communicated, copied = (intersect(unite((one.began, one.ended) for one in group), windows) for group in groups)
    gaps = subtract(windows, unite([*computed, *communicated, *copied]))
    whole = seconds_of(windows)

    def tabulate(*groups: Iterable[Event]) -> tuple[Operation, ...]:
        return _tabulate(((event.name, _overlap(event, windows)) for group in groups for event in group), whole)

    return Breakdown(
        steps=(min(spans), max(spans)),
        device=running.device,
        seconds=whole,
        seconds_per_step=whole / len(spans),
        seconds_between_steps=(windows[-1][1] - windows[0][0]) / 1e6 - whole,
        computation=seconds_of(computed),
        exposed_communication=seconds_of(subtract(communicated, computed)),
        copies=seconds_of(subtract(copied, unite([*computed, *communicated]))),
        nothing=seconds_of(gaps),
        communication=seconds_of(communicated),
        num_gaps=len(gaps),
        longest_gaps=_longest(gaps, [event for group in groups for event in group], windows),
        operations=_tabulate(running.operations, whole),
        kernels=tabulate(*groups) if on_device else (),
        collectives=tabulate(running.collectives),
    )


def _on_gpu(there: Iterable[Event], windows: Sequence[Interval], starters: Mapping[int, Event]) -> _Running:
    kernels = [event for event in there if event.category == KERNEL]
    copying = [event for event in there if event.category in COPIES]
    operations = [
        (event.name if (starter := _starter(event, starters)) is None else starter.name, _overlap(event, windows))
        for event in (*kernels, *copying)
    ]
    computing = [event for event in kernels if not event.name.startswith("nccl")]
    return _Running("cuda", computing, [event for event in kernels if event.name.startswith("nccl")], copying, operations)


def _on_cpu(there: Iterable[Event], main_thread: Any) -> _Running:
    collectives = [event for event in there if event.name.startswith("gloo:")]
    # What gloo's own threads do belongs to the collective.
    theirs = {event.thread for event in collectives} - {main_thread}
    host = [event for event in there if event.category == OPERATION and event.thread not in theirs]
    computing = [event for event in host if not event.name.startswith(("gloo:", "c10d::", "record_param_comms"))]
    return _Running("cpu", computing, collectives, [], [(event.name, seconds) for event, seconds in own_times(host)])


def _starter(event: Event, starters: Mapping[int, Event]) -> Event | None:
    """The operation on the host that started a kernel."""
    return None if event.link is None else starters.get(event.link)


def _windows(spans: Sequence[Event], on_device: Iterable[Event], starters: Mapping[int, Event]) -> list[Interval]:
    """The times of steps. A device works behind the host: a step's time goes on until what was started in it has ended."""
    ends = [span.ended for span in spans]
    begins = [span.began for span in spans]
    for event in on_device:
        if (starter := _starter(event, starters)) is not None:
            number = bisect_right(begins, starter.began) - 1
            if number >= 0 and starter.began < spans[number].ended:
                ends[number] = max(ends[number], event.ended)
    return unite(zip(begins, ends, strict=True))


def _overlap(event: Event, windows: Sequence[Interval]) -> float:
    """Seconds of an event that lie in some windows, ascending and apart from each other."""
    number = bisect_right(windows, (event.began, math.inf)) - 1
    microseconds = 0.0
    for began, ended in windows[max(0, number) :]:
        if began >= event.ended:
            break
        microseconds += max(0.0, min(ended, event.ended) - max(began, event.began))
    return microseconds / 1e6


def _tabulate(times: Iterable[tuple[str, float]], whole: float) -> tuple[Operation, ...]:
    """By name, what took longest first. times: names with seconds."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, seconds in times:
        found[name].append(seconds)
    rows = (Operation(name, sum(of_name), sum(of_name) / whole, len(of_name)) for name, of_name in found.items())
    return tuple(sorted(rows, key=lambda row: (-row.seconds, row.name)))


def _longest(gaps: Iterable[Interval], running: Sequence[Event], windows: Sequence[Interval]) -> tuple[Gap, ...]:
    """The longest gaps, with what stands on both sides."""
    begins, ends = {began for began, _ in windows}, {ended for _, ended in windows}
    found: list[Gap] = []
    for began, ended in sorted(gaps, key=lambda gap: gap[0] - gap[1])[:NUM_GAPS]:
        last = max((event for event in running if event.ended <= began), key=lambda event: event.ended, default=None)
        first = min((event for event in running if event.began >= ended), key=lambda event: event.began, default=None)
        behind = "a step's beginning" if began in begins or last is None else last.name
        before = "a step's end" if ended in ends or first is None else first.name
        found.append(Gap((ended - began) / 1e6, (began - windows[0][0]) / 1e6, behind, before))
    return tuple(found)


# --- as a page -----------------------------------------------------------------------------------------------


def summarize(found: Breakdown) -> str:
    """The breakdown in a line."""
    parts = [f"{seconds / found.seconds:.0%} {name}" for name, seconds in _parts(found).items() if seconds]
    return f"a step took {found.seconds_per_step:.3g} s under the tracer: {', '.join(parts)}"


def to_markdown(found: Breakdown, title: str) -> str:
    """The breakdown as a page. title: whose it is."""
    whose = "the GPU" if found.device == "cuda" else "the CPU"
    took = [
        f"A step took {1000 * found.seconds_per_step:.1f} ms, on average over {found.num_steps}; without the tracer it takes less.",
        f"Between steps, where evaluations and saves lie, were another {1000 * found.seconds_between_steps:.1f} ms in all.",
    ]
    parts = {**_parts(found), "together": found.seconds}
    hidden = 1 - found.exposed_communication / found.communication if found.communication else 0.0
    communication = [
        f"{_per_step(found, found.communication)} ms a step, waiting for other ranks included, {hidden:.0%} of it beside computation.",
        _operations(found, found.collectives),
    ]
    gaps = [
        [f"{1000 * gap.seconds:.3f}", f"{1000 * gap.after_seconds:.3f}", _code(gap.behind), _code(gap.before)] for gap in found.longest_gaps
    ]
    sections = [
        f"# {title}",
        " ".join(took[: 1 if found.num_steps == 1 else 2]),
        f"## What {whose} did",
        _table(["", "ms a step", "share"], [[name, _per_step(found, part), f"{part / found.seconds:.1%}"] for name, part in parts.items()]),
        "## Operations, by their own time",
        _operations(found, found.operations),
        *(["## Kernels and copies", _operations(found, found.kernels)] if found.kernels else []),
        "## Communication",
        *(communication if found.collectives else ["There was none."]),
        f"## The longest of {found.num_gaps:,} times in which nothing ran",
        _table(["ms", "ms since the beginning", "behind", "before"], gaps) if gaps else "There was none.",
    ]
    return "\n\n".join(sections) + "\n"


def _parts(found: Breakdown) -> dict[str, float]:
    """What the time of the steps is divided into: seconds by name."""
    return {
        "computation": found.computation,
        "communication that nothing hides": found.exposed_communication,
        "copies that nothing hides": found.copies,
        "nothing runs": found.nothing,
    }


def _per_step(found: Breakdown, seconds: float) -> str:
    return f"{1000 * seconds / found.num_steps:.3f}"


def _operations(found: Breakdown, rows: Sequence[Operation]) -> str:
    cells = [
        [_code(row.name), _per_step(found, row.seconds), f"{row.share:.1%}", f"{row.count / found.num_steps:,.4g}"] for row in rows[:SHOWN]
    ]
    if rest := rows[SHOWN:]:
        seconds, count = sum(row.seconds for row in rest), sum(row.count for row in rest)
        cells.append(
            [f"{len(rest)} others", _per_step(found, seconds), f"{seconds / found.seconds:.1%}", f"{count / found.num_steps:,.4g}"]
        )
    return _table(["", "ms a step", "share", "times a step"], cells)


def _code(name: str) -> str:
    """A name as code in a cell; names of kernels are long, and hold what a table would read."""
    shown = name if len(name) <= 100 else f"{name[:99]}…"
    return f"`{shown.replace('|', '/').replace('`', chr(39))}`"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
