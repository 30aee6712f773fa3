"""The process that writes checkpoints, killed just before a certain line; and what kills any process so. No torch, as in the real one.

In: `WRITER_POINT` in the environment: [line or null, folder, rank] as JSON, or nothing. Out: as `pretrain.checkpoint.writer`; without a
line the lines are counted instead, in a file of the folder.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Set
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import configs.durable
from pretrain.checkpoint import blocks, writer

WRITER_POINT = "WRITER_POINT"
TRACED = frozenset(str(module.__file__) for module in (configs.durable, blocks, writer))
"""Each line of these files is a point."""
blocks.BLOCK_BYTES = 4096  # so that a small file has several
READING = frozenset(
    {"read_commit", "read_whole_commit", "whole_commits", "reasons_to_stay", "list_commits", "seal_of", "<genexpr>", "<listcomp>"}
)
"""Functions that only look: whatever line of them is the last one, the same is on the disk."""
Reach = Callable[[int], None]


def files_of(*modules: ModuleType) -> frozenset[str]:
    """Where modules stand."""
    return frozenset(str(module.__file__) for module in modules)


def trace(files: Set[str], reach: Reach) -> Any:
    """A function for `sys.settrace` that calls `reach` with 0, 1, 2 ... just before each line of some files."""
    number = -1

    def each(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal number
        if frame.f_code.co_filename not in files or frame.f_code.co_name in READING:
            return None
        if event == "line":
            number += 1
            reach(number)
        return each

    return each


def reaching(line: int | None, folder: Path, where: str, rank: int) -> Reach:
    """Is killed at the line; None: notes how many there were."""

    def reach(number: int) -> None:
        if line is None:
            (folder / f"{where}-{rank}.points").write_text(json.dumps({"where": where, "rank": rank, "num_lines": number + 1}))
        elif number == line:
            os.kill(os.getpid(), signal.SIGKILL)

    return reach


if __name__ == "__main__":
    if told := os.environ[WRITER_POINT]:
        line, folder, rank = json.loads(told)
        sys.settrace(trace(TRACED, reaching(line, Path(folder), "writer", rank)))
    writer.main()
