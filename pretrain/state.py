"""Where a run stands: the few integers that, with the run file and the data, determine everything else."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Advances once per step (one optimizer update), also on a step that DeepSpeed skipped."""

    step: int = 0
    samples_seen: int = 0
    """The position in the data: sample number -> tokens is a pure function, so one integer is enough."""
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Steps whose update DeepSpeed did not apply (a gradient was not finite)."""
    skipped_samples: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of sample numbers that are left out of the order on purpose. A branch on other data than its parent's begins
    with (0, -N): N samples were seen of the parent's data, and the numbers of its own begin at 0 behind them."""

    def advance(self, num_samples: int, num_tokens: int, applied: bool) -> "TrainState":
        """The state after one more step."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + num_samples,
            tokens_seen=self.tokens_seen + num_tokens,
            skipped_steps=self.skipped_steps + (0 if applied else 1),
        )

    def to_json(self) -> dict[str, Any]:
        """A mapping that `TrainState(**mapping)` reads back."""
        return asdict(self)

    @staticmethod
    def from_json(mapping: dict[str, Any]) -> "TrainState":
        """The inverse of `to_json`."""
        skipped = tuple((int(first), int(end)) for first, end in mapping["skipped_samples"])
        numbers = {key: int(value) for key, value in mapping.items() if key != "skipped_samples"}
        return TrainState(**numbers, skipped_samples=skipped)
