"""When a checkpoint counts: the commit protocol, its verification, and the fall back to an older one.

    checkpoints/.tmp-step-00000100-attempt-3/   every rank writes and syncs its files here
    checkpoints/step-00000100/                  the rename is the commit; MANIFEST.json lists every file's SHA-256
    checkpoints/rejected/                       what failed verification, moved aside, never deleted

Every decision is made by rank 0 and told to the others, or agreed by all: a rank that looked for itself could see
another file system state, and a decision of one rank before a collective is a deadlock.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as distributed

from configs.durable import commit_folder, remove_folders, write_file
from configs.errors import UserError
from pretrain.checkpoint.verify import FORMAT, MANIFEST, Commit, check_files, commit_name, list_commits, read_commit, seal_of
from pretrain.state import TrainState

TAKEN_OVER = "no longer holds"
T = TypeVar("T")


def write_commit(
    checkpoints: Path,
    state: TrainState,
    *,
    write_rank_files: Callable[[Path], dict[str, dict[str, Any]]],
    identity: dict[str, str],
    attempt: int,
    still_ours: Callable[[], bool],
) -> str | None:
    """Save one step. Collective. Returns None when committed, or what went wrong (then nothing has changed).
    Raises UserError when another attempt has taken the run over: there is no point in going on.

    write_rank_files: writes this rank's synced files into the given folder and returns their sizes and hashes.
    still_ours: whether this attempt still holds the run folder; asked just before the rename (a stalled attempt
    that wakes up after another took over must not commit).
    """
    rank = distributed.get_rank()
    temporary = checkpoints / f".tmp-{commit_name(state.step)}-attempt-{attempt}"
    final = checkpoints / commit_name(state.step)
    problem = _on_rank_0(lambda: _prepare(checkpoints, temporary), rank)
    files: dict[str, dict[str, Any]] = {}
    if problem is None:
        try:
            files = write_rank_files(temporary)
        except OSError as error:
            problem = f"rank {rank}: {error}"
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (problem, files))
    problems = [one for one, _ in gathered if one is not None]
    every_file = {name: known for _, mine in gathered for name, known in mine.items()}

    def finish() -> None:
        if problems:
            raise OSError("; ".join(problems))
        if not still_ours():
            raise OSError(TAKEN_OVER)
        content = {
            "format": FORMAT,
            "state": state.to_json(),
            "attempt": attempt,
            "world_size": len(gathered),
            "identity": identity,
            "files": every_file,
        }
        write_file(temporary / MANIFEST, json.dumps(content | {"manifest_sha256": seal_of(content)}, indent=1).encode())
        commit_folder(temporary, final)

    problem = _on_rank_0(finish, rank)
    if problem is not None and rank == 0:
        remove_folders([temporary])
    if problem == TAKEN_OVER:
        raise UserError(
            f"attempt {attempt} {TAKEN_OVER} {checkpoints.parent}: another attempt has taken it over. This one ends; nothing was changed."
        )
    return problem


def _prepare(checkpoints: Path, temporary: Path) -> None:
    checkpoints.mkdir(exist_ok=True)
    remove_folders(list(checkpoints.glob(".tmp-*")))
    temporary.mkdir()


def _on_rank_0(act: Callable[[], None], rank: int) -> str | None:
    """Let rank 0 act and tell all ranks what went wrong, if anything."""
    outcome: list[str | None] = [None]
    if rank == 0:
        try:
            act()
        except OSError as error:
            outcome = [str(error)]
    distributed.broadcast_object_list(outcome, src=0)
    return outcome[0]


def newest_verified_commit(checkpoints: Path, say: Callable[[str], None]) -> Commit | None:
    """The newest commit whose every file is intact, or None in a folder that has none. Collective.

    Rank 0 chooses, each rank hashes its share of the files, all learn the verdict. A commit that fails is moved to
    `rejected/` and said; the next older one is tried. Raises UserError when commits exist and none verifies:
    starting from scratch there would throw the run away.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    while True:
        newest = list_commits(checkpoints)[:1] if rank == 0 else []
        choice = _told_by_rank_0(str(newest[0]) if newest else None)
        if choice is None:
            break
        folder = Path(choice)
        try:
            commit, problems = read_commit(folder), []
            problems = check_files(commit, sorted(commit.files)[rank::world_size])
        except ValueError as error:
            commit, problems = None, [str(error)]
        gathered: list[Any] = [None] * world_size
        distributed.all_gather_object(gathered, problems)
        problems = sorted({problem for part in gathered for problem in part})
        if commit is not None and not problems:
            return commit
        if rank == 0:
            moved = reject_commit(folder)
            say(f"checkpoint {folder.name} is damaged and was moved to {moved}: {'; '.join(problems[:3])}. Looking for an older one.")
    rejected = _told_by_rank_0([path.name for path in (checkpoints / "rejected").glob("*")] if rank == 0 else None)
    if rejected:
        raise UserError(
            f"{checkpoints}: no checkpoint verifies ({len(rejected)} lie in {checkpoints / 'rejected'}); nothing was deleted. "
            "Restore one of them from a backup, or start anew under another name with run.name=NAME."
        )
    return None


def _told_by_rank_0(value: T) -> T:
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def reject_commit(folder: Path) -> Path:
    """Move a commit that failed verification aside; returns where it lies now."""
    rejected = folder.parent / "rejected"
    rejected.mkdir(exist_ok=True)
    number = 0
    while (target := rejected / f"{folder.name}{f'.{number}' if number else ''}").exists():
        number += 1
    return folder.rename(target)
