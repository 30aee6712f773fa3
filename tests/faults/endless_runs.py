"""Runs that must not go on for ever, and attempts that must not go on at all.

In: a case. Out: whether a crash loop was ended when nothing came of it any more (and only then), and whether an attempt that slept
through its replacement, or a second command on the folder, changed nothing.
"""

import json
import signal
import time
from pathlib import Path

import psutil

from tests.faults.campaign import Case, Outcome
from tests.faults.trainings import (
    RUN_SECONDS,
    attempts_of,
    differences,
    family_of,
    learnt,
    ranks_of,
    read_ledger,
    settings_of,
    tell,
    training,
    wait_until,
)

STEPS, SAVE_EVERY = 60, 5
LOOPS = ("killed", "raises", "progress")
REFUSED = 2


def check_loop(case: Case) -> Outcome:
    """A rank falls at the same step in every attempt (killed: three in vain; an error that is told: two equal ones), or behind saves."""
    kind, rank = LOOPS[case.number % len(LOOPS)], case.chosen.randrange(2)
    step = case.chosen.randrange(2 * SAVE_EVERY + 1, STEPS)
    settings, run = settings_of(STEPS, checkpoint__asynchronous="false"), case.folder / "runs" / "tiny"
    problems: list[str] = []
    if kind == "progress":
        return _check_progress(case, settings, run)
    with training(case.prepared.dataset, case.folder, settings, {"rank": rank, "steps": [step], "how": kind}) as process:
        code = process.wait(RUN_SECONDS)
    said, attempts = (case.folder / "said.txt").read_text(), attempts_of(run)
    committed = step - step % SAVE_EVERY
    # The first attempt has made commits; those behind it fall where it fell.
    wanted = {"killed": (75, 4, "3 attempts in a row ended without a new checkpoint"), "raises": (1, 2, "it failed twice in the same way")}
    status, num_attempts, words = wanted[kind]
    if code != status or len(attempts) != num_attempts or words not in said:
        problems.append(f"ended with {code} behind {len(attempts)} attempts, wanted {status} behind {num_attempts}: {said[-1500:]}")
    if [row["committed"] for row in attempts] != [committed] * len(attempts):
        problems.append(f"committed {[row['committed'] for row in attempts]}, wanted {committed}")
    with training(case.prepared.dataset, case.folder, settings) as process:  # mended, it goes on
        code = process.wait(RUN_SECONDS)
    problems += [f"mended, it ended with {code}"] if code else differences(run, case.prepared.reference(settings))
    return Outcome(1, [f"{kind} at step {step} of rank {rank}: {problem}" for problem in problems])


def _check_progress(case: Case, settings: dict[str, str], run: Path) -> Outcome:
    """A rank is killed again and again, each time behind a new commit: never given up."""
    settings, kills, problems, told = {**settings, "checkpoint.keep": "9"}, 5, list[str](), list[int]()
    with training(case.prepared.dataset, case.folder, settings) as process:
        for _ in range(kills):
            before = _newest(run)
            wait_until(lambda before=before: _newest(run) > before or process.poll() is not None, RUN_SECONDS)
            ranks = ranks_of(process)
            if not ranks or _newest(run) >= STEPS:
                break
            told.append(_newest(run))
            tell(ranks[:1], signal.SIGKILL)
            psutil.wait_procs(ranks, timeout=RUN_SECONDS)
        code = process.wait(RUN_SECONDS)
    if code or len(attempts_of(run)) != len(told) + 1:
        problems.append(f"ended with {code} behind {len(attempts_of(run))} attempts: {(case.folder / 'said.txt').read_text()[-1500:]}")
    problems += differences(run, case.prepared.reference(settings))
    return Outcome(1, [f"killed behind steps {told}: {problem}" for problem in problems])


def _newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def check_zombie(case: Case) -> Outcome:
    """Odd cases: two commands on one folder. Even ones: all of an attempt is stopped, its lease looks like another host's, a second
    command takes over, the first wakes up in the middle of it."""
    settings, run = settings_of(4 * STEPS), case.folder / "runs" / "tiny"
    reference, problems = case.prepared.reference(settings), list[str]()
    with training(case.prepared.dataset, case.folder, settings) as first:
        wait_until(lambda: bool(read_ledger(run)) or first.poll() is not None, RUN_SECONDS)
        time.sleep(case.chosen.uniform(0, 1.5))
        if case.number % 2:
            with training(case.prepared.dataset, case.folder, settings) as second:
                codes = (second.wait(RUN_SECONDS), first.wait(RUN_SECONDS))
            said = (case.folder / "said.txt").read_text()
            if codes != (REFUSED, 0) or f"is in use by process {first.pid} on" not in said:
                problems.append(f"the second ended with {codes[0]}, the first with {codes[1]}: {said[-1500:]}")
        else:
            family = family_of(first)
            tell(family, signal.SIGSTOP)
            time.sleep(0.2)
            lease = json.loads((run / "lease.json").read_text())
            (run / "lease.json").write_text(json.dumps({**lease, "host": "another-host"}))
            with training(case.prepared.dataset, case.folder, settings) as second:
                wait_until(lambda: any(attempt > 1 for attempt, _ in read_ledger(run)) or second.poll() is not None, RUN_SECONDS)
                time.sleep(case.chosen.uniform(0, 1.0))
                tell(reversed(family), signal.SIGCONT)
                codes = (first.wait(RUN_SECONDS), second.wait(RUN_SECONDS))
            if codes != (REFUSED, 0):
                said = (case.folder / "said.txt").read_text()
                problems.append(f"the zombie ended with {codes[0]}, the other with {codes[1]}: {said[-1500:]}")
            writers = {int(json.loads((path / "MANIFEST.json").read_text())["attempt"]) for path in (run / "checkpoints").glob("step-*")}
            if writers != {2}:
                problems.append(f"the commits are of attempts {sorted(writers)}")
    found = learnt(run)
    if (found.state, found.rows) != (reference.state, reference.rows):
        problems.append(f"bits or rows differ: {len(found.rows)} rows, wanted {len(reference.rows)}")
    problems += [f"there still is {path}" for path in (run / "checkpoints").glob(".tmp-*")]
    return Outcome(1, problems)
