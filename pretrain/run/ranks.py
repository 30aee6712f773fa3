"""The ranks of one attempt on this node: started, told of signals, ended without leaving a process behind.

In: a run folder, and who else takes part (`team.py`). Out: what became of them. Ranks that hang are ended, and where they stood is left in
`stacks/`. The ranks are started by torch's elastic agent; it runs in a thread, because in the main thread it would take the signals for
itself and kill the ranks before they save.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pretrain.run.folder import RunFolder
from pretrain.run.heartbeat import Reading, read_pulse
from pretrain.run.outcome import OUTCOME_FOLDER_VARIABLE, is_ready, read_outcomes
from pretrain.run.signals import STOP_SIGNALS, adopt_orphans
from pretrain.run.stacks import Place, flight_record, take_stacks
from pretrain.run.team import NodeResult, Team
from pretrain.run.watchdog import Late, Watchdog

RANK_MODULE = "pretrain.train"
AGENT_SECONDS = 20.0
"""Torch's agent is given up so long behind the end of its ranks: on other nodes it may wait for agents that are gone."""


def rank_environment(num_processes: int, outcome_folder: Path, has_gpu: bool, nodes: int = 1) -> dict[str, str]:
    """Environment variables of the ranks; what the user set already is left alone. num_processes: of this node."""
    wanted = {
        OUTCOME_FOLDER_VARIABLE: str(outcome_folder),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",  # a `configs` package in the current folder must not stand in for ours
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15",
    }
    if has_gpu:
        wanted |= flight_record(outcome_folder)
    else:
        wanted |= {
            "DS_ACCELERATOR": "cpu",
            **({"GLOO_SOCKET_IFNAME": "lo"} if nodes == 1 else {}),
            # Large activations are otherwise returned to the kernel and faulted in anew at every step (measured: 10 %).
            "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
            "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        }
    # What lies in the attempt's folder is the attempt's: the environment still has that of the attempt before.
    return {key: value if str(outcome_folder) in value else os.environ.get(key, value) for key, value in wanted.items()}


def run_ranks(folder: RunFolder, attempt: int, num_processes: int, scratch: Path, team: Team) -> NodeResult:
    """Run this node's ranks of one attempt, `num_processes`, to their end. Nothing of them is left running when this returns.

    scratch: a folder of this node's own for temporary files of the ranks.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    outcomes = scratch / "outcomes"
    outcomes.mkdir()
    os.environ.update(rank_environment(num_processes, outcomes, torch.cuda.is_available(), team.nodes))
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)  # what torch's agent and the tracker leave there goes with it
    launch = LaunchConfig(
        min_nodes=team.nodes,
        max_nodes=team.nodes,
        nproc_per_node=num_processes,
        run_id=f"pretrain-{attempt}" if team.nodes > 1 else f"pretrain-{os.getpid()}-{attempt}",
        max_restarts=0,
        monitor_interval=0.1,
        **team.rendezvous(),
    )
    failures: list[BaseException] = []

    def launch_agent() -> None:
        try:
            elastic_launch(launch, sys.executable)("-m", RANK_MODULE, str(folder.path), str(attempt), str(os.getpid()))
        except BaseException as error:  # told to the main thread, which decides
            failures.append(error)

    os.environ.pop("WANDB_SERVICE", None)  # a tracker that our own parent started would outlive the ranks
    adopt_orphans()
    agent = threading.Thread(target=launch_agent, name="elastic agent", daemon=True)
    ranks = range(team.node * num_processes, (team.node + 1) * num_processes)
    watchdog, stacks = Watchdog(folder.load_config().stall, ranks), folder.path / "stacks" / f"attempt-{attempt}"
    late, places, off, ending_since = list[Late](), dict[int, Place](), None, math.inf
    with _PassSignalsOn(outcomes) as signals_received:
        agent.start()
        while agent.is_alive() and time.monotonic() - ending_since < AGENT_SECONDS:
            agent.join(0.1)
            signals_received.pass_on()
            if ending_since < math.inf:
                continue
            readings = {rank: reading for rank in ranks if (reading := read_pulse(outcomes, rank)) is not None}
            late, off = watchdog.look(readings, time.monotonic()), team.called_off()
            if off is not None and off.wants_stacks and not late:
                late = watchdog.silences(readings)
            if late or off is not None:
                ending_since = time.monotonic()
                places = _end_ranks(readings, outcomes, stacks if late else None)
    _end_descendants()
    exit_codes: dict[int, int] = {}
    for error in failures if off is None else ():  # what is ended because another node failed has not failed itself
        if isinstance(error, ChildFailedError):
            exit_codes |= {rank: failure.exitcode for rank, failure in error.failures.items()}
        else:
            raise error
    return NodeResult(read_outcomes(outcomes), exit_codes, late, places, signals_received.count)


def _end_ranks(readings: dict[int, Reading], outcomes: Path, stacks: Path | None) -> dict[int, Place]:
    """Kill all ranks of this node, also stopped ones; where asked for, leave first where each stands. Returns that."""
    places = take_stacks(outcomes, readings, stacks) if stacks is not None else {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if RANK_MODULE in child.cmdline():
                child.kill()
    return places


class _PassSignalsOn:
    """While active, stop signals are counted; `pass_on` tells every rank, also one that started later.

    The first and second ask the ranks to stop, the third ends them at once.
    """

    def __init__(self, ready_folder: Path) -> None:
        self._ready_folder = ready_folder
        self.count = 0
        self._told: dict[int, int] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_PassSignalsOn":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        text = (
            "stopping after the step that is running, then saving",
            "still stopping; once more ends the run without saving",
            "ending at once",
        )
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: {text[min(self.count, 3) - 1]}\n".encode())

    def pass_on(self) -> None:
        """Tell each rank how often we were asked, once."""
        for child in psutil.Process().children() if self.count else []:
            ready = is_ready(self._ready_folder, child.pid) or self.count >= 3
            if ready and self._told.get(child.pid, 0) < self.count:
                self._told[child.pid] = self.count
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGTERM if self.count < 3 else signal.SIGKILL)

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
