"""Where the time of a step goes: to waiting for data, to the forward and backward passes, to the optimizer, to the rest.

In: from the loop, a word at each place where another part of a step begins. Out: seconds of each part; they add up to the step's.

A step begins when its data is asked for and ends when its verdicts are on their way; rows, evaluations and saves lie between steps. On a
CPU the parts are told apart by the host's clock, on a GPU by events on its stream, read when they have passed: nothing is waited for, and
data that is fetched while the GPU works costs nothing there. Ranks wait for each other where gradients are reduced, which is part of the
last micro-step's backward pass; at stage 3 also where weights are gathered, in both passes.
"""

import time
from collections import deque
from typing import Literal, NamedTuple, TypeAlias

import torch

Part: TypeAlias = Literal["data_wait", "forward", "backward", "optimizer", "other"]
PARTS: tuple[Part, ...] = ("data_wait", "forward", "backward", "optimizer", "other")

Stamp: TypeAlias = "float | torch.cuda.Event"


class TimedStep(NamedTuple):
    """A step that has passed."""

    seconds: dict[Part, float]
    """Of each part."""
    waited: float
    """Seconds that this rank's host waited for data, in the step and between the one before and it."""


class StepClock:
    """Measures the steps of this rank."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._laps: list[tuple[Part, Stamp]] = []
        self._waited_before = 0.0
        self._unread: deque[tuple[list[tuple[Part, Stamp]], float]] = deque()
        self._untold: list[TimedStep] = []
        self._sums, self._num_steps = dict.fromkeys(PARTS, 0.0), 0

    def enter(self, part: Part) -> None:
        """From here on the time is this part's."""
        if self._is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._laps.append((part, event))
        else:
            self._laps.append((part, time.perf_counter()))

    def end_step(self, seconds_waited: float) -> list[TimedStep]:
        """The step is over. seconds_waited: for data, on the host, since the start. Returns the steps that have passed meanwhile."""
        self.enter("other")
        self._unread.append((self._laps, seconds_waited - self._waited_before))
        self._laps, self._waited_before = [], seconds_waited
        self._read_passed()
        passed, self._untold = self._untold, []
        return passed

    def means(self) -> dict[str, float]:
        """`step_seconds` and `seconds/PART`, means over the steps that have passed since the last call; nothing where none has."""
        self._read_passed()
        if not self._num_steps:
            return {}
        parts = {f"seconds/{part}": seconds / self._num_steps for part, seconds in self._sums.items()}
        self._sums, self._num_steps = dict.fromkeys(PARTS, 0.0), 0
        return {"step_seconds": sum(parts.values()), **parts}

    def _read_passed(self) -> None:
        while self._unread and _has_passed(self._unread[0][0][-1][1]):
            laps, waited = self._unread.popleft()
            seconds = dict.fromkeys(PARTS, 0.0)
            for lap, (part, began) in enumerate(laps[:-1]):
                seconds[part] += _seconds_between(began, laps[lap + 1][1])
            for part in PARTS:
                self._sums[part] += seconds[part]
            self._num_steps += 1
            self._untold.append(TimedStep(seconds, waited))


def _has_passed(stamp: Stamp) -> bool:
    return stamp.query() if isinstance(stamp, torch.cuda.Event) else True


def _seconds_between(began: Stamp, ended: Stamp) -> float:
    if isinstance(began, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        return began.elapsed_time(ended) / 1000
    assert not isinstance(ended, torch.cuda.Event)
    return ended - began
