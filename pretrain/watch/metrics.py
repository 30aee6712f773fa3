"""Values, and the file that is the truth about them.

In: what the loop saw in a step. Out: rows of `metrics.jsonl`, one JSON object a line, each step exactly once however
often the run was killed: at resume the file is cut back to the checkpoint's step.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from configs.durable import write_file
from configs.errors import UserError
from pretrain.engine.parallel import Layout

METRICS_FILE = "metrics.jsonl"
"""Its name in the run folder."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def cut_back(path: Path, step: int) -> None:
    """Remove rows after `step` (they will be written again) and a torn last line."""
    if path.is_file():
        kept = [row for row in read_rows(path) if row.get("step", 0) <= step]
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class MetricsLog:
    """Appends rows to `metrics.jsonl`, one complete line at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps(row) + "\n")


class Verdicts:
    """What all ranks have to know about each step: its mean loss, whether that is finite, whether one was asked to stop.

    It travels in one small asynchronous all-reduce, started at the end of a step and read a step later, so that nobody
    waits for it; where the answer is needed now (before a save), `read(now=True)` waits.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=layout.device)
        self._newest: _Verdict | None = None
        self._before: _Verdict | None = None

    def add(self, loss_sum: torch.Tensor) -> None:
        """A micro-step's summed loss on this rank, in nats (0-dim)."""
        self._loss_sum += loss_sum.detach()

    def send(self, step: int, num_valid: float, stop_asked: bool) -> None:
        """End a step. Collective, asynchronous. num_valid: targets of the global batch."""
        asked = torch.tensor(float(stop_asked), dtype=torch.float64, device=self._layout.device)
        vector = torch.stack([self._loss_sum, asked])
        self._before, self._newest = self._newest, _Verdict(step, num_valid, vector, distributed.all_reduce(vector, async_op=True))
        self._loss_sum = torch.zeros_like(self._loss_sum)

    def read(self, now: bool) -> tuple[float, bool]:
        """(mean loss in nats per target, whether any rank was asked to stop), equal on every rank.

        Of the newest step if `now`, else of the one before it. Raises UserError when the loss is not finite.
        """
        verdict = self._newest if now or self._before is None else self._before
        if verdict is None:
            raise RuntimeError("no step has been sent yet")
        if verdict.work is not None:
            verdict.work.wait()
            verdict.work = None
        total, stops = verdict.vector.tolist()
        mean = total / max(1.0, verdict.num_valid)
        if not math.isfinite(mean):
            raise UserError(f"the loss of step {verdict.step} is {mean}; lower optimizer.peak_lr, or look at the data of that step.")
        return mean, stops > 0


@dataclass
class _Verdict:
    step: int
    num_valid: float
    vector: torch.Tensor
    work: Any


class Throughput:
    """Tokens per second between two reports, by a monotonic clock."""

    def __init__(self, tokens_seen: int) -> None:
        self._tokens, self._time = tokens_seen, time.monotonic()

    def since_last(self, tokens_seen: int) -> float:
        """Tokens per second since the last call (or since the start), over all ranks."""
        now = time.monotonic()
        rate = (tokens_seen - self._tokens) / max(1e-9, now - self._time)
        self._tokens, self._time = tokens_seen, now
        return rate
