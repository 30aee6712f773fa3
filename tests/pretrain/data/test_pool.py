"""Memory is used again when nobody looks at it any more, and never before."""

import random
import threading

import numpy as np
import pytest
import torch

from pretrain.data.pool import Pool


def test_memory_comes_back_with_the_last_view() -> None:
    pool = Pool()
    array = pool.empty((3, 8), np.int32)
    address = array.ctypes.data
    tensor = torch.from_numpy(array[1:])
    part = tensor[:, 2:]
    del array, tensor
    others = [pool.empty((3, 8), np.int32) for _ in range(3)]
    assert address not in [other.ctypes.data for other in others]
    del part
    assert pool.empty((24,), np.int32).ctypes.data == address, "the size in bytes decides, not the shape"


@pytest.mark.parametrize("dtype", [np.bool_, np.uint16, np.int32, np.int64])
def test_shape_type_and_writing(dtype: type) -> None:
    array = Pool().empty((5, 7), dtype)
    assert array.shape == (5, 7) and array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable
    assert Pool().empty((0, 7), dtype).size == 0


def test_nothing_that_is_held_is_ever_given_again(seed: int) -> None:
    """Two threads make and drop arrays in any order; each finds in its own what it put there."""
    pool, problems = Pool(), list[str]()

    def work(number: int) -> None:
        chosen, held = random.Random(seed + number), dict[int, np.ndarray]()
        for round_ in range(3000):
            value = number * 100_000 + round_
            held[value] = pool.empty((chosen.choice([4, 8]), 4), np.int32)
            held[value][:] = value
            if len(held) > chosen.randint(1, 8):
                dropped = chosen.choice(list(held))
                if not (held.pop(dropped) == dropped).all():
                    problems.append(f"{dropped} was written over")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
