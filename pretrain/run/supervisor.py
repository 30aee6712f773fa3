"""Starts the ranks of one attempt on this machine, passes signals on, maps outcomes to an exit status.

In: a resolved configuration. Out: an exit status (0 done, 2 a mistake, 75 resumable, else a defect), one line in
`attempts.jsonl`, and no process left behind. The ranks are started by torch's elastic agent; it runs in a thread,
because in the main thread it would take the signals for itself and kill the ranks before they save.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.run.folder import RunFolder
from pretrain.run.lease import Lease
from pretrain.run.outcome import EXIT_DEFECT, EXIT_DONE, OUTCOME_FOLDER_VARIABLE, decide, is_ready, read_outcomes
from pretrain.run.signals import STOP_SIGNALS, adopt_orphans

RANK_MODULE = "pretrain.train"


def supervise(config: RunConfig, dataset: Path, say: Callable[[str], None], is_committed: Callable[[Path, int], bool]) -> int:
    """Run one attempt of a run to its end. Raises UserError before anything was started.

    is_committed: whether a step of a `checkpoints/` folder is committed, intact (the checkpoint room's answer).
    """
    folder = RunFolder.of(config)
    num_processes = count_processes(config)
    try:
        config.training.accumulation(num_processes)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    os.umask(0o027 if config.run.readable_by == "group" else 0o077)
    existed = folder.prepare(config)
    with Lease(folder) as lease:
        if existed and is_committed(folder.checkpoints, config.training.total_steps):
            say(f"{folder.path} is done: all {config.training.total_steps} steps are committed. Nothing was changed.")
            return EXIT_DONE
        folder.write_description(config, dataset)
        history = f"continued, attempt {lease.attempt}" if existed else "new"
        say(f"run folder {folder.path} ({history}), {num_processes} process{'es' if num_processes > 1 else ''}")
        with tempfile.TemporaryDirectory(prefix="pretrain-") as scratch:
            try:
                status, message, steps = _run_ranks(folder, lease.attempt, num_processes, Path(scratch))
            except Exception:  # the launcher itself failed: an attempt all the same
                status, message, steps = EXIT_DEFECT, f"the ranks could not be started:\n{traceback.format_exc()}", (None, None)
        folder.record_attempt(
            {
                "attempt": lease.attempt,
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "started": lease.started,
                "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "status": status,
                "cause": _cause(message),
                "first_step": steps[0],
                "last_step": steps[1],
                "num_processes": num_processes,
            }
        )
    say(message)
    return status


def count_processes(config: RunConfig) -> int:
    """Ranks to start on this machine: as configured, or one per GPU, or `cpu_processes`."""
    import torch

    devices = torch.cuda.device_count()
    if devices and (config.parallel.processes or 0) > devices:
        raise UserError(
            f"parallel.processes is {config.parallel.processes} and this machine has {devices} GPUs; a rank needs one of its own."
        )
    return config.parallel.processes or devices or config.parallel.cpu_processes


def rank_environment(num_processes: int, outcome_folder: Path, has_gpu: bool) -> dict[str, str]:
    """Environment variables of the ranks; what the user set already is left alone."""
    wanted = {
        OUTCOME_FOLDER_VARIABLE: str(outcome_folder),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",  # a `configs` package in the current folder must not stand in for ours
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15",
    }
    if not has_gpu:
        wanted |= {
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            # Large activations are otherwise returned to the kernel and faulted in anew at every step (measured: 10 %).
            "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
            "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        }
    return {key: os.environ.get(key, value) if key != OUTCOME_FOLDER_VARIABLE else value for key, value in wanted.items()}


def _run_ranks(folder: RunFolder, attempt: int, num_processes: int, scratch: Path) -> tuple[int, str, tuple[int | None, int | None]]:
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    outcomes = scratch / "outcomes"
    outcomes.mkdir()
    os.environ.update(rank_environment(num_processes, outcomes, torch.cuda.is_available()))
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)  # what torch's agent and the tracker leave there goes with it
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"pretrain-{os.getpid()}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    failures: list[BaseException] = []

    def launch_agent() -> None:
        try:
            elastic_launch(launch, sys.executable)("-m", RANK_MODULE, str(folder.path), str(attempt))
        except BaseException as error:  # told to the main thread, which decides
            failures.append(error)

    os.environ.pop("WANDB_SERVICE", None)  # a tracker that our own parent started would outlive the ranks
    adopt_orphans()
    agent = threading.Thread(target=launch_agent, name="elastic agent")
    with _PassSignalsOn(outcomes) as signals_received:
        agent.start()
        while agent.is_alive():
            agent.join(0.1)
            signals_received.pass_on()
    _end_descendants()
    exit_codes: dict[int, int] = {}
    for error in failures:
        if isinstance(error, ChildFailedError):
            exit_codes |= {rank: failure.exitcode for rank, failure in error.failures.items()}
        else:
            raise error
    records = read_outcomes(outcomes)
    status, message = decide(records, exit_codes)
    told = [(record.first_step, record.last_step) for record in records.values() if record.last_step is not None]
    return status, _shorten(message), told[0] if told else _logged_steps(folder, attempt)


def _cause(message: str) -> str:
    """A line for `attempts.jsonl`: the first; of a traceback also the last, which names the exception."""
    lines = [line for line in message.splitlines() if line.strip()] or [""]
    return f"{lines[0]} {lines[-1]}" if "Traceback" in message else lines[0]


def _logged_steps(folder: RunFolder, attempt: int) -> tuple[int | None, int | None]:
    """The first and last step that an attempt logged, where it could not say itself how far it came."""
    steps: list[int] = []
    path = folder.path / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["attempt"] == attempt:
                steps.append(int(row["step"]))
    return (min(steps), max(steps)) if steps else (None, None)


def _shorten(message: str) -> str:
    """A traceback without the frames of libraries that only pass a call on."""
    return re.sub(r"\n{3,}", "\n\n", message.strip())


class _PassSignalsOn:
    """While active, stop signals are counted; `pass_on` tells every rank, also one that started later.

    The first and second ask the ranks to stop, the third ends them at once.
    """

    def __init__(self, ready_folder: Path) -> None:
        self._ready_folder = ready_folder
        self._count = 0
        self._told: dict[int, int] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_PassSignalsOn":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        text = (
            "stopping after the step that is running, then saving",
            "still stopping; once more ends the run without saving",
            "ending at once",
        )
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: {text[min(self._count, 3) - 1]}\n".encode())

    def pass_on(self) -> None:
        """Tell each rank how often we were asked, once."""
        for child in psutil.Process().children() if self._count else []:
            ready = is_ready(self._ready_folder, child.pid) or self._count >= 3
            if ready and self._told.get(child.pid, 0) < self._count:
                self._told[child.pid] = self._count
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGTERM if self._count < 3 else signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _end_descendants() -> None:
    """End what the ranks left behind (a tracker's helper whose rank was killed), by process id."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
