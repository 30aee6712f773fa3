"""One rank that saves, and is killed just before a certain line: what `save_points.py` starts.

In: a folder, this rank, a point. Out: commits in `checkpoints/`, and what was begun, committed and failed, a line each. Without a point the
lines are counted instead. Everything that saves is the real thing; only the model is missing: what is saved tells its step.
"""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as distributed
from safetensors.torch import load_file

import configs.durable
from configs.schema import CheckpointSection
from pretrain.checkpoint import arena, blocks, commit, image, places, retention, verify
from pretrain.checkpoint.blocks import DamageError, VerifiedFiles
from pretrain.checkpoint.verify import Commit
from pretrain.state import TrainState
from tests.faults.killed_writer import WRITER_POINT, Reach, files_of, reaching, trace

RANKS, NUM_SAVES, STEPS_BETWEEN, ELEMENTS = 2, 3, 10, 3000
SAVED_FILE = "saved.jsonl"
TRACED = files_of(configs.durable, arena, blocks, commit, image, places, retention, verify)
"""Of these modules each line is a point."""


def image_of(step: int, rank: int) -> image.Image:
    """What a rank saves of a step."""
    return image.Image(rank, {"weight": torch.arange(ELEMENTS, dtype=torch.float32) + 1000 * step + rank}, {"step": step, "rank": rank})


def save_often(folder: Path, rank: int, point: tuple[str, int, int] | None) -> None:
    """Three saves; the second is committed while training goes on, the third removes the first. Each is traced where it works on them."""

    def at(where: str) -> Reach | None:
        mine = point is None or point[:2] == (where, rank)
        return reaching(point[2] if point else None, folder, where, rank) if mine else None

    os.environ[WRITER_POINT] = json.dumps([point[2] if point else None, str(folder), rank]) if at("writer") else ""
    if of_commit := at("commit"):
        threading.settrace(partial(_only_in_commits, trace(TRACED, of_commit)))
    in_rank = trace(TRACED, of_rank) if (of_rank := at("rank")) else None
    _start_traced_writer()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    place = places.places_of(CheckpointSection(keep=2), folder)[0]
    own, saves = arena.Arena(1000), commit.Saves([place], 1, lambda: True)
    told = (folder / SAVED_FILE).open("a", buffering=1)

    def tell(**line: Any) -> None:
        if rank == 0:
            told.write(json.dumps(line) + "\n")

    def tell_end(step: int, problem: str | None) -> None:
        tell(**({"committed": step} if problem is None else {"failed": step, "why": problem}))

    for number in range(1, NUM_SAVES + 1):
        step, was_begun = number * STEPS_BETWEEN, image_of(number * STEPS_BETWEEN, rank)
        tell(begun=step)
        sys.settrace(in_rank)
        problem = saves.begin(
            place, lambda files, this=was_begun: own.start(files, this), state=TrainState(step, step * 4), identity={}, code={}, loss=1.5
        )
        sys.settrace(None)
        if number == 3:  # the problem of the save before
            tell_end(step - STEPS_BETWEEN, problem)
        if number == 2:
            _train_until_written(saves)
            sys.settrace(in_rank)
            saves.advance(step + 1, RANKS)
            sys.settrace(None)
        else:
            sys.settrace(in_rank)
            problem = saves.settle()
            sys.settrace(None)
            tell_end(step, problem)
    sys.settrace(None)
    own.close()


def _only_in_commits(traced: Any, frame: FrameType, event: str, argument: Any) -> Any:
    return traced(frame, event, argument) if "commit" in threading.current_thread().name else None


def _train_until_written(saves: commit.Saves) -> None:
    """What the loop does meanwhile: it asks, and all ranks learn the sum."""
    while True:
        num_written = torch.tensor([int(saves.is_written)])
        distributed.all_reduce(num_written)
        if num_written.item() == RANKS:
            return


def _start_traced_writer() -> None:
    """Every writer that is started is this module's `main`, with the point; the one behind it has none."""
    plain = subprocess.Popen

    def start(command: list[str], **given: Any) -> Any:
        process = plain([part.replace("pretrain.checkpoint.writer", "tests.faults.killed_writer") for part in command], **given)
        os.environ[WRITER_POINT] = ""
        return process

    arena.subprocess.Popen = start  # type: ignore[misc]


def go_on(folder: Path, rank: int) -> None:
    """The next start: find the newest commit, compare every byte with what was saved in that step, save another."""
    place = places.places_of(CheckpointSection(keep=2), folder)[0]
    saves, problems = commit.Saves([place], 2, lambda: True), list[str]()

    def load(found: Commit) -> None:
        with VerifiedFiles(found.folder, found.files) as files:
            if wrong := files.problems(sorted(found.files)):
                raise DamageError("; ".join(wrong))
        for one in range(RANKS):
            weight = load_file(found.folder / image.tensors_file(one))["weight"]
            if not torch.equal(weight, torch.arange(ELEMENTS, dtype=torch.float32) + 1000 * found.state.step + one):
                problems.append(f"{found.folder.name} holds another step's weights of rank {one}")

    newest = commit.newest_that_loads([place], load, problems.append)
    step = newest.state.step if newest else 0
    own = arena.Arena(1000)
    about = {"state": TrainState(step + 1, 4), "identity": {}, "code": {}, "loss": 1.5}
    saves.begin(place, lambda files: own.start(files, image_of(step + 1, rank)), **about)
    problems += filter(None, [saves.settle()])
    own.close()
    if rank == 0:
        commits = verify.list_commits(place.checkpoints)
        if commits[0].name != verify.commit_name(step + 1) or len(commits) > 2:
            problems.append(f"behind the next save there are {[path.name for path in commits]}")
        problems += [f"left: {path.name}" for path in place.checkpoints.iterdir() if path not in commits]
        (folder / "found.json").write_text(json.dumps({"step": step, "problems": problems}))
