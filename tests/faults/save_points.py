"""The campaign of saves that are killed: at every line that a save runs through, in a rank, in the thread that commits, in the writer.

    python -m tests.faults.save_points [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

Two ranks with the real arena, writer, protocol and retention save three times; the last save removes the first commit. Each point kills one
process just before one line, of any of the saves. Then two new ranks start: they must find the newest save that was told to be
committed, or a later one, every byte of it, and save again. Out: for each kind a line (or an object of JSON) with how many
were tried, how many went as promised, and the seed. Exit status 1 if anything did not.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.verify import list_commits, verify_commit
from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.faults.saving_rank import NUM_SAVES, RANKS, SAVED_FILE, STEPS_BETWEEN, go_on, save_often

CASE_SECONDS = 60
Point = tuple[str, int, int]
"""Where (`rank`, `commit`: the thread of rank 0, `writer`), of which rank, before which of its lines."""


def run_ranks(folder: Path, act: Callable[[int], Any]) -> list[int]:
    """Do something on each rank, in forks of this process that join a group. Returns how each ended (negative: by that signal)."""
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pids = [_fork(rank, folder, act) for rank in range(RANKS)]
    ends, deadline = dict[int, int](), time.monotonic() + CASE_SECONDS
    while len(ends) < RANKS and time.monotonic() < deadline:
        for pid in pids:
            if pid not in ends and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ends[pid] = os.waitstatus_to_exitcode(found[1])
                if ends[pid] < 0:  # as the launcher does, soon
                    deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.005)
    for pid in set(pids) - set(ends):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [ends.get(pid, -signal.SIGKILL) for pid in pids]


def _fork(rank: int, folder: Path, act: Callable[[int], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        with (folder / f"rank-{rank}.said").open("ab") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        store = torch.distributed.FileStore(str(folder / "store"), RANKS)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
        act(rank)
        torch.distributed.barrier()
        os._exit(0)
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


@cache
def all_points(folder: Path) -> list[Point]:
    """Every line that the saves run through, found by saving undisturbed."""
    ends = run_ranks(folder, lambda rank: save_often(folder, rank, None))
    assert ends == [0, 0], [(folder / f"rank-{rank}.said").read_text() for rank in range(RANKS)]
    counted = [json.loads(path.read_text()) for path in sorted(folder.glob("*.points"))]
    return [(one["where"], one["rank"], number) for one in counted for number in range(one["num_lines"])]


def check_point(point: Point, folder: Path) -> list[str]:
    """Kill at a point, start again; what is not as promised."""
    where, rank, _ = point
    ends = run_ranks(folder / "killed", lambda rank: save_often(folder, rank, point))
    problems: list[str] = []
    told = [json.loads(line) for line in (folder / SAVED_FILE).read_text().splitlines()]
    begun, committed = ([line[what] for line in told if what in line] for what in ("begun", "committed"))
    if where == "writer":
        problems += _check_survivors(ends, told)
    elif ends[rank] != -signal.SIGKILL:
        problems.append(f"it was not reached: the ranks ended with {ends}")
    for commit in list_commits(folder / "checkpoints"):
        problems += [f"partial: {one}" for one in verify_commit(commit)]
    ends = run_ranks(folder / "next", lambda rank: go_on(folder, rank))
    if ends != [0, 0]:
        said = [(folder / "next" / f"rank-{rank}.said").read_text()[-500:] for rank in range(RANKS)]
        return [*problems, f"the next start ended with {ends}: {said}"]
    found = json.loads((folder / "found.json").read_text())
    newest = max(committed, default=0)  # that of the save before the one under way may be committed and not yet told
    if found["step"] not in [newest, *(step for step in begun if step > newest)]:
        problems.append(f"the next start found step {found['step']}; {committed} were committed, {begun} begun")
    problems += found["problems"]
    return problems


def _check_survivors(ends: list[int], told: list[dict[str, Any]]) -> list[str]:
    """Of an attempt whose writer was killed: it goes on, at most one save is missing, and that was said."""
    steps = [STEPS_BETWEEN * number for number in range(1, NUM_SAVES + 1)]
    committed, failed = ([line[what] for line in told if what in line] for what in ("committed", "failed"))
    if ends != [0, 0] or sorted(committed + failed) != steps or len(failed) > 1:
        return [f"the ranks ended with {ends}, committed {committed}, failed {failed}"]
    why = [line["why"] for line in told if "why" in line]
    if not all("the process that writes checkpoints ended" in one or "Broken pipe" in one for one in why):
        return [f"it was not said why: {told}"]
    return []


def check(kinds: tuple[str, ...], num_cases: int, case: Case) -> Outcome:
    """About twenty points, one after the other; all cases together have all."""
    tried = [point for point in case.prepared if point[0] in kinds][case.number :: num_cases]
    problems, num_bad = list[str](), 0
    for number, point in enumerate(tried):
        (folder := case.folder / f"{number}").mkdir()
        found = check_point(point, folder)
        num_bad += bool(found)
        problems += [f"killed at {point}: {one}" for one in found]
    return Outcome(len(tried), problems, passed=len(tried) - num_bad)


def prepare(folder: Path, chosen: random.Random) -> list[Point]:
    """All points."""
    del chosen
    torch.set_num_threads(1)
    return all_points(folder)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("rank", 36, 20, prepare, partial(check, ("rank", "commit"), 36)),
        Kind("writer", 22, 20, prepare, partial(check, ("writer",), 22)),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("save_points", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
