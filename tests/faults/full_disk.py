"""One rank of trainings whose saves meet a full disk: the real loop, with a limit that the kernel sets to the size of files.

Called by `run_on_ranks`; arguments and results are JSON. The limit is that of the rank's writer, or of rank 0 while it writes the manifest:
the byte behind it is refused, wherever in the file it lies.
"""

import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as distributed

from configs.errors import UserError
from pretrain import train as loop
from pretrain.checkpoint import commit as protocol
from pretrain.checkpoint.arena import Answer, Arena
from pretrain.checkpoint.image import Image, tensors_file
from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.verify import MANIFEST, Commit, list_commits, read_commit, verify_commit, write_manifest
from pretrain.run.folder import RunFolder
from pretrain.watch.journal import Journal
from tests.training import StopAfter, hold_lease, this_rank, tiny_config

Case = dict[str, Any]


def train_on_full_disks(dataset: str, runs: str, overrides: dict[str, str], cases: dict[str, Case]) -> dict[str, Any]:
    """An undisturbed run, then a run per case: {"ranks", "saves" (counted from 1), "share": of the file that there is room for, "of"}.

    A run that ended is started again, with room. Returns by case: how each attempt ended, what was said, the commits after each.
    """
    layout, result = this_rank(), dict[str, Any]()
    for name, case in {"undisturbed": Case(saves=[], ranks=[], of=MANIFEST, share=0.0), **cases}.items():
        asynchronous = str(case["of"] != MANIFEST).lower()  # a limit of rank 0 is one of its rows, too: let it write none meanwhile
        config = tiny_config(dataset, runs, run__name=name, checkpoint__asynchronous=asynchronous, **overrides)
        run, said = RunFolder.of(config), list[str]()
        found = result[name] = {"ended": [], "said": said, "commits": []}
        for attempt, full in ((1, True), (2, False)):
            if layout.rank == 0:
                hold_lease(run, attempt)
            distributed.barrier()
            disk = _full(case, Path(runs) / "undisturbed", layout.rank) if full else nullcontext()
            with patch.object(Journal, "say", lambda journal, text, said=said: said.append(text)), disk:
                try:
                    found["ended"].append(loop.train(config, run, attempt, layout, StopAfter(None)).kind)
                except UserError as error:
                    found["ended"].append(str(error))
            distributed.barrier()
            found["commits"].append({one.name: verify_commit(one) for one in reversed(list_commits(run.checkpoints))})
            if found["ended"][-1] == "done":
                break
        found["left"] = sorted(path.name for path in run.checkpoints.iterdir() if not path.name.startswith("step-"))
        found["hash"] = state_hash(read_commit(list_commits(run.checkpoints)[0])) if layout.rank == 0 else None
        distributed.barrier()
    return result


@contextmanager
def _full(case: Case, undisturbed: Path, rank: int) -> Generator[None, None, None]:
    """While active, the disk is full for some saves of some ranks."""
    if not case["saves"]:
        yield
        return
    whole = list_commits(undisturbed / "checkpoints")[0] / (MANIFEST if case["of"] == MANIFEST else tensors_file(rank))
    bound, begun, start = int(case["share"] * whole.stat().st_size), [0], Arena.start

    def start_limited(arena: Arena, folder: Path, image: Image) -> Callable[[bool], Answer | None]:
        begun[0] += 1
        if case["of"] != MANIFEST and rank in case["ranks"]:
            if arena._process is None:
                arena._process = arena._start_writer()
            most = bound if begun[0] in case["saves"] else resource.RLIM_INFINITY
            resource.prlimit(arena._process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        return start(arena, folder, image)

    def write_limited(commit: Commit) -> None:
        if case["of"] == MANIFEST and begun[0] in case["saves"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bound, resource.RLIM_INFINITY))
        try:
            write_manifest(commit)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with patch.object(Arena, "start", start_limited), patch.object(protocol, "write_manifest", write_limited):
        yield
