"""The order of the data: a bijection, pure, of the seed and the epoch alone, and the same in every release."""

import numpy as np
import pytest

from pretrain.data.order import WHOLE_PERMUTATION_BELOW, DataOrder, Permutation

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 65535, 65536, 65537, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 1_000_003]


def everything(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64)


@pytest.mark.parametrize("size", SIZES)
def test_every_value_exactly_once(seed: int, size: int) -> None:
    images = Permutation(size, seed, seed % 7)(everything(size))
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), everything(size))


def test_every_small_size_is_a_bijection(seed: int) -> None:
    for size in range(1, 200):
        np.testing.assert_array_equal(np.sort(Permutation(size, seed, 0)(everything(size))), everything(size))


@pytest.mark.parametrize("size", [2, 1000, 65535, 65536, 65537, 100_000, 7_000_000_000])
def test_the_same_value_alone_in_any_order_and_in_any_batch(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    positions = random.integers(0, size, 500)
    one, again = Permutation(size, seed, 3), Permutation(size, seed, 3)
    images = one(positions)
    assert ((images >= 0) & (images < size)).all()
    shuffled = random.permutation(500)
    np.testing.assert_array_equal(again(positions[shuffled]), images[shuffled])
    np.testing.assert_array_equal(np.concatenate([again(part) for part in np.array_split(positions, 13)]), images)
    for position, image in zip(positions[:20], images, strict=False):
        assert int(one(np.array([position]))[0]) == image
    assert one(np.empty(0, dtype=np.int64)).size == 0
    np.testing.assert_array_equal(one(positions), images, "asking changed the answer")


@pytest.mark.parametrize("size", [5000, 65536, 100_000])
def test_seed_and_epoch_make_another_order(seed: int, size: int) -> None:
    """Two independent orders agree at one place on average; at 30 with a chance of 1 in 10^33."""
    base = Permutation(size, seed, 0)(everything(size))
    for other in (Permutation(size, seed + 1, 0), Permutation(size, seed, 1), Permutation(size, seed + 2**40, 0)):
        assert (other(everything(size)) == base).sum() < 30
    assert (base == everything(size)).sum() < 30
    # `seed epoch` is not concatenated digit to digit: 1 and 11 is not 11 and 1.
    assert (Permutation(size, 1, 11)(everything(size)) != Permutation(size, 11, 1)(everything(size))).sum() > size // 2


def test_every_order_of_three_is_equally_likely(seed: int) -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(3000):
        order = tuple(Permutation(3, seed, epoch)(everything(3)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 60, counts  # 5 degrees of freedom: 1 in 10^11


def test_rough_uniformity_at_seven_thousand_million(seed: int) -> None:
    """Consecutive positions spread evenly over all windows: buckets, low bits, neighbours."""
    size, drawn = 7_000_000_000, 1 << 18
    start = int(np.random.default_rng(seed).integers(0, size - drawn))
    images = Permutation(size, seed, 0)(np.arange(start, start + drawn))
    assert np.unique(images).size == drawn
    for kind, buckets in {"high": images * 256 // size, "low": images % 256, "differences": np.diff(images) % size * 256 // size}.items():
        counts = np.bincount(buckets, minlength=256)
        expected = buckets.size / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 255 - 8 * 22.6 < chi_square < 255 + 10 * 22.6, (kind, chi_square)  # 255 degrees of freedom, deviation 22.6
    correlation = np.corrcoef(images[:-1], images[1:])[0, 1]
    assert abs(correlation) < 8 / drawn**0.5, correlation


@pytest.mark.parametrize(
    ("size", "seed", "epoch", "golden"),
    [
        (1000, 1234, 0, [336, 693, 184, 259, 540, 288]),
        (65536, 7, 3, [31112, 41107, 59982, 54161, 60686, 10210]),
        (7_000_000_000, 1234, 0, [4916003214, 5019760266, 2913300123, 683565916, 5090375364, 1398076387]),
    ],
)
def test_no_release_changes_the_order_of_a_running_training(size: int, seed: int, epoch: int, golden: list[int]) -> None:
    """If this fails, runs that were started before would read other data after a resume. Do not change the numbers."""
    assert Permutation(size, seed, epoch)(np.array([0, 1, 2, size // 2, size - 2, size - 1])).tolist() == golden


def test_an_empty_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one element"):
        Permutation(0, 1, 0)


@pytest.mark.parametrize("num_windows", [1, 2, 97, 4096, WHOLE_PERMUTATION_BELOW + 5])
def test_every_window_exactly_once_per_epoch(seed: int, num_windows: int) -> None:
    order = DataOrder(num_windows * 16 + 1 + seed % 16, 16, seed)
    assert order.windows_per_epoch == num_windows
    read = order.windows(0, 3 * num_windows)  # one request across two epoch boundaries
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(read[epoch * num_windows : (epoch + 1) * num_windows]), everything(num_windows))
    if num_windows > 50:
        assert (read[:num_windows] != read[num_windows : 2 * num_windows]).any()


@pytest.mark.parametrize("num_windows", [1, 3, 50, WHOLE_PERMUTATION_BELOW + 5])
def test_pure_from_any_start(seed: int, num_windows: int) -> None:
    """Wherever one begins, in whatever portions, also backwards over epochs: the same windows."""
    random = np.random.default_rng(seed)
    order = DataOrder(num_windows * 8 + 1, 8, seed)
    length = 5 * num_windows if num_windows < 1000 else num_windows + 3000
    whole = DataOrder(num_windows * 8 + 1, 8, seed).windows(0, length)
    for _ in range(30):
        start = int(random.integers(0, length))
        count = int(random.integers(0, min(length - start, 500) + 1))
        np.testing.assert_array_equal(order.windows(start, count), whole[start : start + count])
    far = 10**12  # the millionth epoch costs as much as the first
    np.testing.assert_array_equal(order.windows(far, 7)[3:], order.windows(far + 3, 4))


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16])
def test_a_corpus_shorter_than_one_sample_is_refused(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"has {num_tokens} tokens and one sample needs 17"):
        DataOrder(num_tokens, 16, 1)


def test_one_sample_is_enough() -> None:
    assert DataOrder(17, 16, 1).windows(0, 3).tolist() == [0, 0, 0]
    assert DataOrder(32, 16, 1).windows_per_epoch == 1
    assert DataOrder(33, 16, 1).windows_per_epoch == 2
