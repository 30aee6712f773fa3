"""Whether a rank hangs, and which: judged from outside, in the supervisor.

In: what each rank says of itself (`heartbeat.py`), looked at several times a second, and the section `stall`. Out: the ranks that were
silent for longer than their phase may be; then, with where each one stands (`stacks.py`), the one that did not arrive. Pure but for what
is passed in.

All ranks of a training wait for the slowest, so one that hangs silences all: who is late first says nothing. The one that did not arrive
is the one whose process is stopped, else the one that has done fewest acts, else the one that does not wait in a collective.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from configs.errors import EXIT_RESUMABLE
from configs.stall_section import StallSection
from pretrain.run.heartbeat import Phase, Reading
from pretrain.run.outcome import Outcome, Verdict, decide
from pretrain.run.stacks import Place

FACTOR, LEAST_SECONDS, FIRST_SECONDS, END_SECONDS = 10.0, 180.0, 1800.0, 120.0
"""A learned limit: so many times the longest silence that was seen, and at least; until one was seen; of the end, which comes once."""
LONGEST_LOOK_SECONDS = 1.0
"""Time between two looks counts up to this: a supervisor that slept itself (a closed laptop, a stopped session) has seen nothing."""

SILENT = Reading(0, "start", 0, 0, 0)
"""A rank that has not said anything yet."""


class Late(NamedTuple):
    """A rank that was silent for too long."""

    rank: int
    reading: Reading
    seconds: float
    limit: float


def limit_of(phase: Phase, section: StallSection, longest: Mapping[Phase, float]) -> float:
    """Seconds that a rank may be silent in a phase. longest: the longest silence of each phase that ended well."""
    if phase == "gone":  # the agent that started it knows
        return math.inf
    given: float | None = getattr(section, f"{phase}_seconds")
    if given is not None:
        return given
    if phase == "end":
        return END_SECONDS
    if phase == "start" or phase not in longest:  # its first step compiles: what was before says nothing about it
        return FIRST_SECONDS
    return max(LEAST_SECONDS, FACTOR * longest[phase])


class Watchdog:
    """Counts, look by look, for how long each rank has been silent."""

    def __init__(self, section: StallSection, ranks: Sequence[int]) -> None:
        """ranks: those of this machine."""
        self._section, self._looked = section, -math.inf
        self._last = dict.fromkeys(ranks, SILENT)
        self._silent = dict.fromkeys(ranks, 0.0)
        self._longest: dict[Phase, float] = {}

    def look(self, readings: Mapping[int, Reading], now: float) -> list[Late]:
        """Ranks that are silent for longer than they may. readings: of each rank that has said something; now: monotonic, in seconds."""
        passed = min(now - self._looked, LONGEST_LOOK_SECONDS) if math.isfinite(self._looked) else 0.0
        self._looked = now
        late: list[Late] = []
        for rank, before in self._last.items():
            reading = readings.get(rank, SILENT)
            self._silent[rank] += passed
            if reading != before:
                if reading.phase != "gone":
                    self._longest[before.phase] = max(self._longest.get(before.phase, 0.0), self._silent[rank])
                self._last[rank], self._silent[rank] = reading, 0.0
            limit = limit_of(reading.phase, self._section, self._longest)
            if self._silent[rank] > limit:
                late.append(Late(rank, reading, self._silent[rank], limit))
        return late

    def silences(self, readings: Mapping[int, Reading]) -> list[Late]:
        """All ranks, for how long they have been silent: where another node's are late, the cause may be among these."""
        known = {rank: readings.get(rank, SILENT) for rank in self._last}
        return [Late(rank, one, self._silent[rank], limit_of(one.phase, self._section, self._longest)) for rank, one in known.items()]


def who_did_not_arrive(late: Sequence[Late], places: Mapping[int, Place]) -> Late | None:
    """The rank that the others wait for; None where all wait for each other."""
    unknown = Place("gone")
    if stopped := [one for one in late if "stop" in places.get(one.rank, unknown).state]:
        return stopped[0]
    fewest = min(one.reading.acts for one in late)
    behind = [one for one in late if one.reading.acts == fewest]
    if len(behind) > 1:
        behind = [one for one in behind if not places.get(one.rank, unknown).in_collective]
    return behind[0] if behind else None


def spell(late: Sequence[Late], places: Mapping[int, Place], name: Callable[[int], str]) -> str:
    """What hangs, in a line: the rank, its phase and step, and where it stands. name: what a rank is called, with its node."""
    missing = who_did_not_arrive(late, places)
    rank, reading, seconds, limit = missing or late[0]
    silence = f"silent for {seconds:.0f} s in phase {reading.phase}, step {reading.step} (limit {limit:.0f} s)"
    place = places.get(rank)
    if place is None:
        return f"{name(rank)} never said anything: {silence}"
    where = [f"its process is {place.state}"] if place.state not in ("running", "sleeping") else []
    where += (
        [f"at {place.lines[0]}" + (f" (other threads: {', '.join(place.lines[1:4])})" if place.lines[1:] else "")] if place.lines else []
    )
    text = f"{silence}; {', '.join(where) or 'no stack could be taken'}"
    return f"{name(rank)} did not arrive: {text}" if missing else f"all ranks wait for each other; {name(rank)} {text}"


def decide_stalled(late: Sequence[Late], stalled: str, records: Mapping[int, Outcome], total_steps: int) -> Verdict:
    """What is to be made of an attempt whose ranks were ended because some were silent. stalled: what `spell` said.

    A rank that had only to close and leave has done its work: the attempt ends as it would have, and that it hung is said.
    """
    if any(one.reading.phase != "end" and one.rank not in records for one in late):
        return Verdict(EXIT_RESUMABLE, stalled, is_fault=True)
    ended = dict(records)
    for rank, reading, _, _ in late:
        kind, words = ("done", "done") if reading.step >= total_steps else ("stopped", "stopped and saved")
        ended.setdefault(rank, Outcome(kind, f"{words}: {reading.step} steps of {total_steps}", None, reading.step))
    verdict = decide(ended, exit_codes={})
    return verdict._replace(message=f"{verdict.message}\nIt did not end by itself: {stalled}")
