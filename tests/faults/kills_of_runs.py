"""The campaigns of runs that are ended from outside, and go on by themselves: each has to end with the undisturbed run's bits.

    python -m tests.faults.kills_of_runs [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...] [--results FILE]

kills-N: SIGKILL of a random rank, the supervisor or all processes at random instants, at ZeRO stage N. stops: a polite signal to one or
all. loops: a rank that falls at the same step again and again. zombies: an attempt that slept through its own replacement, and two
commands on one folder. frequent: a fault every 60 steps. watched: what is written down of a run that is killed 20 times. Out: for each
kind a line (or an object of JSON) with how many were tried, how many went as promised, and the seed; each finished case is a line of FILE
at once. Exit status 1 if anything did not go as promised.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil

from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.faults.endless_runs import check_loop, check_zombie
from tests.faults.trainings import (
    BATCH,
    RUN_SECONDS,
    differences,
    family_of,
    lost_steps,
    prepare,
    ranks_of,
    read_ledger,
    settings_of,
    tell,
    training,
    wait_until,
)
from tests.faults.watched_runs import check_watched

STEPS, SAVE_EVERY = 300, 5
"""Of a run that is killed; as `settings_of` has it."""
GONE_SECONDS, GRACE_SECONDS, DECISION_SECONDS = 30, 30, 5
MOST_STARTS = 30
WATCHED_KILLS = 20
KILLS_PER_CASE, FREQUENT_STEPS, STEPS_BETWEEN_FAULTS = 5, 2000, 60
POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def check_kills(stage: int, kills: int, steps: int, case: Case) -> Outcome:
    """One run, killed so many times, started again by whoever starts runs again where the command itself was killed or gave up (75)."""
    settings, run = settings_of(steps, stage), case.folder / "runs" / "tiny"
    reference = case.prepared.reference(settings)
    said, problems, told = case.folder / "said.txt", list[str](), list[str]()
    for _ in range(MOST_STARTS):
        with training(case.prepared.dataset, case.folder, settings) as process:
            while len(told) < kills and wait_for_instant(case.chosen, process, run):
                victim, family = kill(case.chosen, process)
                told.append(f"{victim} at step {newest_begun(run)}")
                if victim != "rank":
                    left = psutil.wait_procs(family, timeout=GONE_SECONDS)[1]
                    problems += [f"{GONE_SECONDS} s after {told[-1]} there still was {one}" for one in left]
                    break
            code = process.wait(RUN_SECONDS)
        if code not in (75, -signal.SIGKILL):
            break
    if code:
        problems.append(f"the command ended with {code}: {said.read_text()[-1500:]}")
    else:
        problems += differences(run, reference)
    if (most := max(lost_steps(run), default=0)) > 2 * SAVE_EVERY:  # behind a save that was begun and not yet committed
        problems.append(f"{most} steps were lost at once")
    problems += [f"there still is {path}" for path in (run / "checkpoints").glob(".tmp-*")]
    return Outcome(len(told), [f"{', '.join(told)}: {problem}" for problem in problems])


def wait_for_instant(chosen: random.Random, process: subprocess.Popen[bytes], run: Path) -> bool:
    """Wait for a random instant, in a start or in training; whether the command still runs then."""
    if chosen.random() < 0.3:
        seconds = chosen.uniform(0, 10)
    else:
        before = num_begun(run)
        wait_until(lambda: process.poll() is not None or num_begun(run) > before, RUN_SECONDS)
        seconds = chosen.uniform(0, 2)
    wait_until(lambda: process.poll() is not None, seconds)
    return process.poll() is None


def kill(chosen: random.Random, process: subprocess.Popen[bytes]) -> tuple[str, list[psutil.Process]]:
    """SIGKILL one rank, the command alone, or every process of it in any order. Returns which, and all that the command had started."""
    ranks, family = ranks_of(process), family_of(process)
    victim = chosen.choice(("rank", "rank", "supervisor", "all")) if ranks else chosen.choice(("supervisor", "all"))
    if victim == "rank":
        tell([chosen.choice(ranks)], signal.SIGKILL)
    elif victim == "supervisor":
        process.kill()
    else:
        tell(chosen.sample(family, len(family)), signal.SIGKILL)
    return victim, family[1:]


def newest_begun(run: Path) -> int:
    """The last step that the newest attempt has begun."""
    return max((lines[-1]["seen"] // BATCH + 1 for lines in list(read_ledger(run).values())[-2:] if lines), default=0)


def check_stop(steps: int, case: Case) -> Outcome:
    """A polite signal, as a scheduler sends it, to one rank, the command or all processes: saved, 75, and no step done twice."""
    settings, run = settings_of(steps, checkpoint__every_steps="50"), case.folder / "runs" / "tiny"
    reference = case.prepared.reference(settings)
    number, whom = case.chosen.choice(POLITE), case.chosen.choice(("one rank", "command", "all"))
    early = case.chosen.random() < 0.4
    seconds = case.chosen.uniform(0, 8) if early else case.chosen.uniform(0, 4)
    problems: list[str] = []
    with training(case.prepared.dataset, case.folder, settings) as process:
        if not early:
            wait_until(lambda: bool(read_ledger(run)) or process.poll() is not None, RUN_SECONDS)
        elif not wait_until((run / "lease.json").exists, 60):  # before, the command is not yet a run, and ends as any other
            problems.append("it did not begin")
        time.sleep(seconds)
        ranks = ranks_of(process)
        victims = [psutil.Process(process.pid)] if whom == "command" or not ranks else [case.chosen.choice(ranks)]
        tell(family_of(process) if whom == "all" else victims, number)
        is_heard = bool(read_ledger(run)) or whom != "one rank"  # one that was still importing is ended by it; the next attempt follows
        began = time.monotonic()
        code = process.wait(RUN_SECONDS)
        took = time.monotonic() - began
    if is_heard and code != 75:
        problems.append(f"ended with {code}: {(case.folder / 'said.txt').read_text()[-1500:]}")
    if is_heard and took > GRACE_SECONDS:
        problems.append(f"took {took:.1f} s to save and end")
    with training(case.prepared.dataset, case.folder, settings) as process:
        if code := process.wait(RUN_SECONDS):
            problems.append(f"the next start ended with {code}: {(case.folder / 'said.txt').read_text()[-1500:]}")
    problems += differences(run, reference)
    if is_heard and any(lost_steps(run)):
        problems.append(f"steps were done twice: {lost_steps(run)}")
    return Outcome(1, [f"{number.name} to {whom}, {seconds:.2f} s into {'the start' if early else 'training'}: {one}" for one in problems])


def check_frequent(steps: int, case: Case) -> Outcome:
    """A rank is killed every 60 steps in the mean, for thousands of steps, with a fast place in memory that is saved to in each step.

    97 % of the steps count; of one fault no more than a step is lost; the next attempt begins within 5 s. The time of each step is that of
    a toy, so the share is of steps; of the time in training, what the median step does not explain is told on stderr.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as fast:
        saving = {"every_steps": "20", "fast_folder": fast, "fast_every_steps": "1", "asynchronous": "false"}
        settings = settings_of(steps, **{f"checkpoint__{key}": value for key, value in saving.items()})
        run, problems, decisions, num_killed = case.folder / "runs" / "tiny", list[str](), list[float](), 0
        with training(case.prepared.dataset, case.folder, settings) as process:
            until = case.chosen.expovariate(1 / STEPS_BETWEEN_FAULTS)
            while wait_until(partial(has_come_to, process, run, until), RUN_SECONDS) and process.poll() is None:
                ranks, before = ranks_of(process), lease_of(run)
                if not ranks or newest_begun(run) >= steps:
                    break
                tell([case.chosen.choice(ranks)], signal.SIGKILL)
                began, num_killed = time.monotonic(), num_killed + 1
                wait_until(lambda before=before: lease_of(run) not in ("", before) or process.poll() is not None, RUN_SECONDS)
                decisions.append(time.monotonic() - began)
                until = num_begun(run) + case.chosen.expovariate(1 / STEPS_BETWEEN_FAULTS)
            code = process.wait(RUN_SECONDS)
        if code:
            return Outcome(num_killed, [f"ended with {code}: {(case.folder / 'said.txt').read_text()[-1500:]}"])
        problems += differences(run, case.prepared.reference(settings_of(steps, checkpoint__every_steps="20")))
    share, lost = steps / num_begun(run), lost_steps(run)
    times = [[line["time"] for line in lines] for (_, rank), lines in read_ledger(run).items() if rank == 0]
    durations = sorted(later - time_ for one in times for time_, later in pairwise(one))
    efficient = steps * durations[len(durations) // 2] / sum(durations)
    told = f"{num_killed} faults in {steps} steps: {100 * share:.2f} % of the steps count, at most {max(lost, default=0)} lost at once"
    told += f", the next attempt begins within {max(decisions, default=0):.1f} s; of the time {100 * efficient:.1f} % is median steps"
    print(told, file=sys.stderr, flush=True)
    bounds = {"share of steps": share >= 0.97, "lost": max(lost, default=0) <= 1, "decision": max(decisions, default=0) <= DECISION_SECONDS}
    return Outcome(num_killed, problems + [f"{name} out of bounds: {told}" for name, is_met in bounds.items() if not is_met])


def has_come_to(process: subprocess.Popen[bytes], run: Path, num_steps: float) -> bool:
    """Whether so many steps were begun, or the command has ended."""
    return process.poll() is not None or num_begun(run) >= num_steps


def num_begun(run: Path) -> int:
    """Steps that rank 0 has begun, those done again included."""
    return sum(len(lines) for (_, rank), lines in read_ledger(run).items() if rank == 0)


def lease_of(run: Path) -> str:
    """What says who holds the run; empty while nobody does."""
    try:
        return (run / "lease.json").read_text()
    except FileNotFoundError:
        return ""


KINDS = {
    kind.name: kind
    for kind in (
        *(Kind(f"kills-{stage}", 40, KILLS_PER_CASE, prepare, partial(check_kills, stage, KILLS_PER_CASE, STEPS)) for stage in (1, 2, 3)),
        Kind("watched", 1, WATCHED_KILLS, prepare, partial(check_watched, WATCHED_KILLS, 200)),
        Kind("stops", 100, 1, prepare, partial(check_stop, 150)),
        Kind("loops", 6, 1, prepare, check_loop),
        Kind("zombies", 6, 1, prepare, check_zombie),
        Kind("frequent", 1, FREQUENT_STEPS // STEPS_BETWEEN_FAULTS, prepare, partial(check_frequent, FREQUENT_STEPS)),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("kills_of_runs", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
