"""Going back behind a spike of the loss: what is planned, what is written down of it, which samples are left out for it. No torch.

In: a spike, the steps that are committed. Out: a row of `rollbacks.jsonl`, written before anything is changed: whoever starts next
carries out what it says, as often as needed.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.run.guard import Spike

ROLLBACKS_FILE = "rollbacks.jsonl"
"""Its name in the run folder."""


@dataclass(frozen=True)
class Rollback:
    """A return to an older checkpoint."""

    step: int
    """Of the spike."""
    loss: float
    z: float
    to_step: int
    """The checkpoint that is returned to; 0: the beginning."""
    first_sample: int
    end_sample: int
    """Numbers of the samples that are left out: [first, end)."""
    attempt: int
    """That met the spike: newer checkpoints of it and of those before it are moved aside."""

    def __str__(self) -> str:
        return (
            f"the loss of step {self.step} is {self.loss:.4f}, {self.z:.1f} robust standard deviations too high: the run goes back to "
            f"{f'step {self.to_step}' if self.to_step else 'its beginning'} and leaves out samples {self.first_sample} to "
            f"{self.end_sample - 1}."
        )


def plan_rollback(
    spike: Spike,
    config: RunConfig,
    numbers: Callable[[int, int], Sequence[int] | NDArray[np.int64]],
    committed: Iterable[int],
    attempt: int,
    rollbacks: Sequence[Rollback],
) -> Rollback:
    """Where to go back to, and what to leave out. Raises UserError when the run has had all its rollbacks.

    numbers: the numbers of so many samples, when so many have been seen; committed: steps; rollbacks: those that the run has had.
    """
    if len(rollbacks) >= config.guard.rollbacks:
        raise UserError(
            f"the loss of step {spike.step} is {spike.loss:.4f}, {spike.z:.1f} robust standard deviations too high, and the run has been "
            f"rolled back {len(rollbacks)} times (guard.rollbacks): the data of single steps is not the reason. Lower optimizer.peak_lr, "
            "or set guard.on_spike=alarm to go on through it."
        )
    steps, width = config.training.steps, config.guard.spike_window_steps
    first, last = max(1, spike.step - width), min(steps.total_steps, spike.step + width)
    return Rollback(
        spike.step,
        spike.loss,
        spike.z,
        to_step=max((step for step in committed if step < first), default=0),
        first_sample=int(numbers(steps.samples_before(first - 1), 1)[0]),
        end_sample=int(numbers(steps.samples_before(last) - 1, 1)[0]) + 1,
        attempt=attempt,
    )


def record_rollback(folder: Path, row: dict[str, Any]) -> None:
    """Append a rollback (as `dataclasses.asdict` gives it) to the run folder's file, synced. Raises OSError."""
    path = folder / ROLLBACKS_FILE
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rollbacks(folder: Path) -> list[Rollback]:
    """All of a run, oldest first; a torn last line, which nothing was done about yet, is left out."""
    path, found = folder / ROLLBACKS_FILE, list[Rollback]()
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(Rollback(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def left_out(skipped: Iterable[tuple[int, int]], rollbacks: Iterable[Rollback]) -> tuple[tuple[int, int], ...]:
    """The ranges [first, end) that are left out with those of the rollbacks: in ascending order, apart from one another."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted([*skipped, *((one.first_sample, one.end_sample) for one in rollbacks)]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)
