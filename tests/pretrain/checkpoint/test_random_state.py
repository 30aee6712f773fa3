"""The generators of a process, through JSON: what is drawn afterwards is what would have been drawn."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoint.random_state import describe_random_state, restore_random_state


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def draw() -> list[Any]:
    """From every generator, of every kind, more than one block of the Mersenne twister."""
    return [
        [random.random() for _ in range(700)],
        [random.gauss(0, 1) for _ in range(3)],
        np.random.random(700).tolist(),
        np.random.standard_normal(3).tolist(),
        np.random.randint(0, 2**31, 5).tolist(),
        torch.rand(700).tolist(),
        torch.randn(3, dtype=torch.float64).tolist(),
        torch.randperm(50).tolist(),
    ]


def through_json() -> dict[str, Any]:
    return json.loads(json.dumps(describe_random_state()))


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 623])
def test_continues_exactly(seed: int, drawn_before: int) -> None:
    """Also in the middle of a pair of normal numbers, of which the second one is kept aside."""
    set_seeds(seed)
    for _ in range(drawn_before):
        random.gauss(0, 1), np.random.standard_normal(), torch.rand(())
    state = through_json()
    expected = draw()
    set_seeds(seed + 1)
    assert draw() != expected
    restore_random_state(state)
    assert draw() == expected


def test_describing_draws_nothing(seed: int) -> None:
    set_seeds(seed)
    expected = draw()
    set_seeds(seed)
    describe_random_state()
    assert draw() == expected
