"""A run that meets a spike of its loss goes back, leaves the samples of the window out, and is then as if it had never seen them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_dataset

STEPS, BATCH = 30, 8
RUN = {
    "training__total_tokens": str(STEPS * BATCH * 32),
    "checkpoint__every_steps": "5",
    "checkpoint__keep": "20",
    "checkpoint__self_test": "false",
    "evaluate__every_steps": "null",
    "guard__on_spike": "rollback",
    "guard__spike_window_steps": "3",
}
BAD = [21 * BATCH + 3, 21 * BATCH + 5]
"""Two samples of the 22nd step."""
WINDOW = (18 * BATCH, 25 * BATCH)
"""Samples of the 19th to the 25th."""


@pytest.mark.long
def test_back_behind_the_spike_and_on_without_its_samples(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """The end is that of a run that left these samples out from its beginning, to the bit; what was newer is moved, not deleted."""
    write_tiny_dataset(tmp_path / "data")
    known = {"step": 0, "loss": 0.0, "z": 0.0, "to_step": 0, "first_sample": WINDOW[0], "end_sample": WINDOW[1], "attempt": 0}
    (tmp_path / "runs/never").mkdir(parents=True)
    (tmp_path / "runs/never/rollbacks.jsonl").write_text(json.dumps(known) + "\n")

    cases = {"never": RUN, "rolled": RUN, "through": {**RUN, "guard__on_spike": "alarm"}}
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "bad": BAD, "cases": cases}
    ranks = run_on_ranks("tests.faults.bad_numbers:train_each_past_bad_samples", 2, arguments)
    assert ranks[0] == ranks[1]
    never, found, through = (ranks[0][name] for name in cases)
    assert never["ended"] == through["ended"] == ["done"]
    assert found["ended"] == ["rollback", "done"]
    (rollback,) = found["rollbacks"]
    assert (rollback["step"], rollback["to_step"], rollback["attempt"]) == (22, 15, 1)
    assert (rollback["first_sample"], rollback["end_sample"]) == WINDOW
    assert found["state"]["skipped_samples"] == [list(WINDOW)]
    assert found["state"]["step"] == STEPS
    every = [number for step in found["seen"] for number in step]
    assert every == [number for number in range(STEPS * BATCH + WINDOW[1] - WINDOW[0]) if not WINDOW[0] <= number < WINDOW[1]]
    assert found["hash"] == never["hash"] != through["hash"]
    assert found["aside"] == ["step-00000020-attempt-1"]
    assert found["commits"] == never["commits"] == [f"step-{step:08d}" for step in (30, 25, 20, 15, 10, 5)]
    losses = {row["step"]: row["loss"] for row in found["rows"] if "loss" in row}
    assert losses == {row["step"]: row["loss"] for row in never["rows"] if "loss" in row}
    assert [(row["step"], row["rollback/number"], row["rollback/step"]) for row in found["rows"] if "rollback/step" in row] == [(15, 1, 22)]
    assert [(row["step"], row["spike/step"]) for row in through["rows"] if "spike/z" in row] == [(22, 22)]
    assert not [row for row in found["rows"] if "spike/z" in row], "it is not of this lineage any more"


def test_it_stops_when_it_has_gone_back_often_enough(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Every sample from the 20th step on is bad: two rollbacks, to the beginning where nothing is committed, then the run ends."""
    write_tiny_dataset(tmp_path / "data")
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "name": "bad", "bad": [19 * BATCH, 10**9]}
    settings = {**RUN, "guard__rollbacks": "2", "checkpoint__every_steps": "null", "guard__spike_window_steps": "1"}
    found = run_on_ranks("tests.faults.bad_numbers:train_past_bad_samples", 2, {**arguments, "overrides": settings})[0]
    assert found["ended"][:2] == ["rollback", "rollback"]
    assert "the loss of step 18 is" in found["ended"][2] and "rolled back 2 times (guard.rollbacks)" in found["ended"][2]
    assert [(row["step"], row["to_step"]) for row in found["rollbacks"]] == [(20, 0), (19, 0)]
    assert found["commits"] == []
