"""What every test may count on: a quiet environment, a printed seed, and ranks on this machine.

Out: the fixtures `seed` and `run_on_ranks`; tests marked `gpu` are skipped where there is no CUDA device.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# Nothing leaves the machine, and two ranks on two cores do not fight for them.
for name, value in {
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


settings.register_profile("house", deadline=None, print_blob=True)  # a busy machine is not a defect
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` without a CUDA device; torch is imported only if something is marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seed() -> int:
    """A seed that is new each time, printed when the test fails; TEST_SEED=N repeats a failure."""
    chosen = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"TEST_SEED={chosen}")
    return chosen


@pytest.fixture(name="run_on_ranks")
def _run_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_on_ranks(function_path, world_size, arguments, timeout_seconds) -> result of each rank`; see below."""

    def run(function_path: str, world_size: int, arguments: dict[str, Any] | None = None, timeout_seconds: float = 300) -> list[Any]:
        return run_on_ranks(function_path, world_size, arguments or {}, timeout_seconds, tmp_path_factory.mktemp("ranks"))

    return run


def run_on_ranks(function_path: str, world_size: int, arguments: dict[str, Any], timeout_seconds: float, folder: Path) -> list[Any]:
    """Call a function in `world_size` processes joined by gloo on 127.0.0.1.

    function_path: `module:function`, importable from the project's root (`tests.ranks:add_ranks`).
    arguments: keyword arguments, JSON. Returns: the JSON result of every rank, in rank order.
    Fails the test if a rank fails or time runs out; then every rank is killed by its own process group,
    and the end of each one's stderr is shown. No process is left behind in any case.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"rank_{rank}.stderr" for rank in range(world_size)]
    results = [folder / f"rank_{rank}.json" for rank in range(world_size)]
    problem = ""
    try:
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            }
            command = [sys.executable, "-m", "tests.ranks", function_path, json.dumps(arguments), str(results[rank])]
            with logs[rank].open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                    )
                )
        problem = _wait(ranks, timeout_seconds)
    finally:
        for process in ranks:
            _kill_group(process)
    if problem:
        tails = "\n".join(f"--- rank {rank}\n{_tail(log)}" for rank, log in enumerate(logs))
        pytest.fail(f"{function_path} on {world_size} ranks: {problem}\n{tails}", pytrace=False)
    return [json.loads(result.read_text()) for result in results]


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_seconds: float) -> str:
    """Wait for all ranks. Returns what went wrong, or nothing."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank} ended with {f'signal {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'}"
        if None not in codes:
            return ""
        time.sleep(0.02)
    running = [rank for rank, process in enumerate(ranks) if process.poll() is None]
    return f"ranks {running} were still running after {timeout_seconds:g} s"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a rank and whatever it started, and reap it. Its group is its own (`start_new_session`)."""
    with contextlib.suppress(ProcessLookupError):  # the group is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(it was never started)"
