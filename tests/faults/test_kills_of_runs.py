"""One run of the campaign of runs that are ended, in another way each time; `python -m tests.faults.kills_of_runs` runs all of it."""

import copy
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.faults.campaign import Kind, run_kind
from tests.faults.kills_of_runs import check_kills, check_stop
from tests.faults.trainings import Learnt, check_reference, compare, prepare

STEPS = 80


def test_sample(seed: int) -> None:
    """A run of 80 steps on two ranks, killed once or stopped politely, at a random ZeRO stage; and the undisturbed one beside it."""
    chosen = random.Random(seed)
    check = chosen.choice([check_stop, *(partial(check_kills, stage, 1) for stage in (1, 2, 3))])
    result = run_kind(Kind("sample", 1, 1, prepare, partial(check, STEPS)), seed, [0])
    assert not result.problems, "\n".join(result.problems)
    assert result.tried == result.passed <= 1


def learnt_in_three_steps() -> Learnt:
    lines = {
        rank: [
            {"seen": 8 * step, "numbers": list(range(8 * step + 4 * rank, 8 * step + 4 * rank + 4)), "tokens": f"{rank}{step}"}
            for step in range(3)
        ]
        for rank in (0, 1)
    }
    rows = [{"step": step, "loss": 2.0 / step} for step in (1, 2, 3)]
    return Learnt("step-00000003", "abc", rows, {(1, 0): lines[0], (1, 1): lines[1]})


def test_what_is_not_as_undisturbed_is_told() -> None:
    """Another state, another last bit of a loss, a row twice; a step left out, learnt twice in one attempt, or from other tokens."""
    good = learnt_in_three_steps()
    check_reference(good)
    assert compare(good, good) == []
    again = {**good.ledger, (2, 0): good.ledger[1, 0][1:], (2, 1): good.ledger[1, 1][1:]}
    assert compare(replace(good, ledger=again), good) == [], "a step may be done again in another attempt"
    assert compare(replace(good, state="abd"), good) == ["state differ"]
    assert compare(replace(good, step="step-00000002"), good) == ["step differ"]
    for rows in (good.rows[:2], [*good.rows, good.rows[-1]], [*good.rows[:2], {"step": 3, "loss": 2.0 / 3 + 2**-52}]):
        assert "rows, wanted 3" in compare(replace(good, rows=rows), good)[0]
    for steps, words in (((0, 2), "gap"), ((0, 1, 1, 2), "duplicate"), ((0, 1), "never learnt from")):
        ledger = {**good.ledger, (1, 1): [good.ledger[1, 1][step] for step in steps]}
        assert any(words in one for one in compare(replace(good, ledger=ledger), good)), steps
    other = copy.deepcopy(good.ledger)
    other[1, 0][1]["tokens"] = "others"
    assert compare(replace(good, ledger=other), good) == ["attempt 1 learnt from other tokens on rank 0"]


def test_a_reference_with_a_gap_is_refused() -> None:
    good = learnt_in_three_steps()
    good.ledger[1, 1][2]["numbers"][0] = 0
    with pytest.raises(AssertionError, match="gaps or duplicates"):
        check_reference(good)


def test_losing_is_counted_over_attempts(tmp_path: Path) -> None:
    from tests.faults.trainings import lost_steps

    (tmp_path / "ledger").mkdir()
    for attempt, steps in ((1, range(7)), (2, range(0)), (3, range(5, 9)), (4, range(9, 12))):
        lines = "".join(f'{{"seen": {8 * step}}}\n' for step in steps)
        (tmp_path / "ledger" / f"attempt-{attempt}-rank-0.jsonl").write_text(lines)
        (tmp_path / "ledger" / f"attempt-{attempt}-rank-1.jsonl").write_text(lines.rpartition('{"seen"')[0])
    assert lost_steps(tmp_path) == [2, 0]
