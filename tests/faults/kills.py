"""Processes that are killed: Ray's workers, the driver, and two builds that meet in one folder.

In: a case. Out: whether the dataset ended with the bytes of the undisturbed build, and how much work was done twice.
"""

import json
import random
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.data_section import DataSection
from tests.faults.builds import (
    Driver,
    Ended,
    Here,
    build_here,
    count_committed,
    differences,
    name_of,
    reference_of,
    snapshot,
    start_driver,
)
from tests.faults.campaign import Case, Outcome
from tests.faults.corpora import NEAR, describe_build, write_corpora
from tests.faults.rules import PAUSE_SECONDS

WORKER_KILLS = 5
DRIVER_KILLS = 2
MOST_BUILDS = 6
ORPHAN_SECONDS = 30
STAGES = ("start", "plan", "tokenizer", "survey", "duplicates", "tokens", "manifest")
LATEST_SECONDS = {"start": 4.0, "plan": 0.3, "tokenizer": 0.5, "survey": 12.0, "duplicates": 1.0, "tokens": 6.0, "manifest": 0.05}
"""About how long a stage takes, start of Ray included: the latest moment in it that is drawn."""


@dataclass(frozen=True)
class Prepared:
    """Corpora, and the undisturbed build's files without and with deduplication."""

    corpora: Path
    references: tuple[dict[str, str], dict[str, str]]


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Write the corpora and build them undisturbed."""
    corpora = write_corpora(folder / "corpora", chosen)
    references = [reference_of(_describe(corpora, folder / f"reference-{near}", near, 1)) for near in (0, 1)]
    return Prepared(corpora, (references[0], references[1]))


def kill_workers(case: Case) -> Outcome:
    """Kill workers of builds until `WORKER_KILLS` were hit while their build ran; each build has to end as if nothing had been."""
    near, workers = case.number % 2, 1 + case.number // 2 % 3
    problems: list[str] = []
    num_killed = num_builds = 0
    while num_killed < WORKER_KILLS and num_builds < MOST_BUILDS and not problems:
        num_builds += 1
        data = _describe(case.prepared.corpora, case.folder / f"d{num_builds}", near, workers)
        killed, ended = _kill_workers_once(case, data, WORKER_KILLS - num_killed)
        num_killed += killed
        if ended.status == 2 and "its worker died" in ended.refusal:  # one unit was hit too often: given up, by design
            ended = build_here(data)
        problems += _compare(data, ended, case.prepared.references[near])
    if not num_killed:
        problems.append("no worker was hit")
    return Outcome(num_killed, problems)


def kill_drivers(case: Case) -> Outcome:
    """Kill a build's driver twice, each time at another moment, and let the third start end it."""
    near, workers = case.number // 2 % 2, 1 + case.number % 3
    data = _describe(case.prepared.corpora, case.folder / "d", near, workers)
    root = Path(data.folder())
    problems: list[str] = []
    drivers: list[Driver] = []
    killed: list[tuple[Driver, float, str]] = []
    scratches: set[Path] = set()
    finished: dict[str, int] = {}
    try:
        while len(killed) < DRIVER_KILLS and len(drivers) < MOST_BUILDS:
            stages = [stage for stage in STAGES if near or stage not in ("survey", "duplicates")]
            stage = case.chosen.choice(stages) if drivers else stages[case.number % len(stages)]
            driver = Driver(data, case.folder, "ray", {PAUSE_SECONDS: "0.003"})
            drivers.append(driver)
            if not _reach(driver, stage, case.chosen):  # it was quicker: once more from the start
                problems += _compare(data, driver.wait(), case.prepared.references[near])
                shutil.rmtree(root)
                finished = {}
                continue
            scratches |= _scratch_of(root)
            driver.kill(whole_session=case.chosen.random() < 0.4)
            killed.append((driver, time.monotonic(), stage))
            finished = {one: max(finished.get(one, 0), count) for one, count in _count_finished(driver, root).items()}
        with start_driver(data, case.folder) as last:
            ended = last.wait()
        problems += _compare(data, ended, case.prepared.references[near])
        kept = ended.result.get("kept_by_stage", {})
        problems += [
            f"{stage}: {finished[stage]} units were finished before a kill, {count} were kept"
            for stage, count in kept.items()
            if count < finished.get(stage, 0)
        ]
        for driver, when, stage in killed:
            if left := driver.orphans(when + ORPHAN_SECONDS):
                problems.append(f"{ORPHAN_SECONDS} s after a kill in {stage} there still ran: {left}")
        problems += [f"the temporary folder {scratch} of a killed build was left" for scratch in scratches if scratch.exists()]
    finally:
        for driver in drivers:
            driver.close()
        for scratch in scratches:
            shutil.rmtree(scratch, ignore_errors=True)
    return Outcome(len(killed), problems)


def meet(case: Case) -> Outcome:
    """Two builds started at once, or nearly, on one folder: one is refused or finds the work done, the other ends right."""
    near = case.number // 2 % 2
    data = _describe(case.prepared.corpora, case.folder / "d", near, 1)
    delay = case.chosen.choice((0.0, case.chosen.uniform(0, 0.02), case.chosen.uniform(0, 1.5)))
    if case.number % 3 == 0:
        with start_driver(data, case.folder) as first:
            time.sleep(10 * delay)
            with start_driver(data, case.folder) as second:
                pids, ends = (first.pid, second.pid), (first.wait(), second.wait())
    else:
        one = Here(data, False, lambda: None)
        time.sleep(delay)
        other = Here(data, False, lambda: None)
        pids, ends = (one.pid, other.pid), (one.wait(), other.wait())
    outcomes = [end.result.get("outcome", "") or ("refused" if end.status == 2 else str(end)) for end in ends]
    problems: list[str] = []
    if sorted(outcomes) not in (["built", "refused"], ["built", "unchanged"]):
        problems.append(f"{delay:.3f} s between the starts: {outcomes}")
    for end, other_pid in zip(ends, reversed(pids), strict=True):
        if end.refusal and f"another build is at work there (process {other_pid} on " not in end.refusal:
            problems.append(f"{delay:.3f} s between the starts: the refusal does not name process {other_pid}: {end.refusal}")
    problems += differences(snapshot(Path(data.folder())), case.prepared.references[near])
    return Outcome(1, problems)


def _describe(corpora: Path, root: Path, near: int, workers: int) -> DataSection:
    return describe_build(corpora, root, deduplicate=NEAR if near else None, workers=workers)


def _compare(data: DataSection, ended: Ended, reference: dict[str, str]) -> list[str]:
    """What is wrong with a build that should have ended well."""
    if ended.status != 0:
        return [f"the build ended with {ended}"]
    return differences(snapshot(Path(data.folder())), reference)


def _kill_workers_once(case: Case, data: DataSection, wanted: int) -> tuple[int, Ended]:
    """Build, and kill workers on the way, at most `wanted`; how many were hit, and how the build ended."""
    num_killed = 0
    with start_driver(data, case.folder, environment={PAUSE_SECONDS: "0.01"}) as driver:
        deadline = time.monotonic() + 200
        while num_killed < wanted and driver.is_running and time.monotonic() < deadline:
            if not _wait_for_moment(case, driver, Path(data.folder())):
                continue
            busy = driver.workers(is_busy=True)
            if busy and _kill_worker(driver, case.chosen.choice(busy)):
                num_killed += 1
        return num_killed, driver.wait()


def _wait_for_moment(case: Case, driver: Driver, root: Path) -> bool:
    """Wait until there are workers, and then for a random time, or until one of them is just writing."""
    while driver.is_running and not driver.workers(is_busy=True):
        time.sleep(0.02)
    if case.chosen.random() < 0.5:
        time.sleep(case.chosen.uniform(0, 1.0))
        return driver.is_running
    then = time.monotonic() + 3.0
    while driver.is_running and time.monotonic() < then:
        if any(_is_written_to(root / below) for below in ("survey", "units")):
            time.sleep(case.chosen.uniform(0, 0.02))
            return True
        time.sleep(0.002)
    return False


def _is_written_to(folder: Path) -> bool:
    """Whether a folder that is being filled has a file."""
    try:
        return any(True for _ in folder.glob(".tmp-*/*"))
    except OSError:  # it was given its final name meanwhile
        return False


def _kill_worker(driver: Driver, worker: psutil.Process) -> bool:
    """Kill a worker; whether it was one, and its build was running before and after."""
    if not name_of(worker).startswith("ray::") or not driver.is_running:
        return False
    try:
        worker.kill()
    except psutil.Error:
        return False
    return driver.is_running and driver.lines()[-1].get("stage") != "manifest"


def _reach(driver: Driver, stage: str, chosen: random.Random) -> bool:
    """Wait for a random moment in a stage; whether the driver still runs."""
    wanted = STAGES[STAGES.index(stage) :]
    deadline = time.monotonic() + 120
    while stage != "start" and driver.is_running and time.monotonic() < deadline:
        lines = driver.lines()
        if lines and lines[-1].get("stage") in wanted:
            break
        time.sleep(0.005)
    time.sleep(chosen.uniform(0, LATEST_SECONDS[stage]))
    return driver.is_running


def _scratch_of(root: Path) -> set[Path]:
    """The temporary folder of a build that runs, once it has one."""
    with suppress(OSError, ValueError, TypeError):
        return {Path(json.loads((root / ".owner.json").read_bytes())["scratch"])}
    return set()


def _count_finished(driver: Driver, root: Path) -> dict[str, int]:
    """How many units were finished when a driver was killed: those it had told of, and those that are there.

    No more than were in its workers' hands can be on top of what it had told: so what is kept bounds what is done twice.
    """
    done = {line["stage"]: line["done"] for line in driver.lines() if "stage" in line}
    committed = {"survey": count_committed(root, "survey"), "tokens": count_committed(root)}
    return {stage: max(done.get(stage, 0), count) for stage, count in committed.items()}
