"""When a checkpoint counts: the commit protocol, and the way back to the newest one that is whole.

    checkpoints/.tmp-step-00000100-attempt-3/   every rank's writer puts its synced files here
    checkpoints/step-00000100/                  the rename is the commit; MANIFEST.json lists every file's SHA-256
    checkpoints/rejected/                       what failed verification, moved aside, never deleted

(In an object store its manifest, made last, is the commit: `store.py`.)

Beside the durable place there may be a fast one, a disk (or memory) of each node's own: there each node's first rank commits what its own
ranks wrote, with the manifest of all. A save begins at a step and is committed at a later one, when all ranks have written; training goes
on meanwhile. Every decision is made by rank 0 and told to the others, or agreed by all: a rank that looked for itself could see another
file system state, and a decision of one rank before a collective is a deadlock.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch.distributed as distributed

from configs.errors import UserError
from pretrain.checkpoint.arena import Answer
from pretrain.checkpoint.blocks import DamageError
from pretrain.checkpoint.places import Place
from pretrain.checkpoint.store import (
    commit_folder,
    give_up,
    is_commit,
    lies_at,
    make_folder,
    move_commit,
    path_of,
    remove_unfinished,
    unfinished,
)
from pretrain.checkpoint.verify import Commit, commit_folder_of, commit_name, list_commits, read_commit, write_manifest
from pretrain.checkpoint.wandb_id import read_wandb_id, restore_wandb_id

TAKEN_OVER = "no longer holds"
FAILURES_IN_A_ROW = 3
"""Then training ends: nobody wants to lose the days since."""
T = TypeVar("T")

Wait = bool
StartWriting = Callable[[PurePath], Callable[[Wait], Answer | None]]
"""Starts to write this rank's files into a folder, and returns a function that asks how it ended: None, unless it waits, while it goes on.
Raises OSError."""


class Saves:
    """The saves of an attempt, one after the other: at most one is in flight. Its methods are collectives, but for `is_written`."""

    def __init__(self, places: Sequence[Place], attempt: int, still_ours: Callable[[], bool]) -> None:
        """places: where commits may go. still_ours: whether this attempt still holds the run folder; asked just before the rename (a
        stalled attempt that wakes up after another took over must not commit).
        """
        self._attempt, self._still_ours = attempt, still_ours
        self._place: Place | None = None
        self._commit: Commit | None = None
        self._ask: Callable[[Wait], Answer | None] = lambda wait: None
        self._answer: Answer | None = None
        self._committing: Future[str | None] | None = None
        self._is_agreed = False
        self._failures = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        for place in places:
            if place.has_name_from(distributed.get_rank()):
                remove_unfinished(lies_at(place.checkpoints))  # of attempts that are gone
        distributed.barrier()  # nobody begins before that

    def begin(self, place: Place, start_writing: StartWriting, **about: Any) -> str | None:
        """Start a save: returns when training may change what it saves. about: the fields of `Commit` that belong to the step.

        Where the one before is still in flight, it is waited for first. Returns what went wrong with that one.
        """
        problem = self.settle()
        self._place, folder = place, unfinished(lies_at(place.checkpoints), commit_name(about["state"].step), self._attempt)
        self._commit = Commit(folder, files={}, attempt=self._attempt, world_size=distributed.get_world_size(), time=0, **about)
        self._answer, self._is_agreed = None, False
        try:
            make_folder(folder)  # by whoever is first
            self._ask = start_writing(folder)
        except OSError as error:
            self._answer = Answer({}, str(error))
        return problem

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the save in flight is on the disk, or cannot be put there."""
        if self._commit is not None and self._answer is None:
            self._answer = self._ask(False)
        return self._commit is not None and self._answer is not None

    def advance(self, step: int, num_written: int) -> None:
        """Go on with the save in flight: it is committed once all ranks have written it. Cheap, and nothing else waits for the disk.

        step, num_written: of how many ranks `is_written` was true at the end of which step.
        """
        world_size = distributed.get_world_size()
        if self._commit is not None and not self._is_agreed and step > self._commit.state.step and num_written == world_size:
            self._agree()

    def _agree(self) -> None:
        """All ranks have answered: gather the answers; rank 0 then commits, in a thread."""
        assert self._commit is not None and self._answer is not None and self._place is not None
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, tuple(self._answer))
        self._is_agreed = True
        if self._place.has_name_from(distributed.get_rank()):
            problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(gathered) if problem is not None]
            files = {name: known for mine, _ in gathered for name, known in mine.items()}
            commit = replace(self._commit, files=files, time=int(time.time()), wandb_id=read_wandb_id(self._place.checkpoints.parent))
            self._committing = self._thread.submit(self._finish, self._place, commit, problems)

    def _finish(self, place: Place, commit: Commit, problems: list[str]) -> str | None:
        try:
            if problems:
                raise OSError("; ".join(problems))
            write_manifest(commit)
            if not self._still_ours():
                raise OSError(TAKEN_OVER)
            commit_folder(commit.folder, commit_folder_of(place.checkpoints, commit.state.step))
        except OSError as error:
            give_up(commit.folder)
            return str(error)
        with suppress(UserError):  # a store that is gone now: what should go goes behind the next save
            place.keep(place.checkpoints)
        return None

    def settle(self) -> str | None:
        """Wait until the save in flight is committed. Returns None, or what went wrong (then nothing has changed).

        Raises UserError when another attempt has taken the run over: there is no point in going on.
        """
        if self._commit is None:
            return None
        if self._answer is None:
            self._answer = self._ask(True)
        if not self._is_agreed:
            self._agree()
        told: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(told, self._committing.result() if self._committing is not None else None)
        problem = next((one for one in told if one is not None), None)
        step, folder, self._commit, self._committing = self._commit.state.step, self._commit.folder.parent, None, None
        if problem == TAKEN_OVER:
            raise UserError(
                f"attempt {self._attempt} {TAKEN_OVER} {folder.parent}: another attempt has taken it over. This one ends; "
                "nothing was changed."
            )
        self._failures = self._failures + 1 if problem else 0
        text = f"step {step} could not be saved: {problem}." if problem else None
        if self._failures == FAILURES_IN_A_ROW:
            raise UserError(f"{text} {FAILURES_IN_A_ROW} saves in a row failed; mend it and run the same command again.")
        return text


def newest_that_loads(places: Sequence[Place], load: Callable[[Commit], None], say: Callable[[str], None]) -> Commit | None:
    """The newest commit that `load` has taken, or None where there is none. Collective.

    Rank 0 chooses, each rank loads what it needs of it, verifying every byte, all learn the verdict. A commit that fails is moved to
    `rejected/` (one of a node's own on each node, also where it is another node's part that is missing) and said; the next older one
    is tried. Raises UserError when commits exist in the first place and none is whole: to start from scratch would throw the run away.

    load: raises DamageError where a byte is not what was committed; what it filled is then filled anew, from the next one. It is no
    collective, for it may end on one rank only.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    while True:
        here = enumerate(places) if rank == 0 else ()
        newest = [(number, str(folder)) for number, place in here for folder in list_commits(place.checkpoints)[:1]]
        chosen = max(newest, key=lambda one: int(path_of(one[1]).name[5:]), default=None)  # of equal steps the first place's
        choice = told_by_rank_0(chosen)
        if choice is None:
            break
        place, folder = places[choice[0]], path_of(choice[1])
        commit = problem = None
        try:
            commit = read_commit(folder)
            load(commit)
        except DamageError as error:
            problem = str(error)
        gathered: list[Any] = [None] * world_size
        distributed.all_gather_object(gathered, problem)
        problems = sorted({problem for problem in gathered if problem is not None})
        if commit is not None and not problems:
            if rank == 0:
                restore_wandb_id(places[0].checkpoints.parent, commit.wandb_id)
            return commit
        if place.has_name_from(distributed.get_rank()) and is_commit(folder):
            moved = reject_commit(folder, place.checkpoints)
            say(f"checkpoint {folder.name} is damaged and was moved to {moved}: {'; '.join(problems[:3])}. Looking for an older one.")
        distributed.barrier()
    rejected = told_by_rank_0([path.name for path in (places[0].checkpoints / "rejected").glob("*")] if rank == 0 else None)
    if rejected:
        raise UserError(
            f"{places[0].checkpoints}: no checkpoint verifies ({len(rejected)} lie in {places[0].checkpoints / 'rejected'}); nothing was "
            "deleted. Restore one of them from a backup, or start anew under another name with run.name=NAME."
        )
    return None


def told_by_rank_0(value: T) -> T:
    """Rank 0's value, on every rank. Collective."""
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def reject_commit(folder: PurePath, checkpoints: Path | None = None) -> PurePath:
    """Move a commit that failed verification aside; returns where it lies now. checkpoints: the run folder's; None: it lies there."""
    rejected, number = folder.parent / "rejected", 0
    while is_commit(target := rejected / f"{folder.name}{f'.{number}' if number else ''}"):
        number += 1
    move_commit(folder, target, checkpoints or Path(folder.parent))
    return target
