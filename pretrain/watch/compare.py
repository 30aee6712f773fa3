"""Two runs side by side: by how much their losses differ, and whether that is more than noise; their speed and their memory.

In: the metrics of two runs, as `read_run` gives them, and whether both saw the same samples in the same order. Out: a `Comparison`: all
differences are the second run's value less the first one's, at equal numbers of tokens seen.

Where the loss is at a point of the common range is told by a straight line, fitted to the logged rows of a tenth of that range around it.
Where both runs saw the same samples, the line is fitted to the differences of rows of the same step: what makes a batch hard or easy is in
both and goes away. Otherwise each run has a line of its own, fitted to its own rows, so that nothing has to be interpolated, and the two
variances are added.

Rows that follow each other may be alike. The long-run variance of the noise around a line is therefore the mean square of its projections
onto its slowest waves: cosines, made orthogonal to the line; a value of the line then has a t distribution with as many degrees of freedom
as there are waves, 0.4 n^(2/3) for n rows (orthonormal series: Sun 2013; number of waves: Lazarus, Lewis, Stock, Watson 2018). For noise
that is independent and normal that is exact for any number of rows. Measured for noise of which each row takes half from the row before:
94 % (400 rows in all and more); four fifths: 90 % (tests/pretrain/watch/test_compare.py draws such curves).

An interval tells the noise of these two curves. What another seed would have made of either run is not in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 0.1
"""Of the common range, that a line is fitted to."""
LEAST_ROWS = 8
"""Logged rows in it that a difference is told from."""
POINTS = {"last tenth": 0.95, "at 25 %": 0.25, "at 50 %": 0.5, "at 75 %": 0.75, "at 100 %": 1.0}
"""Where differences are told, as shares of the common range; the middle of the last tenth is its mean."""
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The t distribution's quantile for 95 %, by degrees of freedom from 1."""

Numbers: TypeAlias = NDArray[np.float64]


class Curve(NamedTuple):
    """Logged losses by tokens seen, ascending."""

    tokens: Numbers
    losses: Numbers

    def within(self, first: float, last: float) -> "Curve":
        """The rows from one number of tokens to another, both in it."""
        inside = (self.tokens >= first) & (self.tokens <= last)
        return Curve(self.tokens[inside], self.losses[inside])


class Estimate(NamedTuple):
    """A value of a fitted line."""

    value: float
    variance: float
    freedom: float
    """Degrees of freedom of the variance."""


@dataclass(frozen=True)
class LossDifference:
    """The second run's loss less the first one's, in nats per token, at a point of the common range."""

    where: str
    tokens: float
    difference: float | None
    """None, as the interval: there are too few rows to tell."""
    low: float | None
    high: float | None
    """The ends of the interval that holds the difference with 95 %."""
    num_rows: int
    """That it is told from; of the run that has fewer."""

    @property
    def is_told(self) -> bool:
        """Whether it is more than noise."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class HeldOutDifference:
    """An evaluation that both runs had after the same number of tokens."""

    tokens: int
    first_nats_per_token: float
    second_nats_per_token: float
    difference_nats_per_token: float
    difference_bits_per_byte: float | None


@dataclass(frozen=True)
class Comparison:
    """What two runs differ in, as far as both have come."""

    first_tokens: float
    last_tokens: float
    """The common range; empty where the last is not behind the first."""
    is_paired: bool
    """Whether rows of the same samples were compared, pair by pair."""
    losses: tuple[LossDifference, ...]
    held_out: tuple[HeldOutDifference, ...]
    first_tokens_per_second: float | None
    second_tokens_per_second: float | None
    speed_ratio: float | None
    """The second run's by the first one's, as for memory."""
    first_memory_bytes: float | None
    second_memory_bytes: float | None
    memory_ratio: float | None


def compare_runs(first: "pa.Table", second: "pa.Table", same_samples: bool) -> Comparison:
    """The comparison of two runs' metrics (`read_run`). same_samples: whether equal numbers of tokens are the same samples, in order."""
    curves = [_curve(table) for table in (first, second)]
    begin, end = _common_range(curves)
    speeds = [_median_between(table, "tokens_per_second", begin, end) for table in (first, second)]
    kind = (
        "memory/allocated_bytes"
        if all("memory/allocated_bytes" in table.column_names for table in (first, second))
        else "memory/host_bytes"
    )
    memories = [_highest_between(table, kind, begin, end) for table in (first, second)]
    losses, is_paired = compare_losses(curves[0], curves[1], same_samples)
    return Comparison(
        first_tokens=begin,
        last_tokens=end,
        is_paired=is_paired,
        losses=losses,
        held_out=_compare_held_out(first, second),
        first_tokens_per_second=speeds[0],
        second_tokens_per_second=speeds[1],
        speed_ratio=_ratio(speeds),
        first_memory_bytes=memories[0],
        second_memory_bytes=memories[1],
        memory_ratio=_ratio(memories),
    )


def compare_losses(first: Curve, second: Curve, same_samples: bool) -> tuple[tuple[LossDifference, ...], bool]:
    """The differences at `POINTS` of the common range, and whether they are paired: where half of the rows have a partner of their step."""
    begin, end = _common_range([first, second])
    tokens, of_first, of_second = np.intersect1d(first.tokens, second.tokens, return_indices=True)
    pairs = Curve(tokens, second.losses[of_second] - first.losses[of_first])
    fewest = min(len(curve.within(begin, end).tokens) for curve in (first, second))
    is_paired = same_samples and 0 < fewest <= 2 * len(tokens)
    curves = [pairs] if is_paired else [first, second]
    return tuple(_difference_at(curves, where, share, begin, end) for where, share in POINTS.items()), is_paired


def _difference_at(curves: Sequence[Curve], where: str, share: float, begin: float, end: float) -> LossDifference:
    """curves: of differences, or the first and the second run's."""
    at = begin + share * (end - begin)
    start = min(max(at - WINDOW / 2 * (end - begin), begin), end - WINDOW * (end - begin))
    windows = [curve.within(start, start + WINDOW * (end - begin)) for curve in curves]
    num_rows = min(len(window.tokens) for window in windows)
    if end <= begin or num_rows < LEAST_ROWS:
        return LossDifference(where, at, None, None, None, num_rows)
    value, spread = _difference([estimate(window, at) for window in windows])
    return LossDifference(where, at, value, value - spread, value + spread, num_rows)


def _difference(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """The last value less the first, or the only one; and half of the interval's width (two of them: Welch 1947)."""
    value = estimates[-1].value - (estimates[0].value if len(estimates) > 1 else 0.0)
    variance = sum(one.variance for one in estimates)
    if variance == 0:
        return value, 0.0
    freedom = variance**2 / sum(one.variance**2 / one.freedom for one in estimates)
    return value, _t_quantile(freedom) * math.sqrt(variance)


def estimate(curve: Curve, at: float) -> Estimate:
    """The value at a number of tokens of the line through a curve of at least `LEAST_ROWS` rows, and its variance."""
    num_rows = len(curve.tokens)
    line = np.stack([np.ones(num_rows), (curve.tokens - at) / max(1.0, float(np.ptp(curve.tokens)))], axis=1)
    weights = np.linalg.pinv(line)[0]  # of each row, in the line's value at `at`
    num_waves = max(2, round(0.4 * num_rows ** (2 / 3)))
    place = (np.arange(num_rows) + 0.5) / num_rows
    waves = np.cos(np.pi * np.outer(place, np.arange(2, num_waves + 2)))  # the first one is the line, nearly
    basis, _ = np.linalg.qr(np.concatenate([line, waves], axis=1))
    noise = basis[:, 2:].T @ curve.losses
    return Estimate(float(weights @ curve.losses), float(np.mean(noise**2) * np.sum(weights**2)), num_waves)


def _t_quantile(freedom: float) -> float:
    return T_975[max(1, int(freedom)) - 1] if freedom < len(T_975) + 1 else 1.96 + 2.4 / freedom


def _common_range(curves: Sequence[Curve]) -> tuple[float, float]:
    if any(len(curve.tokens) == 0 for curve in curves):
        return 0.0, 0.0
    return max(float(curve.tokens[0]) for curve in curves), min(float(curve.tokens[-1]) for curve in curves)


def _rows(table: "pa.Table", *names: str) -> list[tuple[Any, ...]]:
    """The values of some columns, of rows that have the first two of them; a column that is not there is empty."""
    columns = [table[name].to_pylist() if name in table.column_names else [None] * table.num_rows for name in names]
    return [row for row in zip(*columns, strict=True) if row[0] is not None and row[1] is not None]


def _curve(table: "pa.Table") -> Curve:
    rows = sorted(_rows(table, "tokens_seen", "loss"))
    return Curve(np.array([tokens for tokens, _ in rows], dtype=float), np.array([loss for _, loss in rows], dtype=float))


def _between(table: "pa.Table", name: str, begin: float, end: float) -> list[float]:
    return [value for tokens, value in _rows(table, "tokens_seen", name) if begin <= tokens <= end]


def _median_between(table: "pa.Table", name: str, begin: float, end: float) -> float | None:
    values = _between(table, name, begin, end)
    return float(np.median(values)) if values else None


def _highest_between(table: "pa.Table", name: str, begin: float, end: float) -> float | None:
    return max(_between(table, name, begin, end), default=None)


def _ratio(values: Sequence[float | None]) -> float | None:
    first, second = values
    return second / first if first and second is not None else None


def _compare_held_out(first: "pa.Table", second: "pa.Table") -> tuple[HeldOutDifference, ...]:
    names = ("tokens_seen", "held_out/nats_per_token", "held_out/bits_per_byte")
    others = {tokens: (nats, bits) for tokens, nats, bits in _rows(second, *names)}
    found: list[HeldOutDifference] = []
    for tokens, nats, bits in _rows(first, *names):
        if tokens in others:
            other, other_bits = others[tokens]
            found.append(HeldOutDifference(tokens, nats, other, other - nats, None if None in (bits, other_bits) else other_bits - bits))
    return tuple(found)
