"""Two runs side by side: intervals that hold the truth as often as they say, on curves whose truth is known."""

import numpy as np
import pyarrow as pa
import pytest

from pretrain.watch.compare import LEAST_ROWS, POINTS, T_975, Curve, compare_losses, compare_runs, estimate

DRAWS = 300
"""A share of 95 % of them has a deviation of 1.3 %; the mean of the five places, of about half of that."""
GAP = 100.0
"""Tokens between two rows."""


def trend(tokens: np.ndarray) -> np.ndarray:
    return 2 + 6 * (tokens / 1000 + 1) ** -0.4


def noise(draw: np.random.Generator, num_rows: int, deviation: float, memory: float) -> np.ndarray:
    """Of `DRAWS` curves, [DRAWS, num_rows]: normal, each row with a share `memory` of the row before."""
    rows = draw.normal(size=(num_rows, DRAWS)) * deviation
    rows[1:] *= np.sqrt(1 - memory**2)
    for row in range(1, num_rows):
        rows[row] += memory * rows[row - 1]
    return rows.T


@pytest.mark.parametrize(("num_rows", "memory"), [(400, 0.0), (400, 0.5)])
def test_an_interval_holds_the_truth(num_rows: int, memory: float, seed: int) -> None:
    """Of curves of their own noise, logged at different tokens, the second 0.02 above the first."""
    draw = np.random.default_rng(seed)
    held = dict.fromkeys(POINTS, 0)
    one, two = np.arange(1, num_rows + 1) * GAP, np.arange(1, round(1.3 * num_rows)) * 0.9 * GAP
    for of_one, of_two in zip(noise(draw, len(one), 0.05, memory), noise(draw, len(two), 0.08, memory), strict=True):
        first, second = Curve(one, trend(one) + of_one), Curve(two, trend(two) + 0.02 + of_two)
        found, is_paired = compare_losses(first, second, same_samples=False)
        assert not is_paired
        for difference in found:
            assert difference.low is not None and difference.high is not None
            held[difference.where] += difference.low <= 0.02 <= difference.high
    shares = {where: count / DRAWS for where, count in held.items()}
    assert min(shares.values()) >= 0.86 and 0.90 <= np.mean([*shares.values()]) <= 0.99, shares


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_pairs_hold_the_truth_in_a_far_smaller_interval(memory: float, seed: int) -> None:
    """What a batch's difficulty adds is the same in both."""
    draw = np.random.default_rng(seed)
    tokens = np.arange(1, 401) * GAP
    held, widths = dict.fromkeys(POINTS, 0), []
    batches, of_one, of_two = (noise(draw, 400, *kind) for kind in ((0.1, 0.0), (0.005, memory), (0.005, memory)))
    for number in range(DRAWS):
        both = trend(tokens) + batches[number]
        first, second = Curve(tokens, both + of_one[number]), Curve(tokens, both + 0.002 * tokens / tokens[-1] + of_two[number])
        found, is_paired = compare_losses(first, second, same_samples=True)
        assert is_paired
        for difference in found:
            assert difference.low is not None and difference.high is not None
            held[difference.where] += difference.low <= 0.002 * difference.tokens / tokens[-1] <= difference.high
        if number < 20:
            alone, _ = compare_losses(first, second, same_samples=False)
            widths.append([one.high - one.low for one in (found[0], alone[0]) if one.high is not None and one.low is not None])
    shares = {where: count / DRAWS for where, count in held.items()}
    assert min(shares.values()) >= 0.86 and 0.90 <= np.mean([*shares.values()]) <= 0.99, shares
    paired, unpaired = np.mean(widths, axis=0)
    assert paired < unpaired / 5


def test_half_a_range_of_another_step_is_no_pair(seed: int) -> None:
    """Rows at other tokens saw other samples: they are not interpolated into pairs."""
    draw = np.random.default_rng(seed)
    tokens = np.arange(1, 301) * GAP
    first, second = (Curve(some, trend(some) + draw.normal(size=len(some))) for some in (tokens, tokens + GAP / 2))
    assert compare_losses(first, second, same_samples=True)[1] is False
    assert compare_losses(first, Curve(tokens[::2], first.losses[::2]), same_samples=True)[1] is True


@pytest.mark.parametrize("same_samples", [True, False])
def test_a_run_and_itself(same_samples: bool, seed: int) -> None:
    tokens = np.arange(1, 201) * GAP
    curve = Curve(tokens, trend(tokens) + np.random.default_rng(seed).normal(size=200))
    found, is_paired = compare_losses(curve, curve, same_samples)
    assert is_paired == same_samples
    assert all(one.difference == 0.0 and not one.is_told for one in found)
    if same_samples:
        assert all((one.low, one.high) == (0.0, 0.0) for one in found)


def test_a_line_is_found_exactly_where_there_is_no_noise() -> None:
    tokens = np.array([3.0, 4.0, 7.0, 8.0, 11.0, 14.0, 15.0, 19.0]) * 1e9
    found = estimate(Curve(tokens, 5 - tokens / 1e10), at=8.5e9)
    assert found.value == pytest.approx(4.15, abs=1e-12) and found.variance < 1e-25
    assert found.freedom == 2


def test_a_difference_that_is_there_is_told(seed: int) -> None:
    tokens = np.arange(1, 1001) * GAP
    draw = np.random.default_rng(seed)
    first, second = (Curve(tokens, trend(tokens) + offset + 0.01 * draw.normal(size=1000)) for offset in (0.0, -0.05))
    found, _ = compare_losses(first, second, same_samples=False)
    assert all(one.is_told and one.difference is not None and one.difference < 0 for one in found)


def test_too_short_to_tell() -> None:
    for num_rows in (0, 1, 10, 60):
        tokens = np.arange(1, num_rows + 1) * GAP
        found, _ = compare_losses(Curve(tokens, tokens), Curve(tokens, tokens), same_samples=True)
        assert [one.difference for one in found] == [None] * len(POINTS) and found[0].num_rows < LEAST_ROWS
    early, late = (Curve(start + np.arange(100) * GAP, np.ones(100)) for start in (0.0, 1e6))
    assert compare_losses(early, late, same_samples=False)[0][0].difference is None, "nothing is common"


def test_the_table_of_quantiles() -> None:
    """Their definition: 2.5 % of the t distribution lie above (integrated; scipy is not installed everywhere)."""
    for freedom, quantile in enumerate(T_975, start=1):
        # The share above x, by u = arctan(x / sqrt(v)): an integral of cos^(v-1), which is smooth.
        angles = np.linspace(np.arctan(quantile / np.sqrt(freedom)), np.pi / 2, 20001)
        whole = np.linspace(-np.pi / 2, np.pi / 2, 40001)
        above, everything = (np.trapezoid(np.cos(grid).clip(0) ** (freedom - 1), grid) for grid in (angles, whole))
        assert above / everything == pytest.approx(0.025, abs=5e-5)


def table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(
        rows, schema=pa.schema([(name, pa.float64()) for name in dict.fromkeys(key for row in rows for key in row)])
    )


def test_speed_memory_and_held_out_loss_over_the_common_range() -> None:
    first = [{"tokens_seen": 100.0 * n, "loss": 3.0, "tokens_per_second": 50.0, "memory/host_bytes": 1e9} for n in range(1, 101)]
    second = [
        {
            "tokens_seen": 100.0 * n,
            "loss": 3.5,
            "tokens_per_second": 75.0 if n <= 100 else 1.0,
            "memory/host_bytes": 2e9 if n <= 100 else 9e9,
        }
        for n in range(11, 201)
    ]
    for rows, nats in ((first, 2.0), (second, 2.25)):
        rows[-1] |= {"held_out/nats_per_token": 9.0}
        at_5000 = next(row for row in rows if row["tokens_seen"] == 5000)
        at_5000 |= {"held_out/nats_per_token": nats, "held_out/bits_per_byte": nats / 4}
    found = compare_runs(table(first), table(second), same_samples=True)
    assert (found.first_tokens, found.last_tokens, found.is_paired) == (1100, 10_000, True)
    assert (found.speed_ratio, found.memory_ratio) == (1.5, 2.0)
    assert [one.difference for one in found.losses] == pytest.approx([0.5] * len(POINTS))
    (one,) = found.held_out
    assert (one.tokens, one.difference_nats_per_token, one.difference_bits_per_byte) == (5000, 0.25, 0.0625)


def test_runs_without_what_is_compared() -> None:
    empty = pa.table({"step": pa.array([], pa.int64())})
    found = compare_runs(empty, table([{"tokens_seen": 1.0, "loss": 1.0}]), same_samples=True)
    assert (found.speed_ratio, found.memory_ratio, found.held_out) == (None, None, ())
    assert [one.difference for one in found.losses] == [None] * len(POINTS)
