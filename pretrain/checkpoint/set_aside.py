"""Commits that the run went back behind: moved aside, never deleted. No torch.

In: a run's `checkpoints/` folder, the step it goes back to. Out: what was newer lies in `checkpoints/rolled-back/`.
"""

import math
from pathlib import Path, PurePath

from configs.durable import sync_path
from pretrain.checkpoint.store import lies_at, move_commit
from pretrain.checkpoint.verify import COMMIT_NAME, list_commits, read_commit

ROLLED_BACK = "rolled-back"
"""The folder's name."""


def set_aside(checkpoints: Path, to_step: int, attempt: int) -> list[PurePath]:
    """Move commits behind `to_step`, written by this attempt or an earlier one, aside. Returns where they are now. Raises OSError.

    Done again it changes nothing: what a later attempt committed stays.
    """
    moved, place = list[PurePath](), lies_at(checkpoints)
    for commit in list_commits(checkpoints):
        if step_of(commit) > to_step and _attempt_of(commit) <= attempt:
            moved.append(place / ROLLED_BACK / f"{commit.name}-attempt-{attempt}")
            move_commit(commit, moved[-1], checkpoints)
    if moved:
        sync_path(checkpoints / ROLLED_BACK)
        sync_path(checkpoints)
    return moved


def step_of(commit: PurePath) -> int:
    """The step of a commit's folder."""
    match = COMMIT_NAME.fullmatch(commit.name)
    assert match is not None, "list_commits gives no others"
    return int(match[1])


def _attempt_of(commit: PurePath) -> float:
    try:
        return read_commit(commit).attempt
    except ValueError:
        return math.inf  # damaged: it stays for the verification, which rejects it
