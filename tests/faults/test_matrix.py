"""A seeded sample of the campaign of resharding, another one each time, and that the campaign can fail."""

from typing import Any

import pytest

from pretrain.checkpoint.layouts import Judgement
from tests.faults.campaign import run_sample
from tests.faults.matrix import ALL, KINDS, MOVES, POSSIBLE, compare, ledger_problems

TIMEOUT_SECONDS = 300


@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind: str, seed: int) -> None:
    run_sample("matrix", kind, seed, 0.001, TIMEOUT_SECONDS)


def test_every_pair_that_the_matrix_allows_is_a_move() -> None:
    assert len(POSSIBLE) == 12 and len(ALL) == 24
    pairs = [(one, goal) for one, goals in MOVES for goal in goals]
    assert len(set(pairs)) == len(pairs) == 10 * 10 + 2 * 2 + 12


def test_whatever_is_otherwise_is_a_problem() -> None:
    def leg(**changed: Any) -> dict[str, Any]:
        return {"handed_over": [True], "fed": {"1": [[0, 5, "x"]]}, "losses": {"1": 2.0}} | changed

    exact = Judgement("exact", 0.0, "")
    assert compare(leg(), leg(), exact, "", True) == []
    for other in ({"handed_over": [False]}, {"handed_over": []}, {"fed": {"1": [[0, 6, "x"]]}}, {"fed": {}}, {"losses": {"1": 2.1}}):
        assert len(compare(leg(), leg(**other), exact, "", True)) == 1, other
    assert compare(leg(), leg(losses={"1": 2.1}), exact._replace(tolerance=0.1), "", True) == []
    assert len(compare(leg(), leg(losses={"1": float("nan")}), exact._replace(tolerance=0.1), "", True)) == 1
    once = {str(step): [[(step * 12 + row) // 60, (step * 12 + row) % 60, ""] for row in range(12)] for step in range(10)}
    assert ledger_problems("", once) == []
    assert len(ledger_problems("", {**once, "3": once["2"]})) == 1
