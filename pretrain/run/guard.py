"""Whether the numbers of a step can be right: skipped steps in a row, spikes of the loss. No torch.

In: of every step, in order, its loss and whether its update was applied, the same on every rank. Out: what was found, the same on
every rank; a UserError where the run must not go on.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from configs.errors import UserError
from configs.guard_section import GuardSection

NUM_LOSSES = 128
"""Losses that a new one is compared with."""
FEWEST_LOSSES = 16
"""With fewer there is no judgement."""
SMALLEST_SPREAD = 0.005
"""Of the median. The losses of a few steps may lie closer by chance, and then the next one would look far away."""
SCALE_SEARCH_STEPS = 16
"""Skipped steps in a row by which fp16 comes from its first scale of the loss, 2**16, down to 2."""


class StepNumbers(Protocol):
    """What is judged of a step."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def applied(self) -> bool: ...


@dataclass(frozen=True)
class Skip:
    """A step whose update was not applied."""

    step: int
    loss: float
    in_a_row: int
    is_scale_search: bool
    """Whether it is only fp16 looking for the scale of its loss."""

    def __str__(self) -> str:
        return f"WARNING: step {self.step} was skipped: {_what(self.loss)} ({self.in_a_row} in a row)"


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it."""

    step: int
    loss: float
    median: float
    z: float

    def __str__(self) -> str:
        return (
            f"WARNING: the loss of step {self.step} is {self.loss:.4f}, {self.z:.1f} robust standard deviations above "
            f"{self.median:.4f}, the median of those before it"
        )


class Guard:
    """Judges the steps of an attempt."""

    def __init__(self, section: GuardSection, scales_loss: bool, losses: Iterable[float] = ()) -> None:
        """scales_loss: whether a gradient that is not finite may be the search for fp16's scale. losses: of the steps before."""
        self._section, self._scales_loss = section, scales_loss
        self._losses = deque((loss for loss in losses if math.isfinite(loss)), maxlen=NUM_LOSSES)
        self._skips = self._scale_search = 0
        self._in_spike = False

    @property
    def finite_loss(self) -> float:
        """Of the newest step that had one, for a commit. Raises UserError where none had."""
        if not self._losses:
            raise UserError(
                "no step so far had a loss that is finite, so there is nothing to save; lower optimizer.peak_lr, or look at the data."
            )
        return self._losses[-1]

    def judge(self, steps: Sequence[StepNumbers]) -> list[Skip | Spike]:
        """What is wrong with the next steps. Raises UserError after too many skipped ones in a row."""
        found: list[Skip | Spike] = []
        for one in steps:
            if not one.applied:
                found.append(self._skipped(one))
            elif not math.isfinite(one.loss):
                raise RuntimeError(f"the loss of step {one.step} is {one.loss}, and its update was applied")
            else:
                self._skips = self._scale_search = 0
            if math.isfinite(one.loss):
                found += self._compare(one)
                self._losses.append(one.loss)
        return found

    def _skipped(self, one: StepNumbers) -> Skip:
        is_scale_search = self._scales_loss and math.isfinite(one.loss)
        if is_scale_search:
            self._scale_search += 1
        else:
            self._skips += 1
        in_a_row, limit = (self._scale_search, SCALE_SEARCH_STEPS + 1) if is_scale_search else (self._skips, self._section.skips_in_a_row)
        if in_a_row >= limit:
            why = "fp16 is too narrow for it at any scale of the loss" if is_scale_search else "see guard.skips_in_a_row"
            raise UserError(
                f"step {one.step} was skipped, the last of {in_a_row} in a row: {_what(one.loss)} ({why}). Nothing of them is in the "
                "weights or in a checkpoint. Lower optimizer.peak_lr, lengthen schedule.warmup_tokens, or look at the data of these steps."
            )
        return Skip(one.step, one.loss, in_a_row, is_scale_search)

    def _compare(self, one: StepNumbers) -> list[Skip | Spike]:
        if self._section.on_spike == "ignore" or len(self._losses) < FEWEST_LOSSES:
            return []
        middle, z = robust_z(one.loss, self._losses)
        was_in_spike, self._in_spike = self._in_spike, z > self._section.spike_z
        return [Spike(one.step, one.loss, middle, z)] if self._in_spike and not was_in_spike else []  # each is told once


def first_spike(found: Iterable[Skip | Spike]) -> Spike | None:
    """The first spike among what was found."""
    return next((one for one in found if isinstance(one, Spike)), None)


def robust_z(value: float, others: Iterable[float]) -> tuple[float, float]:
    """(median of the others, how many robust standard deviations `value` lies above it).

    The robust standard deviation is 1.4826 times the median absolute deviation (equal to the usual one for a normal distribution).
    """
    known = list(others)
    middle = median(known)
    spread = max(1.4826 * median(abs(other - middle) for other in known), SMALLEST_SPREAD * abs(middle), 1e-9)
    return middle, (value - middle) / spread


def _what(loss: float) -> str:
    return f"its loss is {loss}" if not math.isfinite(loss) else "its gradient is not finite"
