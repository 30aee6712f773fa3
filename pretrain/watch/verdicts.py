"""What all ranks must agree on about each step, without making any of them wait.

In: each rank's summed loss, whether its step was applied, whether it was asked to stop, whether it has written its part of a save. Out: the
true mean loss and the common answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed

from pretrain.engine.parallel import Layout


class Told(NamedTuple):
    """What all ranks know of a step, the same on each."""

    step: int
    loss: float
    """The true mean, in nats per target."""
    stop_asked: bool
    """Whether any rank was asked to stop."""
    num_written: int
    """Ranks that have written their part of a save."""
    applied: bool
    """Whether the step changed the weights."""


class Verdicts:
    """What all ranks have to know about each step: its mean loss, whether it was applied, whether one was asked to stop.

    It travels in one small asynchronous all-reduce, started at the end of a step and read a step later, so that nobody
    waits for it; where the answer is needed now (before a save), `read(now=True)` waits.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=layout.device)
        self._newest: _Verdict | None = None
        self._before: _Verdict | None = None
        self._news: list[Told] = []

    def add(self, loss_sum: torch.Tensor) -> None:
        """A micro-step's summed loss on this rank, in nats (0-dim)."""
        self._loss_sum += loss_sum.detach()

    def send(self, step: int, num_valid: torch.Tensor, stop_asked: bool, save_written: bool, applied: bool) -> None:
        """End a step. Collective, asynchronous. num_valid: targets of the global batch (0-dim)."""
        answers = torch.tensor([stop_asked, save_written, applied], dtype=torch.float64, device=self._layout.device)
        vector = torch.cat([self._loss_sum[None], answers])
        work: Any = distributed.all_reduce(vector, async_op=True)
        wait = work.wait
        if vector.is_cuda:  # on its way to the host at once: read later, it would wait for all that was started meanwhile
            work.wait()
            vector, num_valid = (
                torch.empty_like(there, device="cpu", pin_memory=True).copy_(there, non_blocking=True) for there in (vector, num_valid)
            )
            arrived = torch.cuda.Event()
            arrived.record()
            wait = arrived.synchronize
        if self._before is not None:
            self._tell(self._before)
        self._before, self._newest = self._newest, _Verdict(step, vector, num_valid, wait)
        self._loss_sum = torch.zeros_like(self._loss_sum)

    def read(self, now: bool) -> Told:
        """The common answers to the newest step if `now`, else to the one before it."""
        if self._newest is None:
            raise RuntimeError("no step has been sent yet")
        told = self._tell(self._before or self._newest)
        return self._tell(self._newest) if now else told

    def news(self) -> list[Told]:
        """The answers to every step that was read since the last call, in order, each step once."""
        news, self._news = self._news, []
        return news

    def _tell(self, verdict: "_Verdict") -> Told:
        if verdict.told is None:
            verdict.wait()
            total, stops, num_written, num_applied = verdict.vector.tolist()
            if num_applied not in (0, self._layout.world_size):
                raise RuntimeError(f"step {verdict.step} was applied on {num_applied:g} of {self._layout.world_size} ranks")
            mean = total / max(1.0, verdict.num_valid.item())
            verdict.told = Told(verdict.step, mean, stops > 0, int(num_written), num_applied > 0)
            self._news.append(verdict.told)
        return verdict.told


@dataclass
class _Verdict:
    step: int
    vector: torch.Tensor
    num_valid: torch.Tensor
    wait: Callable[[], object]
    told: Told | None = None
