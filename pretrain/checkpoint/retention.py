"""What is kept of a run's commits, and whether there is room for them. No torch: a login node asks here too.

In: commits, the section `checkpoint`, the list of children. Out: which go and why the others stay. What is damaged is never deleted here,
and neither is a commit that is newer than the newest whole one: what cannot be read may be all that is left.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath

from configs.errors import UserError
from configs.schema import CheckpointSection
from pretrain.checkpoint.parent import children_of
from pretrain.checkpoint.store import StorePath, lies_at, remove_folders, uncommit
from pretrain.checkpoint.verify import Commit, list_commits, read_whole_commit

BYTES_PER_PARAMETER = 12
"""Of a commit: the fp32 weight and two moments. Other optimizers keep fewer."""
SPARE = 1.1
"""Free room that is wanted, as a multiple of what is needed."""


def whole_commits(checkpoints: Path) -> list[Commit]:
    """Commits whose manifest is intact and whose files have their sizes, newest first; no file is read whole."""
    found = (read_whole_commit(folder) for folder in list_commits(checkpoints))
    return [commit for commit in found if commit is not None]


def reasons_to_stay(
    commits: Sequence[Commit], section: CheckpointSection, num_newest: int | None = None, run: Path | None = None
) -> list[str | None]:
    """For each of a run's whole commits, newest first, why it is kept; None: it goes.

    num_newest: how many of the newest stay as such; None: `section.keep`. run: the run's folder; None: the commits lie in it.
    """
    num_newest = section.keep if num_newest is None else num_newest
    reasons: list[str | None] = [f"one of the newest {section.keep}" if place < num_newest else None for place in range(len(commits))]
    children = children_of(run or Path(commits[0].folder).parent.parent) if commits else {}
    kept_until = float("-inf")
    for place in reversed(range(len(commits))):  # oldest first: what stays does not depend on what has gone
        commit = commits[place]
        if section.keep_every_hours is not None and commit.time >= kept_until:
            kept_until = commit.time + 3600 * section.keep_every_hours
            reasons[place] = reasons[place] or f"every {section.keep_every_hours:g} hours"
        if section.keep_every_steps is not None and commit.state.step % section.keep_every_steps == 0:
            reasons[place] = reasons[place] or f"every {section.keep_every_steps:,} steps"
        if begun := children.get(commit.state.step):
            reasons[place] = f"the beginning of {', '.join(begun)}"
    return reasons


def remove_old_commits(checkpoints: Path, section: CheckpointSection) -> list[PurePath]:
    """Delete what does not stay (call it after a commit, on rank 0). Returns what was deleted, newest first.

    Each is first made none, so that a deletion cut short leaves no half commit under a final name.
    """
    commits = whole_commits(checkpoints)
    reasons = reasons_to_stay(commits, section, run=checkpoints.parent)
    old = [commit for commit, reason in zip(commits, reasons, strict=True) if reason is None]
    remove_folders([uncommit(commit.folder, commit.attempt) for commit in old])
    return [commit.folder for commit in old]


def check_room(checkpoints: Path, section: CheckpointSection, num_parameters: int, num_saves: int) -> None:
    """Raises UserError where the disk cannot hold the commits that are still to come before the first one is deleted; a store has no end.

    num_saves: how many are to come at most.
    """
    if isinstance(lies_at(checkpoints), StorePath):
        return
    size = BYTES_PER_PARAMETER * num_parameters
    # While the newest is written, the oldest of those that are kept is still there.
    missing = max(1, min(num_saves, section.keep + 1 - len(whole_commits(checkpoints))))
    wanted, free = SPARE * missing * size, shutil.disk_usage(checkpoints.parent).free
    if free < wanted:
        raise UserError(
            f"{checkpoints.parent} has {free / 1e9:,.1f} GB free; {missing} more checkpoints of {size / 1e9:,.1f} GB want "
            f"{wanted / 1e9:,.1f} GB. Free some, lower checkpoint.keep ({section.keep}), or put the run elsewhere with run.root=FOLDER."
        )
