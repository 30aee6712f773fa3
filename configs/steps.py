"""Which samples each step of a run learns from: arithmetic without state, as quick for a trillion tokens as for a thousand.

In: how many tokens a run and a sample have, and how the global batch grows. Out: the number of steps, and the way from a
step to its samples and back. A step has the number of steps that are done before it, so the first one is step 0.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Phase(NamedTuple):
    """Steps of one size."""

    first_step: int
    first_sample: int
    """Samples that are seen before it."""
    batch_samples: int
    """Samples of each of its steps, over all ranks."""


class Steps:
    """All steps of a run. Behind its end they go on, as large as the last one: what is read ahead asks for them."""

    def __init__(self, total_tokens: int, sequence_length: int, ramp: Sequence[tuple[int, int]], batch_samples: int) -> None:
        """ramp: until how many tokens, ascending, steps have how many samples; behind it they have `batch_samples`.

        Each size, and the run, is rounded up to whole steps.
        """
        self._sequence_length = sequence_length
        self.sizes = [*(size for _, size in ramp), batch_samples]
        """Samples of a step, phase by phase."""
        self.phases = [Phase(0, 0, self.sizes[0])]
        for (until_tokens, _), size in zip(ramp, self.sizes[1:], strict=True):
            first = self.first_sample(until_tokens)
            self.phases.append(Phase(self.step_of(first), first, size))
        self.total_samples = self.first_sample(total_tokens)
        self.total_steps = self.step_of(self.total_samples)
        self.total_tokens = self.total_samples * sequence_length
        """Of whole steps."""

    def batch_at(self, samples_seen: int) -> int:
        """Samples of the step that begins when so many have been seen."""
        return self._phase_at(samples_seen).batch_samples

    def samples_before(self, step: int) -> int:
        """Samples that are seen before a step."""
        phase = [phase for phase in self.phases if phase.first_step <= step][-1]
        return phase.first_sample + (step - phase.first_step) * phase.batch_samples

    def step_of(self, sample: int) -> int:
        """The step that learns from the sample before which so many are seen."""
        phase = self._phase_at(sample)
        return phase.first_step + (sample - phase.first_sample) // phase.batch_samples

    def first_sample(self, tokens: int) -> int:
        """The first sample of the first step that begins at `tokens` or behind."""
        num_samples = -(-tokens // self._sequence_length)
        return self.samples_before(self.step_of(num_samples - 1) + 1) if num_samples else 0

    def spell_sizes(self) -> str:
        """The samples of a step, in words."""
        return f"{self.sizes[0]:,} to {self.sizes[-1]:,}" if len(self.sizes) > 1 else f"{self.sizes[0]:,}"

    def _phase_at(self, samples_seen: int) -> Phase:
        return [phase for phase in self.phases if phase.first_sample <= samples_seen][-1]


plan_steps = lru_cache(maxsize=64)(Steps)
"""The same, computed once: it is asked for at every step."""
