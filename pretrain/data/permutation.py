"""A keyed shuffle of [0, size), computed value by value: nothing is built, loaded or stored, whatever the size.

In: a size and a key. Out: for any positions their images, and back.
"""

import hashlib
from functools import cached_property

import numpy as np
import numpy.typing as npt

# Below this size a permutation drawn whole is cheap, and without the slight bias that a Feistel network has on tiny domains.
WHOLE_PERMUTATION_BELOW = 1 << 16
# Statistics of 2^20 values over N = 7e9 pass from 3 rounds on; 6 leave a margin.
ROUNDS = 6

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Permutation:
    """A bijection of [0, size) that the key chooses.

    An alternating Feistel network (Luby & Rackoff 1988) on the smallest power of two that holds `size`; a value
    that falls outside is sent through again until it falls inside (cycle walking, Black & Rogaway 2002), which
    takes fewer than two trips on average.
    """

    def __init__(self, size: int, key: str) -> None:
        """Raises ValueError for an empty domain."""
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, found {size}")
        self.size = size
        random = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))
        # Raw words, sorted: numpy promises the words for ever (NEP 19), but not what its Generator makes of them.
        self._whole: npt.NDArray[np.uint16] | None = None  # two bytes each: a run keeps one for each small source
        if size < WHOLE_PERMUTATION_BELOW:
            self._whole = np.argsort(random.random_raw(size), kind="stable").astype(np.uint16)
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._round_keys = [np.uint64(word) for word in random.random_raw(ROUNDS)]

    def __call__(self, positions: Numbers) -> Numbers:
        """Images of `positions`, (n,), each in [0, size)."""
        return self._whole[positions].astype(np.int64) if self._whole is not None else self._walk(positions, range(ROUNDS))

    def inverse(self, images: Numbers) -> Numbers:
        """The positions whose images these are, (n,)."""
        return self._walk(images, range(ROUNDS - 1, -1, -1)) if self._whole is None else self._whole_inverse[images]

    @cached_property
    def _whole_inverse(self) -> Numbers:
        assert self._whole is not None, "a network is inverted by its rounds"
        return np.argsort(self._whole)

    def _walk(self, numbers: Numbers, rounds: range) -> Numbers:
        values = self._feistel(numbers.astype(np.uint64), rounds)
        outside = np.nonzero(values >= self.size)[0]
        while outside.size:
            again = self._feistel(values[outside], rounds)
            values[outside] = again
            outside = outside[again >= self.size]
        return values.astype(np.int64)

    def _feistel(self, values: Words, rounds: range) -> Words:
        """Each round changes one half by a function of the other, so the rounds backwards undo it."""
        high, low = values >> self._low_bits, values & self._low_mask
        for number in rounds:
            key = self._round_keys[number]
            if number % 2 == 0:
                high = high ^ (_scramble(low ^ key) & self._high_mask)
            else:
                low = low ^ (_scramble(high ^ key) & self._low_mask)
        return (high << self._low_bits) | low


def _scramble(values: Words) -> Words:
    """Multiply and fold, modulo 2^64 (the multiplication is meant to wrap around)."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0xD6E8FEB86659FD93)
    values ^= values >> np.uint64(32)
    return values
