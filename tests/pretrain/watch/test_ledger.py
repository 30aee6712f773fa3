"""Where a run's time went: by hand-made timelines whose answers are known, and by any at all, which have to add up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.watch.ledger import PARTS, Ledger, read_ledger, reckon

ROOT = Path(__file__).parents[3]
T = 1_700_000_000.0
LAUNCH = "20231114-221320-ab12"
"""Written at T: its name says so."""


def rows(attempt: int, *told: tuple[float, str, int, float]) -> list[dict[str, Any]]:
    """Of (seconds since T, phase, step, waited)."""
    return [{"attempt": attempt, "time": T + at, "phase": phase, "step": step, "waited": waited} for at, phase, step, waited in told]


def ended(attempt: int, began: float, end: float | None, status: int | None = 75, **more: Any) -> dict[str, Any]:
    """A row of `attempts.jsonl`; an end of None: nobody saw it."""
    seen = {"ended": T + end, "status": status} if end is not None else {"end": None, "cause": "vanished without a word"}
    return {"attempt": attempt, "host": "a", "pid": 1, "began": T + began, "cause": "why", **seen, **more}


def check(ledger: Ledger, **parts: float) -> None:
    """What is not named is 0."""
    assert {name: seconds for name, seconds in ledger.parts.items() if seconds} == pytest.approx(parts)
    assert tuple(ledger.parts) == PARTS
    assert sum(ledger.parts.values()) == pytest.approx(ledger.wall_seconds)
    assert ledger.goodput == pytest.approx(parts.get("productive", 0.0) / ledger.wall_seconds)


CALM = (
    *((5.0, "start", 0, 0.0), (10.0, "first_step", 0, 1.0), (14.0, "step", 1, 1.5), (24.0, "step", 11, 2.0)),
    *((34.0, "evaluate", 21, 2.0), (36.0, "score", 21, 2.0), (39.0, "save", 21, 2.0), (40.0, "step", 21, 2.0), (50.0, "save", 31, 2.0)),
    (52.0, "end", 31, 2.0),
)


def test_a_run_to_which_nothing_happened() -> None:
    ledger = reckon(rows(1, *CALM), [ended(1, 0.0, 55.0, 0)])
    parts = {"start_up": 9.0, "compile": 3.5, "data_wait": 2.0, "productive": 29.5, "evaluation": 5.0, "checkpoint": 3.0, "ending": 3.0}
    check(ledger, **parts)
    assert (ledger.began, ledger.ended, ledger.wall_seconds) == (T, T + 55.0, 55.0)
    (one,) = ledger.attempts
    assert (one.attempt, one.began, one.ended, one.first_step, one.last_step, one.cause) == (1, T, T + 55.0, 0, 31, "why")
    assert one.parts == ledger.parts


def test_a_rank_that_is_killed_costs_the_steps_since_the_commit() -> None:
    """Saved at 10, killed behind 16 (the last row says 14); the next attempt begins at 10."""
    first = rows(1, (1.0, "start", 0, 0.0), (2.0, "first_step", 0, 0.0), (3.0, "step", 1, 0.0), (12.0, "save", 10, 0.0),
                 (13.0, "step", 10, 0.0), (17.0, "step", 14, 1.0))  # fmt: skip
    second = rows(2, (22.0, "start", 10, 0.0), (23.0, "first_step", 10, 0.0), (24.0, "step", 11, 0.0), (30.0, "end", 17, 0.0))
    ledger = reckon([*first, *second], [ended(1, 0.0, 19.0), ended(2, 20.0, 31.0, 0)])
    # Of the first attempt: 9 s of steps 2 to 10; 3 of the 4 s (one was waited) of steps 11 to 14; 2 s from the last row to its end.
    check(ledger, productive=9.0 + 6.0, recomputed=3.0 + 2.0, data_wait=1.0, start_up=3.0 + 2.0, compile=2.0, checkpoint=1.0, ending=1.0,
          idle=1.0)  # fmt: skip
    assert [one.parts["recomputed"] for one in ledger.attempts] == [5.0, 0.0]


def test_steps_between_two_rows_are_lost_in_part() -> None:
    """Ten steps in ten seconds, of which the next attempt does four again; and an attempt later goes back behind all of them."""
    first = rows(1, (0.0, "start", 0, 0.0), (0.0, "step", 0, 0.0), (10.0, "step", 10, 0.0))
    second = rows(2, (10.0, "start", 6, 0.0), (10.0, "step", 6, 0.0), (14.0, "end", 10, 0.0))
    attempts = [ended(1, 0.0, 10.0), ended(2, 10.0, 14.0, 0)]
    check(reckon([*first, *second], attempts), productive=6.0 + 4.0, recomputed=4.0)
    third = rows(3, (14.0, "start", 2, 0.0), (14.0, "step", 2, 0.0), (22.0, "end", 10, 0.0))
    rolled_back = [*attempts[:1], ended(2, 10.0, 14.0), ended(3, 14.0, 22.0, 0)]
    check(reckon([*first, *second, *third], rolled_back), productive=2.0 + 8.0, recomputed=8.0 + 4.0)


def test_one_long_step_that_is_lost_counts_as_lost() -> None:
    """Rows every ten seconds, and no step done between them."""
    first = rows(1, (0.0, "start", 3, 0.0), (0.0, "step", 3, 0.0), (10.0, "step", 3, 0.0), (20.0, "step", 3, 0.0))
    second = rows(2, (25.0, "start", 3, 0.0))
    check(reckon([*first, *second], [ended(1, 0.0, 25.0), ended(2, 25.0, 26.0, 1)]), recomputed=25.0, start_up=1.0)


def test_a_launch_waits_in_a_queue_at_first_and_when_it_comes_back() -> None:
    """Written at T, begun after a minute, preempted after ten seconds, back after half an hour; another supervisor has another process."""
    first = rows(1, (62.0, "start", 0, 0.0), (62.0, "step", 0, 0.0), (68.0, "save", 6, 0.0), (69.0, "end", 6, 0.0))
    second = rows(2, (1802.0, "start", 6, 0.0), (1802.0, "step", 6, 0.0), (1810.0, "end", 14, 0.0))
    of_launch = {"launch": LAUNCH}
    attempts = [ended(1, 60.0, 70.0, **of_launch), ended(2, 1800.0, 1811.0, 0, **of_launch, pid=2)]
    ledger = reckon([*first, *second], attempts)
    check(ledger, queue=60.0 + 1730.0, start_up=4.0, productive=14.0, checkpoint=1.0, ending=2.0)
    assert ledger.began == T
    # Stopped by its user, it waited for the user.
    attempts = [ended(1, 60.0, 70.0, **of_launch, stopped=True), ended(2, 1800.0, 1811.0, 0, **of_launch, pid=2)]
    check(reckon([*first, *second], attempts), queue=60.0, idle=1730.0, start_up=4.0, productive=14.0, checkpoint=1.0, ending=2.0)
    # A pause that the supervisor itself makes between attempts is no queue.
    attempts = [ended(1, 60.0, 70.0, **of_launch), ended(2, 1800.0, 1811.0, 0, **of_launch)]
    check(reckon([*first, *second], attempts), queue=60.0, idle=1730.0, start_up=4.0, productive=14.0, checkpoint=1.0, ending=2.0)


def test_a_second_launch_waits_since_it_was_written() -> None:
    """The run rested from 20 to T + 100, where a launch was written, which began at T + 400."""
    later = "20231114-221500-cd34"
    attempts = [ended(1, 0.0, 20.0), ended(2, 400.0, 410.0, 0, launch=later)]
    check(reckon([], attempts), start_up=30.0, idle=80.0, queue=300.0)


def test_a_supervisor_that_vanished_ends_with_its_last_row() -> None:
    first = rows(1, (1.0, "start", 0, 0.0), (2.0, "step", 0, 0.0), (12.0, "step", 10, 0.0))
    second = rows(2, (101.0, "start", 8, 0.0), (101.0, "step", 8, 0.0), (103.0, "end", 10, 0.0))
    ledger = reckon([*first, *second], [ended(1, 0.0, None), ended(2, 100.0, 103.0, 0)])
    check(ledger, start_up=3.0, productive=8.0 + 2.0, recomputed=2.0, idle=88.0)
    assert (ledger.attempts[0].ended, ledger.attempts[0].cause) == (T + 12.0, "vanished without a word")


def test_a_polite_stop_is_no_loss() -> None:
    first = rows(1, (1.0, "start", 0, 0.0), (1.0, "step", 0, 0.0), (5.0, "save", 4, 0.0), (6.0, "step", 4, 0.0), (6.0, "end", 4, 0.0))
    check(reckon(first, [ended(1, 0.0, 9.0, stopped=True)]), start_up=1.0, productive=4.0, checkpoint=1.0, ending=3.0)


def test_clocks_that_disagree_make_nothing_negative() -> None:
    """The second host's clock is 30 s behind."""
    first = rows(1, (1.0, "start", 0, 0.0), (1.0, "step", 0, 0.0), (50.0, "end", 10, 0.0))
    second = rows(2, (21.0, "start", 10, 0.0), (22.0, "step", 10, 0.0), (60.0, "end", 20, 0.0))
    check(reckon([*first, *second], [ended(1, 0.0, 50.0), ended(2, 20.0, 60.0, 0)]), start_up=1.0, productive=49.0 + 10.0)


def test_a_run_folder_is_read_as_it_stands(tmp_path: Path) -> None:
    """Nothing there; one that is running (its lease is fresh); one whose supervisor is gone and whose lease is stale."""
    assert read_ledger(tmp_path) == Ledger(dict.fromkeys(PARTS, 0.0), 0.0, 0.0, 0.0, ())
    assert read_ledger(tmp_path).goodput == 0.0
    told = rows(1, (1.0, "start", 0, 0.0), (2.0, "step", 0, 0.0), (5.0, "end", 3, 0.0))
    told += rows(2, (8.0, "start", 3, 0.0), (9.0, "step", 3, 0.0))
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told) + '{"attempt": 2, "ti')
    (tmp_path / "attempts.jsonl").write_text(json.dumps(ended(1, 0.0, 5.0, stopped=True)) + "\n" + '{"changed": {}, "from_step": 3}\n')
    lease = tmp_path / "lease.json"
    lease.write_text(json.dumps({"attempt": 2, "host": "a", "pid": 2, "began": T + 7.0}))
    os.utime(lease, (T + 15.0, T + 15.0))
    check(read_ledger(tmp_path, T + 19.0), start_up=2.0 + 2.0, productive=3.0 + 10.0, idle=2.0)
    check(read_ledger(tmp_path, T + 900.0), start_up=2.0 + 2.0, productive=3.0, idle=2.0)


def test_attempts_of_before_it_was_written_so_exactly() -> None:
    """Times in whole seconds, with their zone."""
    old = {"attempt": 1, "started": "2023-11-14T22:13:20+00:00", "end": "2023-11-14T22:13:50+00:00", "status": 0, "cause": "done"}
    ledger = reckon([], [old | {"first_step": 0, "last_step": 7}])
    check(ledger, start_up=30.0)
    assert (ledger.began, ledger.attempts[0].first_step, ledger.attempts[0].last_step) == (T, 0, 7)


MOMENTS = st.floats(0, 1000, allow_nan=False)
PHASES = st.sampled_from(["start", "first_step", "step", "evaluate", "score", "save", "end", "another"])
TOLD = st.lists(st.tuples(MOMENTS, PHASES, st.integers(0, 50), MOMENTS), max_size=6)
ENDS = st.tuples(MOMENTS, st.none() | MOMENTS, st.sampled_from([0, 1, 2, 75]), st.booleans(), st.sampled_from([None, "x", LAUNCH]))


@given(attempts=st.lists(st.tuples(TOLD, ENDS), max_size=5))
def test_whatever_is_told_no_part_is_negative_and_they_add_up(attempts: list[tuple[list[Any], Any]]) -> None:
    """Also where times go backwards: rows and attempts in any order."""
    timeline = [row for number, (told, _) in enumerate(attempts) for row in rows(number, *told)]
    ends = [
        ended(number, began, end, status, launch=launch, pid=number % 2, **({"stopped": True} if stopped else {}))
        for number, (_, (began, end, status, stopped, launch)) in enumerate(attempts)
    ]
    ledger = reckon(timeline, ends)
    assert min(ledger.parts.values()) >= 0.0
    assert sum(ledger.parts.values()) == pytest.approx(ledger.wall_seconds, rel=1e-6, abs=1e-6)
    assert ledger.wall_seconds == ledger.ended - ledger.began
    assert 0.0 <= ledger.goodput <= 1.0 + 1e-6
    for one in ledger.attempts:
        assert sum(one.parts.values()) == pytest.approx(one.ended - one.began, rel=1e-6, abs=1e-6)
        assert one.parts["idle"] == one.parts["queue"] == 0.0


def test_it_needs_no_torch() -> None:
    code = "import sys, pretrain.watch.ledger, pretrain.watch.metrics; print(*sorted({'torch', 'pyarrow', 'wandb'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
