"""The verb `checkpoints list`: a run's commits as a person sees them.

In: a run folder. Out: plain values, ready for JSON, and the same as a table. No torch, and no file is read whole.
"""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pretrain.checkpoint.retention import reasons_to_stay, whole_commits
from pretrain.checkpoint.verify import list_commits
from pretrain.page import Page
from pretrain.run.folder import RunFolder


def list_checkpoints(run: RunFolder) -> list[dict[str, Any]]:
    """Newest first, then what was rejected, then what the run began with. `state`: whole, damaged, rejected or parent; `stays`: why the
    next save leaves it, or null."""
    config = run.load_config()
    section = config.checkpoint
    commits = whole_commits(run.checkpoints)
    # The next save is one of the newest itself.
    stays = dict(zip((commit.folder for commit in commits), reasons_to_stay(commits, section, section.keep - 1, run.path), strict=True))
    known = {commit.folder: commit for commit in commits}
    rows: list[dict[str, Any]] = []
    for folder in list_commits(run.checkpoints):
        if (commit := known.get(folder)) is None:
            rows.append({"name": folder.name, "state": "damaged", "stays": "nothing damaged is deleted"})
            continue
        size = sum(file["bytes"] for file in commit.files.values())
        rows.append(
            {
                "name": folder.name,
                "state": "whole",
                **commit.state.to_json(),
                "loss": commit.loss,
                "bytes": size,
                "ranks": commit.world_size,
                "attempt": commit.attempt,
                "time": commit.time,
                "stays": stays[folder],
            }
        )
    rejected = sorted((run.checkpoints / "rejected").glob("*"), reverse=True)
    rows += [{"name": f"rejected/{path.name}", "state": "rejected", "stays": "nothing damaged is deleted"} for path in rejected]
    if config.start_from is not None:
        rows.append({"name": config.start_from, "state": "parent", "with": config.start_with, "stays": "the beginning of this run"})
    return rows


def tell_checkpoints(rows: list[dict[str, Any]], checkpoints: Path, page: Page) -> None:
    """What `list_checkpoints` found."""
    if not rows:
        page.say(f"{checkpoints}: no commits yet")
        return
    page.table(
        ("checkpoint", "tokens", "loss", "MB", "ranks", "committed, UTC", "state", "at the next save"),
        [
            (
                row["name"],
                f"{row['tokens_seen']:,}" if "loss" in row else "",
                f"{row['loss']:.4f}" if "loss" in row else "",
                f"{row['bytes'] / 1e6:,.1f}" if "loss" in row else "",
                f"{row['ranks']}" if "loss" in row else "",
                datetime.fromtimestamp(row["time"], timezone.utc).strftime("%Y-%m-%d %H:%M:%S") if "loss" in row else "",
                row["state"],
                "goes" if row["stays"] is None else f"stays: {row['stays']}",
            )
            for row in rows
        ],
    )
