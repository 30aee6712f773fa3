"""The shuffle: a bijection, pure, of the key alone, undone by its inverse, and the same in every release."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import permutation
from pretrain.data.permutation import WHOLE_PERMUTATION_BELOW, Permutation

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 65535, 65536, 65537, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 1_000_003]


def everything(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64)


@pytest.mark.parametrize("size", SIZES)
def test_every_value_exactly_once_and_back(seed: int, size: int) -> None:
    shuffle = Permutation(size, f"{seed}/{size}")
    images = shuffle(everything(size))
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), everything(size))
    positions = shuffle.inverse(images)
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions, everything(size))
    np.testing.assert_array_equal(shuffle(shuffle.inverse(everything(size))), everything(size))


@pytest.mark.parametrize("whole", [True, False], ids=["drawn whole", "as a network"])
def test_every_small_size_is_a_bijection(seed: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the network, which is not used there: all sizes around the powers of two are gone through."""
    if not whole:
        monkeypatch.setattr(permutation, "WHOLE_PERMUTATION_BELOW", 0)
    for size in range(1, 300):
        shuffle = Permutation(size, str(seed))
        images = shuffle(everything(size))
        np.testing.assert_array_equal(np.sort(images), everything(size))
        np.testing.assert_array_equal(shuffle.inverse(images), everything(size))


@given(st.integers(WHOLE_PERMUTATION_BELOW, 10**13), st.text(max_size=20), st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_the_inverse_undoes_it_at_any_size(size: int, key: str, places: list[float]) -> None:
    shuffle = Permutation(size, key)
    positions = np.array([min(size - 1, int(place * size)) for place in places] + [0, size - 1])
    images = shuffle(positions)
    assert ((images >= 0) & (images < size)).all()
    np.testing.assert_array_equal(shuffle.inverse(images), positions)
    np.testing.assert_array_equal(shuffle(shuffle.inverse(positions)), positions)
    assert np.unique(images).size == np.unique(positions).size


@pytest.mark.parametrize("size", [2, 1000, 65535, 65536, 65537, 100_000, 7_000_000_000, 10**12])
def test_the_same_value_alone_in_any_order_and_in_any_batch(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    positions = random.integers(0, size, 500)
    one, again = Permutation(size, f"key {seed}"), Permutation(size, f"key {seed}")
    images = one(positions)
    assert ((images >= 0) & (images < size)).all()
    shuffled = random.permutation(500)
    np.testing.assert_array_equal(again(positions[shuffled]), images[shuffled])
    np.testing.assert_array_equal(np.concatenate([again(part) for part in np.array_split(positions, 13)]), images)
    for position, image in zip(positions[:20], images, strict=False):
        assert int(one(np.array([position]))[0]) == image
    assert one(np.empty(0, dtype=np.int64)).size == one.inverse(np.empty(0, dtype=np.int64)).size == 0
    np.testing.assert_array_equal(one(positions), images, "asking changed the answer")


@pytest.mark.parametrize("size", [5000, 65536, 100_000])
def test_another_key_makes_another_order(seed: int, size: int) -> None:
    """Two independent orders agree at one place on average; at 30 with a chance of 1 in 10^33."""
    base = Permutation(size, f"data order {seed}/web/0/0")(everything(size))
    for other in (f"data order {seed + 1}/web/0/0", f"data order {seed}/wob/0/0", f"data order {seed}/web/1/0", ""):
        assert (Permutation(size, other)(everything(size)) == base).sum() < 30
    assert (base == everything(size)).sum() < 30


def test_every_order_of_three_is_equally_likely(seed: int) -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(3000):
        order = tuple(Permutation(3, f"{seed}/{epoch}")(everything(3)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 60, counts  # 5 degrees of freedom: 1 in 10^11


@pytest.mark.parametrize("size", [7_000_000_000, 10**12])
def test_rough_uniformity_at_thousands_of_millions(seed: int, size: int) -> None:
    """Consecutive positions spread evenly over all samples: buckets, low bits, neighbours."""
    drawn = 1 << 18
    start = int(np.random.default_rng(seed).integers(0, size - drawn))
    images = Permutation(size, str(seed))(np.arange(start, start + drawn))
    assert np.unique(images).size == drawn
    for kind, buckets in {"high": images * 256 // size, "low": images % 256, "differences": np.diff(images) % size * 256 // size}.items():
        counts = np.bincount(buckets, minlength=256)
        expected = buckets.size / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 255 - 8 * 22.6 < chi_square < 255 + 10 * 22.6, (kind, chi_square)  # 255 degrees of freedom, deviation 22.6
    correlation = np.corrcoef(images[:-1], images[1:])[0, 1]
    assert abs(correlation) < 8 / drawn**0.5, correlation


GOLDEN: list[tuple[int, str, list[int]]] = [
    (1_000, "data order 1234/web/0/0", [650, 208, 479, 786, 499, 361]),
    (65_535, "data order 7/code/3/0", [22518, 249, 65043, 18523, 59097, 13268]),
    (65_536, "data order 7/code/3/0", [20584, 54801, 21755, 21380, 63483, 57008]),
    (7_000_000_000, "data order 1234/web/0/0", [5583700264, 3737607070, 3830808623, 1724865317, 4908659720, 5112283004]),
    (1_000_000_000_000, "data order 1234/web/41/12", [134927319001, 943407043988, 255882968875, 887941014613, 672131225182, 873272007323]),
]


@pytest.mark.parametrize(("size", "key", "golden"), GOLDEN)
def test_no_release_changes_the_order_of_a_running_training(size: int, key: str, golden: list[int]) -> None:
    """If this fails, runs that were started before would read other data after a resume. Do not change the numbers."""
    positions = np.array([0, 1, 2, size // 2, size - 2, size - 1])
    assert Permutation(size, key)(positions).tolist() == golden
    assert Permutation(size, key).inverse(np.array(golden)).tolist() == positions.tolist()


def test_an_empty_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one element, found 0"):
        Permutation(0, "key")
