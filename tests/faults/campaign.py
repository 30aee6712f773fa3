"""What every kind of fault is made of: a case with its own chance and folder, and what came of it.

In: a kind, a seed, the numbers of the cases. Out: a `Result`. A case depends on its seed and number alone, so each can be
repeated without those before it.
"""

import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Case:
    """One repeatable try."""

    number: int
    chosen: random.Random
    """All of its chance."""
    folder: Path
    """Its own, empty, removed when it is done."""
    prepared: Any
    """What the kind's `prepare` gave."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    tried: int
    """Faults: a case may hold several."""
    problems: list[str]
    """What is not as promised, a sentence each; empty: all passed."""
    passed: int | None = None
    """None: all, or none where there is a problem."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    num_cases: int
    faults_per_case: int
    prepare: Callable[[Path, random.Random], Any]
    """Makes what all cases share, in a folder: the same for the same chance."""
    check: Callable[[Case], Outcome]


@dataclass(frozen=True)
class Result:
    """What came of a kind."""

    kind: str
    tried: int
    passed: int
    seed: int
    problems: list[str]
    seconds: float


def run_kind(kind: Kind, seed: int, cases: Sequence[int]) -> Result:
    """Run the cases of a kind by their numbers, telling on stderr how far it is."""
    began = time.monotonic()
    tried = passed = 0
    problems: list[str] = []
    with _working_folder() as folder:
        shared = folder / "shared"
        shared.mkdir()
        prepared = kind.prepare(shared, random.Random(f"{seed} {kind.name}"))
        for place, number in enumerate(cases):
            own = folder / f"case-{number}"
            own.mkdir()
            outcome = _run_case(kind, Case(number, random.Random(f"{seed} {kind.name} {number}"), own, prepared))
            shutil.rmtree(own, ignore_errors=True)
            tried += outcome.tried
            passed += outcome.passed if outcome.passed is not None else 0 if outcome.problems else outcome.tried
            problems += [f"case {number}: {problem[:SHOWN_CHARACTERS]}" for problem in outcome.problems]
            told = f"{kind.name}: {place + 1} of {len(cases)} cases, {tried} faults, {len(problems)} problems"
            print(f"{told}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return Result(kind.name, tried, passed, seed, problems, time.monotonic() - began)


def choose_cases(kind: Kind, seed: int, share: float) -> list[int]:
    """Which cases a sample runs: at least one."""
    wanted = max(1, round(kind.num_cases * share))
    return sorted(random.Random(f"{seed} {kind.name} sample").sample(range(kind.num_cases), min(wanted, kind.num_cases)))


@contextmanager
def _working_folder() -> Generator[Path, None, None]:
    """A folder for all that a kind writes, also for what the builds put into the system's folder for temporary files."""
    with tempfile.TemporaryDirectory(prefix="f-", ignore_cleanup_errors=True) as name:  # a short name: Ray puts sockets below it
        before = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = name
        try:
            yield Path(name).resolve()
        finally:
            tempfile.tempdir = before[0]
            del os.environ["TMPDIR"]
            os.environ |= {"TMPDIR": before[1]} if before[1] is not None else {}


def _run_case(kind: Kind, case: Case) -> Outcome:
    try:
        return kind.check(case)
    except Exception:
        return Outcome(kind.faults_per_case, [traceback.format_exc()], passed=0)
