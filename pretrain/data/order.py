"""Sample number -> place in the token stream: a pure, stateless function of (length of the corpus, seed).

In: how many tokens a split has, the sequence length, the seed. Out: for any sample number, whether the run
is at its first step or resumes at its millionth, the number of the window it reads. Nothing is built, loaded
or stored; any number of ranks sees the same global order.
"""

import hashlib

import numpy as np
import numpy.typing as npt

# Below this many windows a permutation drawn whole is cheap, and without the slight bias that a Feistel network
# has on tiny domains.
WHOLE_PERMUTATION_BELOW = 1 << 16
# Statistics of 2^20 values over N = 7e9 pass from 3 rounds on; 6 leave a margin.
ROUNDS = 6

Numbers = npt.NDArray[np.int64]


class Permutation:
    """A keyed bijection of [0, size), computed value by value.

    An alternating Feistel network (Luby & Rackoff 1988) on the smallest power of two that holds `size`; a value
    that falls outside is sent through again until it falls inside (cycle walking, Black & Rogaway 2002), which
    takes fewer than two trips on average.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        """Raises ValueError for an empty domain."""
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, found {size}")
        self.size = size
        key = int.from_bytes(hashlib.sha256(f"data order {seed} {epoch}".encode()).digest()[:16], "big")
        random = np.random.Philox(key=key)
        # Raw words, sorted: numpy promises the words for ever (NEP 19), but not what its Generator makes of them.
        self._whole = np.argsort(random.random_raw(size), kind="stable") if size < WHOLE_PERMUTATION_BELOW else None
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._round_keys = [np.uint64(word) for word in random.random_raw(ROUNDS)]

    def __call__(self, positions: Numbers) -> Numbers:
        """Images of `positions` (each in [0, size)), same shape."""
        if self._whole is not None:
            return self._whole[positions]
        values = self._feistel(positions.astype(np.uint64))
        outside = np.nonzero(values >= self.size)[0]
        while outside.size:
            again = self._feistel(values[outside])
            values[outside] = again
            outside = outside[again >= self.size]
        return values.astype(np.int64)

    def _feistel(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low_mask
        for number, key in enumerate(self._round_keys):
            if number % 2 == 0:
                high = high ^ (_scramble(low ^ key) & self._high_mask)
            else:
                low = low ^ (_scramble(high ^ key) & self._low_mask)
        return (high << self._low_bits) | low


def _scramble(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Multiply and fold, modulo 2^64 (the multiplication is meant to wrap around)."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = values ^ (values >> np.uint64(32))
        values = values * np.uint64(0xD6E8FEB86659FD93)
        return values ^ (values >> np.uint64(32))


class DataOrder:
    """Sample number -> window number. Window w covers tokens [w x T, w x T + T], T + 1 of them (the last is only a target)."""

    def __init__(self, num_tokens: int, sequence_length: int, seed: int) -> None:
        """Raises ValueError when the corpus is shorter than one sample."""
        self.windows_per_epoch = (num_tokens - 1) // sequence_length
        if self.windows_per_epoch < 1:
            raise ValueError(
                f"the training split has {num_tokens} tokens and one sample needs {sequence_length + 1}; "
                "add text or lower training.sequence_length"
            )
        self.sequence_length = sequence_length
        self.seed = seed
        self._permutations: dict[int, Permutation] = {}

    def windows(self, first_sample: int, num_samples: int) -> Numbers:
        """Window numbers of samples [first_sample, first_sample + num_samples), each window once per epoch."""
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
        epochs, positions = samples // self.windows_per_epoch, samples % self.windows_per_epoch
        windows = np.empty(num_samples, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = self._permutation(int(epoch))(positions[here])
        return windows

    def _permutation(self, epoch: int) -> Permutation:
        if epoch not in self._permutations:
            self._permutations = {epoch: Permutation(self.windows_per_epoch, self.seed, epoch)} | {
                kept: one for kept, one in self._permutations.items() if kept == epoch - 1
            }
        return self._permutations[epoch]
