"""Which ranks are slower than the others, and on which node: all ranks of a training wait for the slowest.

In: the steps that have passed, with their parts' times (`step_times.py`). Out: once in `WINDOW` steps, how far the ranks' own work lies
apart, and the ranks whose own work took more than `SLOWER` times the median of all. A rank's own work is what it does before it waits for
others: its data and its forward passes. A rank is named that was as slow in nine of ten steps of a window, so that hiccups name nobody.

What this cannot see: a rank whose backward pass or optimizer alone is slow; and at stage 3 a forward gathers weights, so it contains
waiting for others too: there only a rank that waits for its data stands out.
"""

import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed

from pretrain.engine.parallel import Layout
from pretrain.watch.step_times import TimedStep

SLOWER, WINDOW = 1.2, 50
"""Times the median; steps."""
NOISE_SECONDS = 0.005
"""Of a step: what a rank is slower by has to be more than this. Less is the operating system's doing."""


class SlowRank(NamedTuple):
    """A rank that the others wait for."""

    rank: int
    node: str
    ratio: float
    """Its own work in a step, over the median of all ranks."""
    seconds: float
    """Of its own work in a step."""


class Spread(NamedTuple):
    """How far the ranks lie apart in a window."""

    slowest: SlowRank
    """The one whose median step took longest, however little that is."""
    median_seconds: float
    """Of the ranks' own work in a step."""
    slow: list[SlowRank]
    """Those that the others wait for, the slowest first."""


def compare_ranks(least: Sequence[float], middle: Sequence[float], nodes: Sequence[str]) -> Spread:
    """How far the ranks lie apart. Arguments as in `find_slow`."""
    median = statistics.median_low(middle)
    rank = max(range(len(middle)), key=middle.__getitem__)
    slowest = SlowRank(rank, nodes[rank], middle[rank] / median if median else 1.0, middle[rank])
    return Spread(slowest, median, find_slow(least, middle, nodes))


def find_slow(least: Sequence[float], middle: Sequence[float], nodes: Sequence[str]) -> list[SlowRank]:
    """Ranks above `SLOWER` times the median, the slowest first.

    least, middle: seconds of each rank's own work in a step: what nine of ten steps took at least, and the median step. Of the ranks'
    medians the lower middle one is the measure: of two ranks the slower one can stand out.
    """
    median = statistics.median_low(middle)
    limit = max(SLOWER * median, median + NOISE_SECONDS)
    slow = [
        SlowRank(rank, nodes[rank], middle[rank] / median, middle[rank]) for rank, own in enumerate(least) if own > limit and median > 0
    ]
    return sorted(slow, key=lambda one: -one.ratio)


class Pace:
    """Compares this rank's own work with that of the others."""

    def __init__(self, layout: Layout) -> None:
        """Collective."""
        self._layout, self._nodes = layout, layout.gather(socket.gethostname())
        self._steps = 0
        self._own: list[float] = []
        self._sent: _Sent | None = None

    def after_step(self, passed: Sequence[TimedStep]) -> Spread | None:
        """End a step; every `WINDOW` steps all ranks exchange two numbers each. passed: the steps that are known since the last call.

        Returns how a window was, once, some steps behind its end.
        """
        self._own += [step.waited + step.seconds["forward"] for step in passed]
        self._steps += 1
        spread: Spread | None = None
        if self._sent is not None and self._sent.is_there():
            least, middle = self._sent.seconds.tolist()
            spread, self._sent = compare_ranks(least, middle, self._nodes), None
        if self._steps % WINDOW == 0:
            self._sent, self._own = self._send(sorted(self._own) or [0.0]), []
        return spread

    def _send(self, ascending: Sequence[float]) -> "_Sent":
        """Exchange what each rank's steps took, without waiting for it."""
        everyone = torch.zeros(2, self._layout.data_size, dtype=torch.float64)
        everyone[:, self._layout.data_rank] = torch.tensor([ascending[len(ascending) // 10], statistics.median_low(ascending)])
        everyone = everyone.to(self._layout.device, non_blocking=True)
        work: Any = distributed.all_reduce(everyone, async_op=True)
        if not everyone.is_cuda:
            return _Sent(everyone, work.is_completed)
        work.wait()  # the stream waits, not the host
        on_host = torch.empty_like(everyone, device="cpu", pin_memory=True).copy_(everyone, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Sent(on_host, arrived.query)


@dataclass(frozen=True)
class _Sent:
    seconds: torch.Tensor
    """[2, ranks]: what nine of ten steps took at least, and the median step."""
    is_there: Callable[[], bool]
