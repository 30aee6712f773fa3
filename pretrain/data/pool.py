"""Arrays whose memory is used again as soon as nobody holds them.

In: a shape and a type. Out: an array like numpy's `empty`. The kernel clears fresh memory page by page, and glibc gives large
arrays back to it as soon as they are freed: half of the time of a reader that makes a few hundred kilobytes at a time.
"""

import weakref
from collections import defaultdict
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


class Pool:
    """Keeps the memory of the arrays that it gave, by size; any thread may let one go."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[bytearray]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array with anything in it. Its memory comes back when the last view of it, or tensor on it, is gone."""
        num_bytes = prod(shape) * np.dtype(dtype).itemsize
        free = self._free[num_bytes]
        memory = free.pop() if free else bytearray(num_bytes)
        array = np.frombuffer(memory, dtype)  # all views have this as their base: it does not own its memory
        weakref.finalize(array, free.append, memory).atexit = False
        return array.reshape(shape)
