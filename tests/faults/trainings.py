"""Whole runs for the campaigns that end them: the command on two ranks, and a comparison with the run that nothing happened to.

In: a folder, settings. Out: processes that are reaped in any case; of a finished run its bits, its rows and its ledger (`ledger_rank.py`),
and sentences about what is not as in the undisturbed one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.verify import list_commits, read_commit
from pretrain.watch.metrics import METRICS_FILE, read_rows
from tests.faults.ledger_rank import LEDGER
from tests.tiny import write_tiny_dataset
from tests.training import TINY

ROOT = Path(__file__).parent.parent.parent
BATCH, TOKENS_PER_STEP, RUN_SECONDS = 8, 256, 300
RANK_MODULE = "tests.faults.ledger_rank"
COMMAND = f"""
from pretrain.run import lease, ranks, supervisor
ranks.RANK_MODULE = "{RANK_MODULE}"
supervisor.PAUSES_SECONDS = (0.0, 0.0, 0.0)
lease.ABANDONED_AFTER_SECONDS = 3.0
from pretrain.cli import main
main()
"""
"""The command, which does not wait before the next attempt, nor a minute for the sign of life of another host."""
TIMES = ("time", "tokens_per_second", "data_wait_share", "step_seconds", "seconds/", "mfu/", "memory/", "attempt")
"""What differs in the rows of equal runs, by how it begins."""
OF_TIMES = ("ranks/", "slow_ranks/", "rollback/", "checkpoint/")
"""Rows that do; a save may be committed and its row not yet written."""


@dataclass
class Prepared:
    """A dataset, and undisturbed runs on it, each made when it is first asked for."""

    folder: Path
    _references: dict[str, "Learnt"] = field(default_factory=dict)

    @property
    def dataset(self) -> Path:
        return self.folder / "data"

    def reference(self, settings: dict[str, str]) -> "Learnt":
        """What the undisturbed run of these settings learnt."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._references:
            place = self.folder / f"reference-{len(self._references)}"
            with training(self.dataset, place, settings) as process:
                if process.wait(RUN_SECONDS):
                    raise RuntimeError((place / "said.txt").read_text()[-3000:])
            self._references[key] = learnt(place / "runs" / "tiny")
            check_reference(self._references[key])
        return self._references[key]


@dataclass(frozen=True)
class Learnt:
    """A finished run."""

    step: str
    state: str
    """SHA-256 of weights, moments and counters."""
    rows: list[dict[str, Any]]
    """Of `metrics.jsonl`, without what depends on the time."""
    ledger: dict[tuple[int, int], list[dict[str, Any]]]
    """By attempt and rank, the steps it began."""


def prepare(folder: Path, chosen: random.Random) -> Prepared:
    """Write a dataset."""
    write_tiny_dataset(folder / "data", seed=chosen.randrange(2**31))
    return Prepared(folder)


def settings_of(steps: int, stage: int = 1, **more: str) -> dict[str, str]:
    """A run of so many steps; dotted keys with `__` for the dots."""
    batch = f"global_batch_samples: {BATCH}, micro_batch_samples: 2"
    return {
        **TINY,
        "training": f"{{sequence_length: 32, {batch}, total_tokens: {TOKENS_PER_STEP * steps}}}",
        "parallel.zero_stage": str(stage),
        "checkpoint.every_steps": "5",
        "checkpoint.self_test": "false",
        "evaluate.every_steps": "40",
        **{key.replace("__", "."): value for key, value in more.items()},
    }


@contextmanager
def training(dataset: Path, folder: Path, settings: dict[str, str], poison: Any = None) -> Generator[subprocess.Popen[bytes], None, None]:
    """`pretrain train`; what it says is appended to `said.txt` in the folder, its run is `runs/tiny`. Nothing of it is left behind."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text("{}")
    given = {"data.root": dataset, "run.root": folder / "runs", **settings}
    command = [sys.executable, "-c", COMMAND, "train", str(folder / "tiny.yaml"), *(f"{key}={value}" for key, value in given.items())]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "POISON": json.dumps(poison or {})}
    with (folder / "said.txt").open("ab") as said:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
    try:
        yield process
    finally:
        tell(family_of(process), signal.SIGKILL)
        process.wait()


def family_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The command and all it started, itself first; none when it has ended."""
    with suppress(psutil.NoSuchProcess):
        if process.poll() is None:
            own = psutil.Process(process.pid)
            return [own, *own.children(recursive=True)]
    return []


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Its ranks, in the order they were started."""
    found: list[psutil.Process] = []
    for one in family_of(process)[1:]:
        with suppress(psutil.NoSuchProcess):
            if RANK_MODULE in one.cmdline():
                found.append(one)
    return found


def tell(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Send each a signal, if it is still there."""
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait; whether it came to be so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def read_ledger(run: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """By attempt and rank, in that order, the steps that were begun; a line torn by a kill is left out."""
    found = {}
    for path in (run / LEDGER).glob("*.jsonl"):
        _, attempt, _, rank = path.stem.split("-")
        found[int(attempt), int(rank)] = read_rows(path)
    return dict(sorted(found.items()))


def learnt(run: Path) -> Learnt:
    """What a run has learnt so far, from what."""
    rows = [row for row in read_rows(run / METRICS_FILE) if not any(key.startswith(OF_TIMES) for key in row)]
    newest = list_commits(run / "checkpoints")[0]
    plain = [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]
    return Learnt(newest.name, state_hash(read_commit(newest)), plain, read_ledger(run))


def check_reference(reference: Learnt) -> None:
    """Of the undisturbed run: every sample once, every step a row. Raises AssertionError."""
    lines = [line for steps in reference.ledger.values() for line in steps]
    numbers = sorted(number for line in lines for number in line["numbers"])
    assert numbers == list(range(BATCH * int(reference.step[5:]))), "the ledger has gaps or duplicates"
    assert [row["step"] for row in reference.rows if "loss" in row] == list(range(1, int(reference.step[5:]) + 1))


def differences(run: Path, reference: Learnt) -> list[str]:
    """What is not in a finished run as it is in the undisturbed one."""
    return compare(learnt(run), reference)


def compare(found: Learnt, reference: Learnt) -> list[str]:
    """What is not in one as in the other, but that attempts may have done steps again; a sentence each."""
    problems = [f"{what} differ" for what in ("step", "state") if getattr(found, what) != getattr(reference, what)]
    if found.rows != reference.rows:
        pairs = zip([*found.rows, None], [*reference.rows, None], strict=False)
        first = next(((one, other) for one, other in pairs if one != other), None)
        problems.append(f"{len(found.rows)} rows, wanted {len(reference.rows)}; the first that differ: {first}")
    wanted = {(rank, line["seen"]): line["tokens"] for (_, rank), lines in reference.ledger.items() for line in lines}
    seen = set()
    for (attempt, rank), lines in found.ledger.items():
        starts = [line["seen"] for line in lines]
        if starts != list(range(starts[0], starts[0] + BATCH * len(starts), BATCH) if starts else []):
            problems.append(f"attempt {attempt} has a gap or a duplicate in its steps on rank {rank}")
        if any(wanted.get((rank, line["seen"])) != line["tokens"] for line in lines):
            problems.append(f"attempt {attempt} learnt from other tokens on rank {rank}")
        seen |= {(rank, start) for start in starts}
    if seen != set(wanted):
        problems.append(f"{len(set(wanted) - seen)} parts of steps were never learnt from")
    return problems


def lost_steps(run: Path) -> list[int]:
    """Steps that each attempt had begun and the next one began again; the last attempt has none. Attempts without a step are left out."""
    spans: dict[int, tuple[int, int]] = {}
    for (attempt, _), lines in read_ledger(run).items():
        if lines:
            first, last = spans.get(attempt, (lines[0]["seen"], -1))
            spans[attempt] = first, max(last, lines[-1]["seen"])
    ordered = list(spans.values())
    return [max(0, last + BATCH - first) // BATCH for (_, last), (first, _) in pairwise(ordered)]


def attempts_of(run: Path) -> list[dict[str, Any]]:
    """Its finished attempts."""
    return [row for row in read_rows(run / "attempts.jsonl") if "attempt" in row]
