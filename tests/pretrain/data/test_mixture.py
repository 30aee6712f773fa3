"""The interleaving of sources: as even as promised, the same however it is asked, and no sample of a source lost over stages."""

import random
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import MixtureSection, StageSection, TrainingSection
from pretrain.data.mixture import SLOTS, Interleaving, Mixture, Picks

MIXED_COUNTS = [[1], [1, 1], [3, 5], [0, 2, 0, 1], [40_000, 20_000, 5_536], [1, 65_535], [10**12, 1, 333_333_333_334, 0, 7], [1] * 40]
COUNTS = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 10**5), st.integers(0, 10**12)), min_size=1, max_size=8).filter(any)


def assert_equal_picks(found: Picks, source_n: np.ndarray, cursor_n: np.ndarray) -> None:
    assert found.source_n.dtype == found.cursor_n.dtype == np.int64
    np.testing.assert_array_equal(found.source_n, source_n)
    np.testing.assert_array_equal(found.cursor_n, cursor_n)


def count_before(source_n: np.ndarray) -> np.ndarray:
    """How often each entry's value stood before it."""
    cursor_n = np.empty_like(source_n)
    for source in np.unique(source_n):
        here = source_n == source
        cursor_n[here] = np.arange(here.sum())
    return cursor_n


# --- one interleaving --------------------------------------------------------------------------------------


@given(COUNTS)
def test_it_is_what_it_says_in_exact_numbers(counts: list[int]) -> None:
    """The k-th sample stands at (k + 1/2) / count, equal places go by source: sorted as fractions."""
    num_samples = 150
    places = [
        (Fraction(2 * k + 1, 2 * count), source, k)
        for source, count in enumerate(counts)
        if count
        for k in range(num_samples * count // sum(counts) + 8)
    ]
    source_n, cursor_n = np.array([(source, k) for _, source, k in sorted(places)[:num_samples]]).T
    assert_equal_picks(Interleaving(counts).pick(0, num_samples), source_n, cursor_n)


@given(COUNTS, st.data())
def test_picks_are_equal_for_every_cut_into_ranges(counts: list[int], data: st.DataObject) -> None:
    """Anywhere, also across the ends of periods; cursors and the inverse agree with them."""
    interleaving = Interleaving(counts)
    near = data.draw(st.sampled_from([0, 1, 2, 1000])) * interleaving.period
    first = max(0, near + data.draw(st.one_of(st.integers(-300, 300), st.integers(0, interleaving.period))))
    num_samples = data.draw(st.integers(0, 400))
    whole = interleaving.pick(first, num_samples)
    assert whole.source_n.size == whole.cursor_n.size == num_samples
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=6))), num_samples]
    parts = [interleaving.pick(first + start, end - start) for start, end in pairwise(cuts)]
    assert_equal_picks(whole, *(np.concatenate(column) for column in zip(*parts, strict=True)))
    before_S, after_S = interleaving.cursors(first), interleaving.cursors(first + num_samples)
    assert (int(before_S.sum()), int(after_S.sum())) == (first, first + num_samples)
    np.testing.assert_array_equal(after_S - before_S, np.bincount(whole.source_n, minlength=len(counts)))
    np.testing.assert_array_equal(whole.cursor_n, before_S[whole.source_n] + count_before(whole.source_n))
    for index in range(0, num_samples, 7):
        assert interleaving.find(int(whole.source_n[index]), int(whole.cursor_n[index])) == first + index


def test_many_rare_sources_that_stand_at_the_same_place_are_cut_right() -> None:
    """In the middle of a period forty samples come at once, and push the frequent source behind its share: the worst that can be."""
    interleaving = Interleaving([1] * 20 + [65_496] + [1] * 20)
    whole = interleaving.pick(0, 65_536)
    middle = np.flatnonzero(whole.source_n != 20)
    assert middle.tolist() == list(range(32_748, 32_788))
    np.testing.assert_array_equal(whole.cursor_n, count_before(whole.source_n))
    for first in range(32_700, 32_850):
        for num_samples in (0, 1, 2, 45):
            within = slice(first, first + num_samples)
            assert_equal_picks(interleaving.pick(first, num_samples), whole.source_n[within], whole.cursor_n[within])
        np.testing.assert_array_equal(interleaving.cursors(first), np.bincount(whole.source_n[:first], minlength=41))
        assert interleaving.find(int(whole.source_n[first]), int(whole.cursor_n[first])) == first


@pytest.mark.parametrize("counts", MIXED_COUNTS, ids=str)
def test_every_source_is_within_its_share_at_every_prefix(counts: list[int]) -> None:
    """Over a million samples, in whole numbers: |given - m x share| <= 1/2 + S x share / 2, S the sources that do not rest."""
    interleaving = Interleaving(counts)
    num_samples = 1_000_000
    source_n = interleaving.pick(0, num_samples).source_n
    prefixes = np.arange(1, num_samples + 1)
    num_sources, period = sum(count > 0 for count in counts), sum(counts)
    for source, count in enumerate(counts):
        off_n = np.cumsum(source_n == source) * (2 * period) - (2 * count) * prefixes  # below 2^63: 2 x 10^6 x 1.4 x 10^12
        assert np.abs(off_n).max() <= period + num_sources * count, f"source {source}"
        if count == 0:
            assert not (source_n == source).any()


@pytest.mark.parametrize("counts", MIXED_COUNTS, ids=str)
def test_a_period_is_exact(counts: list[int]) -> None:
    interleaving = Interleaving(counts)
    assert interleaving.period % sum(counts) == 0
    for number in (1, 2, 3, 10, 1000):
        given = interleaving.cursors(number * interleaving.period).tolist()
        assert given == [number * interleaving.period // sum(counts) * count for count in counts]
    for number in range(1, 4):  # also the given counts' own period, of which ours is a multiple
        assert interleaving.cursors(number * sum(counts)).tolist() == [number * count for count in counts]


def test_one_source_gives_all_in_order(seed: int) -> None:
    first = random.Random(seed).randrange(10**12)
    for count in (1, 7, SLOTS, 10**12):
        assert_equal_picks(Interleaving([count]).pick(first, 1000), np.zeros(1000), np.arange(first, first + 1000))


@pytest.mark.parametrize("counts", MIXED_COUNTS, ids=str)
def test_a_resting_source_changes_nothing_for_the_others(counts: list[int], seed: int) -> None:
    chosen = random.Random(seed)
    with_resting, names = list(counts), list(range(len(counts)))
    for _ in range(3):
        place = chosen.randint(0, len(with_resting))
        with_resting.insert(place, 0)
        names.insert(place, -1)
    first = chosen.randrange(10**6)
    plain, resting = Interleaving(counts).pick(first, 500), Interleaving(with_resting).pick(first, 500)
    assert_equal_picks(plain, np.array(names)[resting.source_n], resting.cursor_n)
    with pytest.raises(ValueError, match="gives no samples here"):
        Interleaving(with_resting).find(names.index(-1), 0)


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [3, -1]], ids=str)
def test_nothing_to_interleave_is_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Interleaving(counts)


def test_no_release_changes_the_picks_of_a_running_training() -> None:
    """If this fails, runs that were started before would read other data after a resume. Do not change the numbers."""
    golden = [
        (
            [3, 5],
            0,
            [1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0],
            [0, 0, 1, 1, 2, 3, 2, 4, 5, 3, 6, 4, 7, 8, 5, 9, 10, 6, 11, 7],
        ),
        (
            [40000, 20000, 5536],
            65530,
            [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 2, 0],
            [39996, 19998, 39997, 39998, 19999, 39999, 40000, 20000, 40001, 40002, 20001, 40003, 5536, 40004],
        ),
        (
            [1, 0, 1, 2],
            1000000003,
            [3, 3, 0, 2, 3, 3, 0, 2, 3, 3, 0, 2],
            [
                500000001,
                500000002,
                250000001,
                250000001,
                500000003,
                500000004,
                250000002,
                250000002,
                500000005,
                500000006,
                250000003,
                250000003,
            ],
        ),
        (
            [1000000000000, 1, 333333333334, 7],
            700000000000,
            [0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0],
            [
                524999999996,
                174999999999,
                524999999997,
                524999999998,
                524999999999,
                175000000000,
                525000000000,
                525000000001,
                525000000002,
                175000000001,
                525000000003,
                525000000004,
            ],
        ),
    ]
    for counts, first, sources, cursors in golden:
        found = Interleaving(counts).pick(first, len(sources))
        assert found.source_n.tolist() == sources
        assert found.cursor_n.tolist() == cursors


# --- weights and epochs to samples of a period -------------------------------------------------------------


def training(total: int = 10**9, length: int = 8, batch: int = 4) -> TrainingSection:
    return TrainingSection(sequence_length=length, global_batch_samples=batch, micro_batch_samples=1, total_tokens=total)


def mixture_of(sizes: dict[str, int], *stages: dict[str, Any], batch: int = 4) -> Mixture:
    return Mixture(MixtureSection(stages=tuple(StageSection(**stage) for stage in stages)), training(batch=batch), sizes)


def counts_of(sizes: dict[str, int], **stage: Any) -> dict[str, int]:
    return dict(zip(sizes, mixture_of(sizes, stage).stages[0].interleaving.counts_S.tolist(), strict=True))


@given(st.lists(st.decimals("0.01", "100", places=2), min_size=1, max_size=12), st.randoms())
@example([Decimal("1.9"), Decimal("0.1"), Decimal("0.8")], random.Random(1))  # as floats these and their tenfold differ by a slot
@example([Decimal(weight) for weight in ("0.8", "1.9", "0.4", "0.4", "0.5")], random.Random(5))  # and these in another order
def test_weights_are_rounded_by_the_largest_remainder(weights: list[Any], chosen: random.Random) -> None:
    """Exactly, in fractions; all slots are given; neither the order in which weights are written nor their scale matters."""
    names = [f"s{number}" for number in range(len(weights))]
    sizes = dict.fromkeys(names, 5)
    shares = [Fraction(weight) * SLOTS / Fraction(sum(weights)) for weight in weights]
    expected = [int(share) for share in shares]
    for index in sorted(range(len(shares)), key=lambda index: (expected[index] - shares[index], index))[: SLOTS - sum(expected)]:
        expected[index] += 1
    assert sum(expected) == SLOTS
    assert all(abs(count - share) < 1 for count, share in zip(expected, shares, strict=True))
    written = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
    shuffled = chosen.sample(names, len(names))
    for given_weights in (
        written,
        {name: written[name] for name in shuffled},
        {name: float(weight * 100) for name, weight in zip(names, weights, strict=True)},
    ):
        assert counts_of(sizes, weights=given_weights) == dict(zip(names, expected, strict=True))


def test_equal_remainders_go_to_the_first_sources_of_the_dataset() -> None:
    sizes = {"c": 9, "a": 9, "b": 9}
    assert counts_of(sizes, weights={"a": 1.0, "b": 1.0, "c": 1.0}) == {"c": 21846, "a": 21845, "b": 21845}


def test_a_source_left_out_rests() -> None:
    sizes = {"a": 5, "b": 7, "c": 0}
    assert counts_of(sizes, weights={"b": 0.3}) == {"a": 0, "b": SLOTS, "c": 0}
    assert mixture_of(sizes, {"weights": {"b": 0.3}}).cursors(1000) == {"a": 0, "b": 1000, "c": 0}


@pytest.mark.parametrize(
    ("sizes", "epochs"),
    [
        ({"a": 100_000, "b": 30_000, "c": 7}, {"a": 1.0, "b": 4.0, "c": 0.5}),
        ({"a": 10, "b": 30}, {"a": 0.25, "b": 2.0}),
        ({"a": 10**12, "b": 10**12 + 1}, {"a": 0.1, "b": 1.15}),
        ({"a": 3, "b": 50}, {"b": 1.0}),
    ],
    ids=str,
)
def test_epochs_are_exact_to_half_a_sample(sizes: dict[str, int], epochs: dict[str, float]) -> None:
    """A period, or a whole number of them, holds each source as often as it says."""
    counts = counts_of(sizes, epochs=epochs)
    expected = {name: round(Fraction(str(epochs[name])) * size) if name in epochs else 0 for name, size in sizes.items()}
    repeats = -(-SLOTS // sum(expected.values()))
    assert counts == {name: repeats * count for name, count in expected.items()}
    assert mixture_of(sizes, {"epochs": epochs}).cursors(sum(expected.values())) == expected


def test_without_weights_every_source_is_seen_in_proportion_to_its_size() -> None:
    sizes = {"a": 70_001, "b": 3, "c": 0, "d": 12}
    assert counts_of(sizes) == counts_of(sizes, epochs={"a": 1.0, "b": 1.0, "d": 1.0}) == sizes
    assert mixture_of(sizes, {}).cursors(70_016 * 5) == {name: 5 * size for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"weights": {"a": 1.0, "b": 7e-6}}, "mixture.stages[1].weights.b 7e-06 is less than one of 65536 parts of the mixture"),
        ({"weights": {"x": 1.0, "a": 1.0, "w": 2.0}}, "mixture.stages[1].weights speaks of w, x; the dataset has the sources a, b, empty."),
        ({"epochs": {"x": 1.0}}, "mixture.stages[1].epochs speaks of x; the dataset has the sources a, b, empty."),
        ({"epochs": {"a": 1.0, "b": 0.05}}, "mixture.stages[1].epochs.b 0.05 is less than half a sample of it"),
        ({"weights": {"a": 1.0, "empty": 1.0}}, "mixture.stages[1].weights.empty 1.0: this source has less text than one sample"),
        ({"epochs": {"empty": 2.0}}, "mixture.stages[1].epochs.empty 2.0: this source has less text than one sample"),
    ],
    ids=str,
)
def test_what_fits_no_source_is_refused_with_its_name(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        mixture_of({"a": 1000, "b": 10, "empty": 0}, {}, {"from_tokens": 64, **stage})
    assert words in str(refusal.value)


def test_the_smallest_weight_that_has_a_slot_is_taken() -> None:
    assert counts_of({"a": 5, "b": 5}, weights={"a": 65_535.0, "b": 1.0}) == {"a": 65_535, "b": 1}


# --- stages ------------------------------------------------------------------------------------------------

SIZES = {"web": 50, "code": 20, "books": 7, "math": 11}
STAGES: tuple[dict[str, Any], ...] = (
    {"weights": {"web": 3.0, "code": 1.0}},
    {"from_tokens": 64 * 32, "weights": {"web": 1.0, "code": 2.0, "books": 0.5}},  # other weights, and a source more
    {"from_tokens": 101 * 32 - 5, "weights": {"web": 5.0, "math": 1.0}},  # code and books are dropped
    {"from_tokens": 150 * 32, "epochs": {"code": 3.0, "books": 1.0, "math": 0.5}},  # code and books are taken up again
    {"from_tokens": 151 * 32},  # the stage before had one step: four samples, all of code
    {"from_tokens": 900 * 32, "weights": {"books": 1.0}},
)


def test_each_source_goes_on_where_the_stage_before_left_it() -> None:
    """Every pick's cursor is the number of that source's samples before it, over six stages and many epochs."""
    mixture = mixture_of(SIZES, *STAGES)
    assert [stage.first_sample for stage in mixture.stages] == [0, 64 * 4, 101 * 4, 150 * 4, 151 * 4, 900 * 4]
    num_samples = 5000
    source_n, cursor_n = mixture.pick(0, num_samples)
    np.testing.assert_array_equal(cursor_n, count_before(source_n))
    names = list(SIZES)
    used = [
        {names[source] for source in source_n[slice(*span)]}
        for span in ((0, 256), (256, 404), (404, 600), (600, 604), (604, 3600), (3600, None))
    ]
    assert used == [{"web", "code"}, {"web", "code", "books"}, {"web", "math"}, {"code"}, set(SIZES), {"books"}]
    for end in (0, 1, 255, 256, 257, 404, 599, 600, 602, 604, 605, 3600, num_samples):
        assert mixture.cursors(end) == dict(zip(names, np.bincount(source_n[:end], minlength=4).tolist(), strict=True))


def test_picks_over_stages_are_equal_for_every_cut_and_found_again(seed: int) -> None:
    chosen = random.Random(seed)
    mixture = mixture_of(SIZES, *STAGES)
    num_samples = 5000
    source_n, cursor_n = mixture.pick(0, num_samples)
    for _ in range(100):
        first = chosen.randint(0, num_samples)
        end = chosen.randint(first, min(num_samples, first + 800))
        assert_equal_picks(mixture.pick(first, end - first), source_n[first:end], cursor_n[first:end])
    names = list(SIZES)
    for number in {*chosen.sample(range(num_samples), 500), *range(250, 260), *range(598, 608), *range(3595, 3605)}:
        assert mixture.find(names[source_n[number]], int(cursor_n[number])) == number
    for name, cursor in mixture.cursors(3600).items():  # from there on only books
        assert mixture.find(name, cursor) == (3600 if name == "books" else None)
        assert mixture.find(name, cursor + 10**6) == (3600 + 10**6 if name == "books" else None)


def test_a_stage_that_goes_on_as_before_still_begins_at_its_place() -> None:
    """A stage's interleaving starts anew, so that what it picks depends on nothing but its own weights and its place."""
    same = {"weights": {"web": 2.0, "code": 1.0}}
    mixture = mixture_of(SIZES, same, {"from_tokens": 32 * 100, **same})
    source_n = mixture.pick(0, 800).source_n
    np.testing.assert_array_equal(source_n[400:], source_n[:400])


def test_the_stage_of_a_sample_is_the_last_that_has_begun() -> None:
    mixture = mixture_of(SIZES, {}, {"from_tokens": 33, "sequence_length": 2}, {"from_tokens": 96, "sequence_length": 4})
    assert [mixture.stage_at(sample).sequence_length for sample in (0, 7, 8, 11, 12, 10**9)] == [8, 8, 2, 2, 4, 4]
