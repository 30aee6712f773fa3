"""What all ranks must agree on about each step, without making any of them wait.

In: each rank's summed loss and whether it was asked to stop. Out: the true mean loss and the common answer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from configs.errors import UserError
from pretrain.engine.parallel import Layout


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
