"""Sample number -> place in the corpus: a pure, stateless function of (sources, mixture, seed).

In: how many samples each source has, the stages of the run, the seed. Out: for any sample number, whether the run is at
its first step or resumes at its millionth, which sample of which source it is. Nothing is built, loaded or stored; any
number of ranks sees the same global order. A checkpoint keeps `samples_seen`, what was skipped on purpose, and a hash.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from configs.schema import MixtureSection, TrainingSection
from pretrain.data.mixture import Mixture, Numbers
from pretrain.data.permutation import Permutation

Skipped = tuple[tuple[int, int], ...]
"""Ranges [first, end) of sample numbers that are left out on purpose, in ascending order, apart from one another."""


class Places(NamedTuple):
    """For each sample, where it stands."""

    source_n: Numbers
    """Index of the source."""
    epoch_n: Numbers
    sample_n: Numbers
    """Number of the sample in its source, in the order of the shards."""


@dataclass(frozen=True)
class SourceSize:
    """What the order must know about a source."""

    name: str
    segments: tuple[int, ...]
    """Samples of each part that is shuffled on its own: one part, or one for each unit of a build that training does not wait for."""
    identities: tuple[str, ...]
    """SHA-256 over what the samples of each segment consist of."""
    arrives: bool = False
    """Whether the run began before the build had ended: what comes behind the last segment must decide nothing."""
    is_complete: bool = True
    """Whether all segments are there."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch; while the source is not complete, those that are there."""
        return sum(self.segments)

    @property
    def has_begun(self) -> bool:
        """Whether its first unit is there."""
        return self.is_complete or bool(self.segments)

    @property
    def announced_samples(self) -> int | None:
        """Samples of one epoch as far as a mixture may know: of what arrives only whether there turned out to be none."""
        return None if self.arrives and not (self.is_complete and self.num_samples == 0) else self.num_samples

    def identity(self, cursor: int) -> str:
        """SHA-256 over what decided its first `cursor` samples."""
        starts = accumulate(self.segments, initial=0)
        passed = [[size, one] for start, size, one in zip(starts, self.segments, self.identities, strict=False) if start < cursor]
        return hashlib.sha256(json.dumps([self.arrives, passed]).encode()).hexdigest()


class DataOrder:
    """The order of all samples of a run."""

    def __init__(
        self, sources: Sequence[SourceSize], mixture: MixtureSection, training: TrainingSection, seed: int, skipped: Skipped = ()
    ) -> None:
        """Raises UserError for a mixture that does not fit the sources."""
        self.sources = tuple(sources)
        self.mixture = Mixture(mixture, training, {one.name: one.announced_samples for one in sources})
        self.skipped = skipped
        self._seed, self._training, self._section = seed, training, mixture
        # A source is in one epoch at a time, at its end in two: with less kept, each step would draw those of small sources anew.
        self._permute = lru_cache(maxsize=2 * max(16, len(sources)))(Permutation)

    def skipping(self, skipped: Skipped) -> "DataOrder":
        """The same order with other ranges left out."""
        return DataOrder(self.sources, self._section, self._training, self._seed, skipped)

    def over(self, sources: Sequence[SourceSize]) -> "DataOrder":
        """The same order when more of its sources has arrived."""
        return DataOrder(sources, self._section, self._training, self._seed, self.skipped)

    def missing(self, seen: int) -> str | None:
        """The source of which something among the first `seen` samples has not arrived yet; None: all of them are there."""
        cursors = self.mixture.cursors(int(self.numbers(seen - 1, 1)[0]) + 1)
        behind = (one.name for one in self.sources if not one.is_complete and cursors[one.name] > one.num_samples)
        return next(behind, None)

    def numbers(self, seen: int, num_samples: int) -> Numbers:
        """The numbers of the next samples when `seen` have been seen: consecutive, but for those skipped on purpose."""
        numbers = np.arange(seen, seen + num_samples, dtype=np.int64)
        for first, end in self.skipped:
            numbers[numbers >= first] += end - first
        return numbers

    def next_token(self, seen: int) -> int:
        """Where in the order, in tokens, the next sample stands when `seen` have been seen: a stage may still begin there."""
        return int(self.numbers(seen, 1)[0]) * self._training.sequence_length

    def seen_before(self, number: int) -> int | None:
        """How many samples are seen before this one; None for a sample that is skipped. The inverse of `numbers`."""
        if any(first <= number < end for first, end in self.skipped):
            return None
        return number - sum(end - first for first, end in self.skipped if end <= number)

    def places(self, numbers: Numbers) -> Places:
        """Where samples stand; `numbers` are ascending. Each sample of a source comes once per epoch."""
        source_n, cursor_n = np.empty_like(numbers), np.empty_like(numbers)
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        for part in np.split(np.arange(numbers.size), cuts):
            if part.size:
                source_n[part], cursor_n[part] = self.mixture.pick(int(numbers[part[0]]), part.size)
        epoch_n, sample_n = np.empty_like(numbers), np.empty_like(numbers)
        for index in np.unique(source_n):
            here = source_n == index
            epoch_n[here], sample_n[here] = self._shuffle(self.sources[index], cursor_n[here])
        return Places(source_n, epoch_n, sample_n)

    def find(self, source: str, sample: int, epoch: int) -> int | None:
        """The number under which a source's sample is seen in an epoch; None when no stage comes to it."""
        (found,) = (one for one in self.sources if one.name == source)
        starts = list(accumulate(found.segments, initial=0))
        segment = int(np.searchsorted(starts, sample, side="right")) - 1
        shuffle = self._permutation(found, epoch, segment)
        position = int(shuffle.inverse(np.array([sample - starts[segment]]))[0])
        return self.mixture.find(source, epoch * found.num_samples + starts[segment] + position)

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source is seen in the first `num_samples` of the run; 0 for one that is arriving, which nobody can know."""
        cursors = self.mixture.cursors(num_samples)
        return {one.name: cursors[one.name] / max(1, one.num_samples) if one.is_complete else 0.0 for one in self.sources}

    def identity(self, seen: int) -> dict[str, str]:
        """SHA-256 of everything that decided the first `seen` samples, by what it is: a run goes on only where all are equal."""
        next_number = int(self.numbers(seen, 1)[0])
        names = [source.name for source in self.sources]
        passed = [stage for stage in self.mixture.stages if stage.first_sample < next_number]
        training = self._training
        # Without a ramp as it was before there were ramps, so that older checkpoints go on.
        ramped = [[phase.first_sample, phase.batch_samples] for phase in training.steps.phases if phase.first_sample < seen]
        batch = ramped if training.batch_ramp else training.global_batch_samples
        facts = [self._seed, training.sequence_length, batch, training.packing, self.skipped]
        facts += [stage.facts(names) for stage in passed]
        cursors = self.mixture.cursors(next_number)
        return {
            "mixture": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
            **{f"source {one.name}": one.identity(cursors[one.name]) for one in self.sources if cursors[one.name]},
        }

    def _shuffle(self, source: SourceSize, cursor_n: Numbers) -> tuple[Numbers, Numbers]:
        epoch_n, position_n = np.divmod(cursor_n, source.num_samples) if source.is_complete else (np.zeros_like(cursor_n), cursor_n)
        starts = np.array([0, *accumulate(source.segments)])
        segment_n = np.searchsorted(starts, position_n, side="right") - 1
        sample_n = np.empty_like(position_n)
        cuts = np.flatnonzero((np.diff(segment_n) != 0) | (np.diff(epoch_n) != 0)) + 1  # cursors ascend
        for first, end in pairwise([0, *cuts.tolist(), cursor_n.size]):
            segment = int(segment_n[first])
            shuffle = self._permutation(source, int(epoch_n[first]), segment)
            sample_n[first:end] = starts[segment] + shuffle(position_n[first:end] - starts[segment])
        return epoch_n, sample_n

    def _permutation(self, source: SourceSize, epoch: int, segment: int) -> Permutation:
        return self._permute(source.segments[segment], f"data order {self._seed}/{source.name}/{epoch}/{segment}")
