"""The campaign of ranks that hang: each is found within its phase's limit, named, and costs the run nothing but time.

    python -m tests.faults.hangs [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

A rank is stopped (SIGSTOP) at any line, waits for its own lock, waits for tokens that never come, or for a save that is never written; or,
behind the last save, Weights & Biases never closes. And a machine that sleeps for a while, all at once, has not hung. Out: for each kind a
line (or an object of JSON) with how many were tried, how many went as promised, and the seed. Exit status 1 if anything did not.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.verify import list_commits, read_commit
from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.faults.hung_rank import HUNG_FILE
from tests.tiny import write_tiny_dataset
from tests.training import TINY

ROOT = Path(__file__).parent.parent.parent
RANKS, STEPS, SAVE_EVERY, LIMIT_SECONDS = 2, 100, 5, 8.0
DETECTED_SECONDS, GONE_SECONDS, RUN_SECONDS = LIMIT_SECONDS + 15, 30, 240
SETTINGS = {
    **TINY,
    "training": f"{{sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 2, total_tokens: {256 * STEPS}}}",
    "checkpoint.every_steps": str(SAVE_EVERY),
    "stall": f"{{start_seconds: 120, step_seconds: {LIMIT_SECONDS}, save_seconds: {LIMIT_SECONDS}, end_seconds: {LIMIT_SECONDS}}}",
}
COMMAND = "from pretrain.run import ranks; ranks.RANK_MODULE = 'tests.faults.hung_rank'; from pretrain.cli import app; app()"
WHERE = {
    "stopped": r"its process is stopped, at \S+\.py:\d+ in \w+",
    "deadlock": r"hung_rank\.py:\d+ in deadlock",
    "data": r"batches\.py:\d+ in next_step \(other threads: .*hung_rank\.py:\d+ in read_for_ever",
    "save": r"arena\.py:\d+ in answer",
    "end": r"hung_rank\.py:\d+ in never_end",
}
"""What the message has to say of where the rank stood."""


@dataclass(frozen=True)
class Prepared:
    """A dataset, and how the undisturbed run on it ended."""

    dataset: Path
    reference: dict[str, Any]


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Write a dataset and train on it undisturbed."""
    write_tiny_dataset(folder / "data", seed=chosen.randrange(2**31))
    with training(folder / "data", folder, {}) as process:
        _, said = process.communicate(timeout=RUN_SECONDS)
    if process.returncode:
        raise RuntimeError(said)
    return Prepared(folder / "data", what_was_learnt(folder / "runs" / "tiny"))


@contextmanager
def training(dataset: Path, folder: Path, plan: dict[str, Any]) -> Generator[subprocess.Popen[str], None, None]:
    """The command `pretrain train` on two ranks, one of which follows the plan; nothing of it is left behind."""
    (folder / "tiny.yaml").write_text("{}")
    settings = {"data.root": dataset, "run.root": folder / "runs", **SETTINGS}
    command = [sys.executable, "-c", COMMAND, "train", str(folder / "tiny.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HANG": json.dumps(plan), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        family = [process, *(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])]
        for one in family:
            one.kill()
        process.wait()


def what_was_learnt(run: Path) -> dict[str, Any]:
    """Every weight and moment of the last commit, and the numbers of each step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [[row["step"], row["loss"], row["gradient_norm"], row["learning_rate"]] for row in rows if "loss" in row]
    held_out = [[row["step"], row["held_out/nats_per_token"]] for row in rows if "held_out/nats_per_token" in row]
    newest = list_commits(run / "checkpoints")[0]
    return {"step": newest.name, "hash": state_hash(read_commit(newest)), "numbers": numbers, "held_out": held_out}


def check(kind: str, case: Case) -> Outcome:
    """Let one rank hang, and follow what becomes of it."""
    rank = 0 if kind == "end" else case.chosen.randrange(RANKS)
    step = case.chosen.randrange(1, STEPS - 2 * SAVE_EVERY)
    plan = {"kind": kind, "rank": rank, "step": step, "delay": case.chosen.uniform(0, 0.05)}
    run = case.folder / "runs" / "tiny"
    problems: list[str] = []
    with training(case.prepared.dataset, case.folder, plan) as process:
        deadline = time.monotonic() + RUN_SECONDS / 2
        while not (run / HUNG_FILE).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        if process.poll() is not None or not (run / HUNG_FILE).exists():
            return Outcome(1, [f"{plan}: nothing hung: {process.communicate(timeout=60)[1] if process.poll() is not None else ''}"])
        hung = json.loads((run / HUNG_FILE).read_text())["time"]
        family = psutil.Process(process.pid).children(recursive=True)
        seconds = wait_until(lambda: len(stack_files(run)) == RANKS, hung + DETECTED_SECONDS) - hung
        if seconds > DETECTED_SECONDS:
            problems.append(f"not found {seconds:.1f} s after it hung (limit {LIMIT_SECONDS:g} s)")
        left = psutil.wait_procs(family, timeout=GONE_SECONDS)[1]
        problems += [f"{GONE_SECONDS} s later there still was {one}" for one in left]
        _, said = process.communicate(timeout=RUN_SECONDS)
    dumps = {path.name: path.read_text() for path in stack_files(run)}
    missing = [name for name, text in dumps.items() if ' File "' not in text and not (kind == "end" and ": gone\n" in text)]
    problems += [f"{name} holds no stack: {dumps[name]}" for name in missing]  # behind the end the other rank has left
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    ends = [(row["attempt"], row["status"]) for row in attempts]
    if ends != ([(1, 0)] if kind == "end" else [(1, 75), (2, 0)]) or process.returncode != 0:
        problems.append(f"the attempts ended as {ends}, the command with {process.returncode}")
    if not re.search(rf"rank {rank} on {re.escape(os.uname().nodename)} did not arrive: .*{WHERE[kind]}", said):
        problems.append("rank and line were not named")
    if what_was_learnt(run) != case.prepared.reference:
        problems.append("it did not end with the bits of the undisturbed run")
    return Outcome(1, [f"{plan}: {problem}\n{said[-1500:]}" for problem in problems])


def stack_files(run: Path) -> list[Path]:
    """The stacks of the first attempt."""
    return sorted((run / "stacks" / "attempt-1").glob("rank_*.txt"))


def wait_until(is_so: Any, deadline: float) -> float:
    """Wait, until a while behind the deadline at most; returns when it was so, by the monotonic clock."""
    while not is_so() and time.monotonic() < deadline + 1:
        time.sleep(0.05)
    return time.monotonic()


def check_paused(case: Case) -> Outcome:
    """Stop everything, the supervisor too, for longer than any limit, and let it go on: nothing has hung."""
    run = case.folder / "runs" / "tiny"
    with training(case.prepared.dataset, case.folder, {}) as process:
        deadline = time.monotonic() + RUN_SECONDS / 2
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(case.chosen.uniform(0, 0.2))
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            one.suspend()
        is_early = len(list((run / "checkpoints").glob("step-*"))) < STEPS // SAVE_EVERY
        time.sleep(LIMIT_SECONDS + 4)
        for one in reversed(family):
            one.resume()
        _, said = process.communicate(timeout=RUN_SECONDS)
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    problems = [] if is_early else ["the run was over before it was paused"]
    if [row["status"] for row in attempts] != [0] or stack_files(run):
        problems.append(f"a pause counted as a stall: {said[-1500:]}")
    if what_was_learnt(run) != case.prepared.reference:
        problems.append("it did not end with the bits of the undisturbed run")
    return Outcome(1, problems)


KINDS = {
    **{name: Kind(name, 20, 1, prepare, partial(check, name)) for name in WHERE},
    "paused": Kind("paused", 20, 1, prepare, check_paused),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("hangs", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
