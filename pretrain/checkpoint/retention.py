"""What is kept: the newest commits, and nothing is deleted that is not one."""

from pathlib import Path

from configs.durable import remove_folders
from pretrain.checkpoint.verify import list_commits


def remove_old_commits(checkpoints: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest commits (call it after a commit, on rank 0). Returns what was deleted.

    Each is renamed first, so that a deletion cut short leaves no half commit under a final name.
    """
    old = list_commits(checkpoints)[max(2, keep) :]
    doomed = [path.rename(path.with_name(f".tmp-old-{path.name}")) for path in old]
    remove_folders(doomed)
    return old
