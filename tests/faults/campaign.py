"""What every kind of fault is made of: a case with its own chance and folder, and what came of it. And the command line of a campaign.

In: a kind, a seed, the numbers of the cases. Out: a `Result`. A case depends on its seed and number alone, so each can be
repeated without those before it.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SHOWN_CHARACTERS = 2000
SECONDS_BETWEEN_LINES = 5


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
    began = last_told = time.monotonic()
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
            now = time.monotonic()
            if now - last_told > SECONDS_BETWEEN_LINES or place + 1 == len(cases) or outcome.problems:
                last_told = now
                told = f"{kind.name}: {place + 1} of {len(cases)} cases, {tried} faults, {len(problems)} problems"
                print(f"{told}, {now - began:.0f} s", file=sys.stderr, flush=True)
    return Result(kind.name, tried, passed, seed, problems, time.monotonic() - began)


def run_campaign(name: str, about: str | None, kinds: Mapping[str, Kind], arguments: Sequence[str] | None = None) -> int:
    """The command `python -m tests.faults.NAME`: run the kinds that are asked for; the exit status."""
    asked = _parse(name, about, kinds, arguments)
    num_failed = 0
    for kind in (kinds[one] for one in asked.kind or kinds):
        if asked.results:
            kind = replace(kind, check=partial(_recording, kind, asked.seed, asked.results))
        result = run_kind(kind, asked.seed, asked.case or choose_cases(kind, asked.seed, asked.sample))
        num_failed += bool(result.problems)
        _tell(name, result, asked.json)
    return 1 if num_failed else 0


def _parse(name: str, about: str | None, kinds: Mapping[str, Kind], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m tests.faults.{name}", description=(about or "").partition("\n")[0])
    parser.add_argument("--sample", type=float, default=1.0, metavar="SHARE", help="run this share of each kind's cases (default: all)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="repeat a campaign (default: a new one)")
    parser.add_argument("--json", action="store_true", help="one object for each kind instead of a line")
    parser.add_argument("--kind", action="append", choices=list(kinds), help="only this kind; may be given several times")
    parser.add_argument("--case", action="append", type=int, help="only the case of this number; may be given several times")
    parser.add_argument("--results", type=Path, help="append each finished case to this file; folders of failed ones are kept beside it")
    return parser.parse_args(arguments)


def _tell(name: str, result: Result, as_json: bool) -> None:
    facts = {"kind": result.kind, "tried": result.tried, "passed": result.passed, "seed": result.seed}
    if as_json:
        print(json.dumps({**facts, "problems": result.problems, "seconds": round(result.seconds, 1)}), flush=True)
        return
    print(f"{result.kind:<20}  tried {result.tried:>5}  passed {result.passed:>5}  seed {result.seed}", flush=True)
    for problem in result.problems:
        print(f"    {problem}", flush=True)
    if result.problems:
        print(f"    to repeat: python -m tests.faults.{name} --kind {result.kind} --seed {result.seed} --case NUMBER", flush=True)


def _recording(kind: Kind, seed: int, results: Path, case: Case) -> Outcome:
    """The kind's check; what came of it is in a file at once, so that a campaign that is cut short has not been in vain."""
    outcome = kind.check(case)
    with results.open("a") as file:
        file.write(json.dumps({"kind": kind.name, "seed": seed, "case": case.number, **asdict(outcome)}) + "\n")
    if outcome.problems:
        shutil.copytree(case.folder, results.parent / f"{kind.name}-{seed}-{case.number}", dirs_exist_ok=True)
    return outcome


def run_sample(name: str, kind: str, seed: int, share: float, timeout_seconds: float = 500) -> dict[str, Any]:
    """A sample of one kind, as the tests run it: in a process of its own, for cases fork and count their descendants.

    Returns what the campaign says of it, where all ended as promised; else it fails, with what repeats it.
    """
    command = [sys.executable, "-m", f"tests.faults.{name}", "--json", "--kind", kind, "--seed", str(seed), "--sample", str(share)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    assert done.stdout, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["problems"], "\n".join([*found["problems"], f"to repeat: python {' '.join(command[1:])}"])
    assert (done.returncode, found["kind"], found["seed"]) == (0, kind, seed)
    assert found["tried"] == found["passed"] > 0
    return found


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
