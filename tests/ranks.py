"""One rank of `run_on_ranks` (in conftest.py): joins the gloo group, calls a function, writes its result.

In: `python -m tests.ranks MODULE:FUNCTION ARGUMENTS_JSON RESULT_FILE` with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in the environment. Out: RESULT_FILE holds what the function returned, as JSON.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any


def main() -> None:
    """Be one rank."""
    if sys.platform == "linux":  # a killed pytest takes its ranks along: PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    function_path, arguments, result_file = sys.argv[1:]
    module, _, function = function_path.partition(":")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Longer than any test's own limit: `run_on_ranks` decides when it is too late.
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(result_file).write_text(json.dumps(result))
    dist.barrier()  # rank 0 holds the store: it leaves last
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # libraries' threads sometimes abort at the interpreter's own exit; the result is written


def add_ranks(offset: int) -> dict[str, int]:
    """Sum of (rank + offset) over all ranks, by all_reduce."""
    import torch
    import torch.distributed as dist

    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return {"sum": int(value.item()), "rank": dist.get_rank(), "local_rank": int(os.environ["LOCAL_RANK"])}


def crash_on(rank: int, pid_folder: str) -> Any:
    """Rank `rank` raises; the others start a child each and wait in a collective that never completes."""
    import torch
    import torch.distributed as dist

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_folder, f"{dist.get_rank()}.pids").write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    if dist.get_rank() == rank:
        raise RuntimeError("this rank was told to crash")
    dist.all_reduce(torch.zeros(1))
    time.sleep(600)


def sleep_forever(pid_folder: str) -> None:
    """Wait for longer than any test does."""
    rank = os.environ["RANK"]
    Path(pid_folder, f"{rank}.pids").write_text(str(os.getpid()))
    time.sleep(600)


if __name__ == "__main__":
    main()
