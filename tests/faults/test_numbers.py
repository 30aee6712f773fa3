"""A seeded sample of the campaign of bad numbers, another one each time, and that its judgement can fail.

`python -m tests.faults.numbers` runs all of it.
"""

import copy
import random
from typing import Any

import pytest

from tests.faults.campaign import run_sample
from tests.faults.numbers import KINDS, choose_training, judge


@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind: str, seed: int) -> None:
    """A fifth: one start of two ranks, ten faults."""
    assert run_sample("numbers", kind, seed, 0.2)["tried"] == 10


def test_what_is_not_as_promised_is_told(seed: int) -> None:
    tried = choose_training(random.Random(seed), in_a_row=False)
    (step,) = tried["steps"]
    applied = [number != step for number in range(1, 9)]
    commit = {"state": {"step": 8, "skipped_steps": 1}, "loss": (2.0).hex()}
    good: dict[str, Any] = {
        "ended": "done", "applied": applied, "changed": [], "not_finite": [], "committed_not_finite": [],
        "rows": [{"skip/step": step}], "commits": {"step-00000008": commit},
    }  # fmt: skip
    assert judge(tried, [good, good]) == []
    for change in (
        {"applied": [True] * 8},
        {"ended": "stopped"},
        {"changed": ["fp32 head"]},
        {"not_finite": ["live head"]},
        {"committed_not_finite": ["step-00000008: weight of head"]},
        {"rows": []},
        {"commits": {"step-00000008": {**commit, "loss": (float("nan")).hex()}}},
        {"commits": {"step-00000008": {**commit, "state": {"step": 8, "skipped_steps": 0}}}},
    ):
        bad = {**copy.deepcopy(good), **change}
        assert judge(tried, [bad, bad]), change
    assert judge(tried, [good, {**good, "applied": [True] * 8}])
