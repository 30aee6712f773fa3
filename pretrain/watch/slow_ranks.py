"""Which ranks are slower than the others, and on which node: all ranks of a training wait for the slowest.

In: from the loop, each forward pass, and the seconds that were waited for data. Out: once in `WINDOW` steps, the ranks whose own work took
more than `SLOWER` times the median of all. A rank's own work is what it does before it waits for others: its data and its forward passes.
A rank is named that was as slow in nine of ten steps of a window, so that hiccups name nobody.

On a GPU forwards are timed by events on its stream, read when they have passed: nothing is waited for. What this cannot see: a rank whose
backward pass or optimizer alone is slow; and at stage 3 a forward gathers weights, so it contains waiting for others too: there only a rank
that waits for its data stands out.
"""

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed

from pretrain.engine.parallel import Layout

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
    """Measures this rank's own work and compares it with that of the others."""

    def __init__(self, layout: Layout) -> None:
        """Collective."""
        self._layout, self._nodes = layout, layout.gather(socket.gethostname())
        self._steps = 0
        self._waited_before = 0.0
        self._forwards: list[Callable[[], float | None]] = []
        self._unfinished: deque[tuple[float, list[Callable[[], float | None]]]] = deque()
        self._own: list[float] = []
        self._sent: _Sent | None = None

    @contextmanager
    def forward(self) -> Generator[None, None, None]:
        """Around a forward pass."""
        if self._layout.device.type == "cuda":
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._forwards.append(lambda: began.elapsed_time(ended) / 1000 if ended.query() else None)
        else:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
            self._forwards.append(lambda: seconds)

    def after_step(self, seconds_waited: float) -> list[SlowRank]:
        """End a step; every `WINDOW` steps all ranks exchange two numbers each. seconds_waited: for data, since the start.

        Returns who was slow in a window, once, some steps behind its end.
        """
        self._unfinished.append((seconds_waited - self._waited_before, self._forwards))
        self._waited_before, self._forwards = seconds_waited, []
        while self._unfinished and (times := [ask() for ask in self._unfinished[0][1]]).count(None) == 0:
            self._own.append(self._unfinished.popleft()[0] + sum(filter(None, times)))
        self._steps += 1
        found: list[SlowRank] = []
        if self._sent is not None and self._sent.is_there():
            least, middle = self._sent.seconds.tolist()
            found, self._sent = find_slow(least, middle, self._nodes), None
        if self._steps % WINDOW == 0:
            self._sent, self._own = self._send(sorted(self._own) or [0.0]), []
        return found

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
