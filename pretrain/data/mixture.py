"""Which source each sample comes from: a pure function of the weights and the sample's number.

In: the sizes of the sources, the stages of a run. Out: for any sample numbers the source and how many of its samples
came before (its cursor), and back. Nothing is stored: a cursor is computed from the sample number.

Shapes: S sources, n samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from configs.schema import MixtureSection, StageSection, TrainingSection

SLOTS = 1 << 16
"""Weights are rounded to whole slots of a period of this many samples."""

Numbers = npt.NDArray[np.int64]


class Picks(NamedTuple):
    """For each sample, where it comes from."""

    source_n: Numbers
    cursor_n: Numbers
    """Samples of that source before it."""


class Interleaving:
    """Samples of S sources, interleaved as evenly as can be; source s has counts[s] of every period.

    Its k-th sample of a period stands at (k + 1/2) / counts[s] of the period, and all are taken in that order (ties: the
    first source first). So after any m samples source s has given m x share within 1/2 + S x share / 2 of a sample, and
    exactly counts[s] at the end of a period.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """counts: of each source, 0 for one that rests. Raises ValueError when all are 0 or one is negative."""
        if not counts or min(counts) < 0 or not sum(counts):
            raise ValueError(f"an interleaving needs a count of at least one sample, found {list(counts)}")
        common = -(-SLOTS // sum(counts))  # several short periods are one longer: fewer pieces to put together
        self.counts_S = np.array(counts, dtype=np.int64) * common
        self.period = int(self.counts_S.sum())

    def pick(self, first: int, num_samples: int) -> Picks:
        """Source and cursor of samples first .. first + num_samples - 1."""
        parts: list[Picks] = []
        end = first + num_samples
        while first < end:
            period, start = divmod(first, self.period)
            taken = min(end - first, self.period - start)
            source_n, rank_n = self._pick_within(start, taken)
            parts.append(Picks(source_n, period * self.counts_S[source_n] + rank_n))
            first += taken
        return _join(parts)

    def cursors(self, num_samples: int) -> Numbers:
        """Samples that each source gave among the first `num_samples`, (S,)."""
        period, start = divmod(num_samples, self.period)
        low_S, picks = self._candidates(start, 0)
        source_n = picks.source_n[: start - int(low_S.sum())]
        return period * self.counts_S + low_S + np.bincount(source_n, minlength=low_S.size)

    def find(self, source: int, cursor: int) -> int:
        """The number of the sample that is `source`'s sample number `cursor`. Raises ValueError for a source that rests."""
        count = int(self.counts_S[source])
        if not count:
            raise ValueError(f"source {source} gives no samples here")
        period, rank = divmod(cursor, count)
        near = int((rank + 0.5) / count * self.period)
        margin = self.counts_S.size + 2
        start, end = max(0, near - margin), min(self.period, near + margin)
        source_n, rank_n = self._pick_within(start, end - start)
        return period * self.period + start + int(np.nonzero((source_n == source) & (rank_n == rank))[0][0])

    def _pick_within(self, start: int, num_samples: int) -> Picks:
        low_S, picks = self._candidates(start, num_samples)
        skipped = start - int(low_S.sum())
        return Picks(*(column[skipped : skipped + num_samples] for column in picks))

    def _candidates(self, start: int, num_samples: int) -> tuple[Numbers, Picks]:
        """Samples around [start, start + num_samples) of a period, in order, and how many of each source lie before them.

        What is left out before them comes before `start`: no more than `start` samples stand below (start - S) / period.
        """
        num_sources = self.counts_S.size
        low, high = (start - num_sources) / self.period, (start + num_samples + num_sources) / self.period
        low_S = np.clip(np.floor(low * self.counts_S).astype(np.int64) - 1, 0, self.counts_S)
        high_S = np.clip(np.ceil(high * self.counts_S).astype(np.int64) + 1, low_S, self.counts_S)
        source_n = np.repeat(np.arange(num_sources), high_S - low_S)
        rank_n = np.concatenate([np.arange(low, high) for low, high in zip(low_S, high_S, strict=True)])
        # One and the same float for a sample wherever it is computed, so all ranges of samples agree; a source's own places
        # are never equal, those of two sources go by source.
        place_n = (rank_n + 0.5) / self.counts_S[source_n]
        order_n = np.lexsort((source_n, place_n))
        return low_S, Picks(source_n[order_n], rank_n[order_n])


@dataclass(frozen=True)
class Stage:
    """A stage of a run, with everything resolved."""

    first_sample: int
    interleaving: Interleaving
    sequence_length: int
    before_S: Numbers
    """Samples that each source gave in the stages before."""

    def facts(self, names: Sequence[str]) -> list[object]:
        """What decides the samples of the stage, for a hash; sources that rest are left out."""
        # In the order of the sources, which decides between equal places: a list, where a mapping would be sorted by name.
        counts = [[name, int(count)] for name, count in zip(names, self.interleaving.counts_S, strict=True) if count]
        return [self.first_sample, self.sequence_length, counts]


class Mixture:
    """All stages of a run, one behind the other; each source goes on where the stage before left it."""

    def __init__(self, section: MixtureSection, training: TrainingSection, sizes: Mapping[str, int | None]) -> None:
        """sizes: samples of one epoch, by source; None where nobody can know yet. Raises UserError for weights that fit no source,
        or no slot."""
        self.names = list(sizes)
        self.stages: list[Stage] = []
        before_S = np.zeros(len(sizes), dtype=np.int64)
        for number, found in enumerate(section.stages):
            first = training.first_sample(found.from_tokens)
            if self.stages:
                last = self.stages[-1]
                before_S = last.before_S + last.interleaving.cursors(first - last.first_sample)
            interleaving = Interleaving(_count(found, number, sizes))
            self.stages.append(Stage(first, interleaving, found.sequence_length or training.sequence_length, before_S))

    def stage_at(self, sample: int) -> Stage:
        """The stage that a sample belongs to."""
        return [stage for stage in self.stages if stage.first_sample <= sample][-1]

    def pick(self, first: int, num_samples: int) -> Picks:
        """Source and cursor of samples first .. first + num_samples - 1, over stages."""
        parts: list[Picks] = []
        for stage, start, end in self._parts(first, first + num_samples):
            source_n, cursor_n = stage.interleaving.pick(start - stage.first_sample, end - start)
            parts.append(Picks(source_n, stage.before_S[source_n] + cursor_n))
        return _join(parts)

    def cursors(self, num_samples: int) -> dict[str, int]:
        """Samples that each source gave among the first `num_samples` of the run."""
        stage = self.stage_at(num_samples)
        cursor_S = stage.before_S + stage.interleaving.cursors(num_samples - stage.first_sample)
        return dict(zip(self.names, cursor_S.tolist(), strict=True))

    def find(self, source: str, cursor: int) -> int | None:
        """The number of the sample that is the source's sample number `cursor`; None when no stage comes to it."""
        index = self.names.index(source)
        for stage, behind in zip(self.stages, [*self.stages[1:], None], strict=True):
            within = cursor - int(stage.before_S[index])
            if stage.interleaving.counts_S[index] and (behind is None or cursor < behind.before_S[index]):
                return stage.first_sample + stage.interleaving.find(index, within)
        return None

    def _parts(self, first: int, end: int) -> list[tuple[Stage, int, int]]:
        """The stages that [first, end) runs through, with the part in each."""
        ends = [*(stage.first_sample for stage in self.stages[1:]), max(end, first)]
        parts = [(stage, max(first, stage.first_sample), min(end, behind)) for stage, behind in zip(self.stages, ends, strict=True)]
        return [part for part in parts if part[1] < part[2]]


def _join(parts: Sequence[Picks]) -> Picks:
    columns = zip(*parts, strict=True) if parts else ((np.empty(0, np.int64),),) * 2
    return Picks(*(np.concatenate(column) for column in columns))


def _count(stage: StageSection, number: int, sizes: Mapping[str, int | None]) -> list[int]:
    """Samples of each source in one period of a stage."""
    named = stage.weights or stage.epochs
    known = {name: size for name, size in sizes.items() if size is not None}
    if stage.weights is None and len(known) < len(sizes):
        if len(sizes) == 1 and stage.epochs is None:
            return [1]
        raise UserError(
            f"mixture.stages[{number}] goes by the sources' sizes, which nobody knows while data is still arriving "
            f"(data.train_while_building); give weights for {', '.join(sizes)}."
        )
    if named is None:
        return list(known.values())
    key = f"mixture.stages[{number}].{'weights' if stage.weights else 'epochs'}"
    if unknown := sorted(set(named) - set(sizes)):
        raise UserError(f"{key} speaks of {', '.join(unknown)}; the dataset has the sources {', '.join(sizes)}.")
    if empty := [name for name in named if known.get(name) == 0]:
        raise UserError(
            f"{key}.{empty[0]} {named[empty[0]]}: this source has less text than one sample of training.sequence_length tokens; "
            "add text, lower the length, or leave the source out."
        )
    # As decimal numbers, as they were written: neither their order nor their scale decides a rounding.
    written = {name: Fraction(str(number)) for name, number in named.items()}
    if stage.epochs:
        counts = {name: round(often * known[name]) for name, often in written.items()}
        wanted = "is less than half a sample of it; raise it, or leave the source out."
    else:
        total = sum(written.values())
        exact = {name: weight / total * SLOTS for name, weight in written.items()}
        counts = {name: int(slots) for name, slots in exact.items()}
        # The largest remainders get the slots that rounding down has left over; equal ones in the order of the sources.
        by_remainder = sorted(sizes.keys() & exact.keys(), key=lambda name: (counts[name] - exact[name], list(sizes).index(name)))
        for name in by_remainder[: SLOTS - sum(counts.values())]:
            counts[name] += 1
        wanted = f"is less than one of {SLOTS} parts of the mixture; raise it, or leave the source out."
    if nothing := [name for name, count in counts.items() if not count]:
        raise UserError(f"{key}.{nothing[0]} {named[nothing[0]]} {wanted}")
    return [counts.get(name, 0) for name in sizes]
