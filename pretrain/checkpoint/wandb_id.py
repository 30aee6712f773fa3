"""The id under which Weights & Biases shows a run travels with its commits: who brings back no more than those goes on with its curves.

In: a run folder, a commit's manifest. Out: the file `wandb/run-id`, which `pretrain/watch/wandb_run.py` makes where there is none.
"""

from contextlib import suppress
from pathlib import Path

from configs.durable import write_file
from configs.section import NAME_PATTERN

FILE = Path("wandb") / "run-id"
"""In the run folder."""


def read_wandb_id(run: Path) -> str | None:
    """The id of a run folder, or None where it has none yet (or W&B is disabled)."""
    with suppress(OSError, UnicodeDecodeError):
        return (run / FILE).read_text().strip() or None
    return None


def restore_wandb_id(run: Path, wandb_id: str | None) -> None:
    """Give a run folder without an id the one its commit was made under. A disk that does not take it is no reason to stop."""
    if wandb_id is not None and NAME_PATTERN.fullmatch(wandb_id) and not (run / FILE).is_file():
        with suppress(OSError):
            (run / FILE).parent.mkdir(exist_ok=True)
            write_file(run / FILE, wandb_id.encode())
