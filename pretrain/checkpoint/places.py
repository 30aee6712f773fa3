"""Where a run's commits lie: the durable place in its folder and, if there is one, a fast one of each node's own.

In: the section `checkpoint`, the run folder. Out: folders of commits, the durable one first. No torch: the supervisor asks here too.
"""

import functools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from configs.durable import write_file
from configs.schema import CheckpointSection
from pretrain.checkpoint.retention import remove_old_commits
from pretrain.checkpoint.store import URL_FILE

FAST_NAME = "fast-name"
"""In the run folder: what its folder below `checkpoint.fast_folder` is called. Another run of the same name has another one."""
FAST_KEEP = 2
"""The older one is the fall-back."""


class Place(NamedTuple):
    """A folder of commits."""

    checkpoints: Path
    """What holds them: itself, or the store that is named beside it (`store.lies_at`)."""
    keep: Callable[[Path], object] = lambda checkpoints: None
    """Removes, behind a commit, what is not kept there."""
    is_local: bool = False
    """Whether each node has one of its own under this name."""

    def has_name_from(self, rank: int) -> bool:
        """Whether this rank gives folders their final names there: rank 0, or the first one of each node."""
        return rank == 0 or (self.is_local and os.environ.get("LOCAL_RANK") == "0")


def places_of(section: CheckpointSection, run: Path) -> list[Place]:
    """The durable place, and the fast one where there is one that has been used."""
    durable = Place(run / "checkpoints", functools.partial(remove_old_commits, section=section))
    name = run / FAST_NAME
    if section.fast_folder is None or not name.is_file():
        return [durable]
    fewer = section.model_copy(update={"keep": FAST_KEEP, "keep_every_steps": None, "keep_every_hours": None})
    fast = Path(section.fast_folder) / name.read_text().strip() / "checkpoints"
    return [durable, Place(fast, functools.partial(remove_old_commits, section=fewer), is_local=True)]


def name_fast_place(section: CheckpointSection, run: Path) -> None:
    """Choose the name of a run's fast place, once (by one process). Raises OSError."""
    if section.fast_folder is not None and not (run / FAST_NAME).is_file():
        write_file(run / FAST_NAME, f"{run.name}-{secrets.token_hex(4)}\n".encode())


def name_store(section: CheckpointSection, run: Path) -> None:
    """Choose where in `checkpoint.store` a run's commits will lie, once (by one process). Raises OSError.

    Another store is taken as long as the run has not begun; then its key may not change any more.
    """
    file = run / URL_FILE
    if section.store is None:
        file.unlink(missing_ok=True)
    elif not file.is_file() or file.read_text().rpartition("/")[0] != section.store.rstrip("/"):
        write_file(file, f"{section.store.rstrip('/')}/{run.name}-{secrets.token_hex(4)}\n".encode())
