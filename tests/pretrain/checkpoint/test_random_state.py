"""The generators of a process, through JSON: what is drawn afterwards is what would have been drawn."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.checkpoint import random_state
from pretrain.checkpoint.random_state import describe_random_state, restore_random_state


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture(autouse=True)
def _rank_1_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_state.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(random_state.distributed, "get_world_size", lambda: 2)


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


def leave(folder: Path, rank: int = 1) -> None:
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps({"random": describe_random_state()}))


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 623])
def test_continues_exactly(tmp_path: Path, seed: int, drawn_before: int) -> None:
    """Also in the middle of a pair of normal numbers, of which the second one is kept aside."""
    set_seeds(seed)
    for _ in range(drawn_before):
        random.gauss(0, 1), np.random.standard_normal(), torch.rand(())
    leave(tmp_path)
    expected = draw()
    set_seeds(seed + 1)
    assert draw() != expected
    restore_random_state(tmp_path, 2)
    assert draw() == expected


def test_describing_draws_nothing(seed: int) -> None:
    set_seeds(seed)
    expected = draw()
    set_seeds(seed)
    describe_random_state()
    assert draw() == expected


def test_a_rank_takes_its_own(tmp_path: Path, seed: int) -> None:
    set_seeds(seed)
    leave(tmp_path, rank=0)
    set_seeds(seed + 1)
    leave(tmp_path, rank=1)
    expected = draw()
    set_seeds(seed + 2)
    restore_random_state(tmp_path, 2)
    assert draw() == expected


def test_at_another_number_of_ranks_they_are_left(tmp_path: Path, seed: int) -> None:
    set_seeds(seed + 1)
    leave(tmp_path)
    set_seeds(seed)
    expected = draw()
    set_seeds(seed)
    restore_random_state(tmp_path, 3)
    assert draw() == expected
