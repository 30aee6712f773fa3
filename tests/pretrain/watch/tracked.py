"""For tests of the tracking: attempts of a run that only writes rows, the server they are shown to, and what it has in the end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.watch.metrics import METRICS_FILE, read_rows
from pretrain.watch.wandb_run import newest_rows
from tests.pretrain.watch.wandb_server import KEY, Server

ROOT = Path(__file__).parent.parent.parent.parent
PROCESS_SECONDS = 150
SHORT = {"INIT_TIMEOUT_SECONDS": 3, "FINISH_TIMEOUT_SECONDS": 2, "END_SECONDS": 4.0}
"""Limits, so that a server that never answers does not keep a test."""


def write_run(folder: Path, total_steps: int, **watch: Any) -> Path:
    """A run folder that has not begun; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"name": folder.name, "root": str(folder.parent)},
        "training": {"total_tokens": total_steps * 32, "sequence_length": 32, "global_batch_samples": 1, "micro_batch_samples": 1},
        "watch": {"log_every_steps": 1, **watch},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    (folder / "environment.json").write_text('{"git_commit": "abc"}\n')
    return folder


def environment_for(server: Server | None, **more: str) -> dict[str, str]:
    """Online at a server of ours, or offline; below a program that has a W&B service of its own, which is no more."""
    dropped = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    where = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY} if server is not None else {"WANDB_MODE": "offline"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    outer = {"WANDB_SERVICE": "3-1-unix-/no/such/service"}
    return {**kept, **where, **outer, "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": path, **more}


@contextmanager
def beginning(folder: Path, environment: dict[str, str], **asked: Any) -> Generator["subprocess.Popen[str]"]:
    """An attempt (see `tracked_attempt.py`) as a process of its own; nothing of it is left."""
    command = [sys.executable, "-m", "tests.pretrain.watch.tracked_attempt", str(folder), json.dumps(asked)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def attempt(folder: Path, environment: dict[str, str], **asked: Any) -> dict[str, Any]:
    """Run one to its end. Returns what it told."""
    with beginning(folder, environment, **asked) as process:
        return told_by(process, bool(asked.get("killed")))


def told_by(process: "subprocess.Popen[str]", killed: bool = False) -> dict[str, Any]:
    """What an attempt told at its end."""
    out, error = process.communicate(timeout=PROCESS_SECONDS)
    assert process.returncode == (-9 if killed else 0), error
    return {} if killed else json.loads(out)


def pretrain(environment: dict[str, str], *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The command."""
    command = [sys.executable, "-m", "pretrain.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False)


def wait_until(is_so: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.02)


def died(folder: Path, number: int, last_step: int, cause: str) -> None:
    """What the supervisor writes down of an attempt."""
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": number, "first_step": 0, "last_step": last_step, "cause": cause, "status": 1}) + "\n")


def compare(history: list[dict[str, Any]], folder: Path, steps: range) -> None:
    """What W&B has is `metrics.jsonl`, and that has each step once: none missing, none doubled, none of an attempt that does not count."""
    truth = read_rows(folder / METRICS_FILE)
    assert [row["step"] for row in truth] == list(steps)
    names = [(row["attempt"], row["row"]) for row in history if "row" in row]
    assert len(names) == len(set(names)), "rows were sent twice"
    counting = newest_rows(history)
    assert [{key: row[key] for key in one} for row, one in zip(counting, truth, strict=True)] == truth
    assert [row["row"] for row in counting] == list(range(len(truth)))
