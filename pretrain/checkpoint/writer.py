"""The process that writes one rank's files of a checkpoint, so that training need not wait for the disk.

In: `python -m pretrain.checkpoint.writer ARENA PARENT`, where ARENA is the descriptor of memory shared with the rank; on standard input a
line of JSON for each save: {"folder": ..., "files": [[name, first byte in the arena, bytes], ...]}. Out: a line for each: {"files": name ->
record} when they are on the disk, or {"problem": ...}. Without torch it takes some 15 MB; it ends with its rank.
"""

import contextlib
import json
import mmap
import os
import signal
import sys
from pathlib import PurePath

from pretrain.checkpoint.blocks import FileRecord, in_blocks, write_blocks
from pretrain.checkpoint.store import make_folder, path_of, sync_folder
from pretrain.run.signals import STOP_SIGNALS, end_with_parent


def write_files(arena: memoryview, folder: PurePath, files: list[tuple[str, int, int]]) -> dict[str, FileRecord]:
    """Write parts of the arena, (name, first byte, bytes), as synced files of a folder, which is made. Raises OSError."""
    make_folder(folder)
    records = {name: write_blocks(folder / name, in_blocks(arena[first : first + size])) for name, first, size in files}
    sync_folder(folder)
    return records


def main() -> None:
    """Answer requests until standard input ends."""
    arena, parent = int(sys.argv[1]), int(sys.argv[2])
    for number in STOP_SIGNALS:  # they reach every process of a run, and the last save is still to be written then
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    with contextlib.suppress(OSError):
        os.nice(10)  # training goes first
    for line in sys.stdin:
        request = json.loads(line)
        try:
            shared = memoryview(mmap.mmap(arena, 0, prot=mmap.PROT_READ))  # anew: it may have grown since the last save
            answer = {"files": write_files(shared, path_of(request["folder"]), request["files"])}
        except OSError as error:
            answer = {"problem": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
