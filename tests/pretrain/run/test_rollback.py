"""Where a run goes back to, what it leaves out, and that this is known to whoever comes next."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.run.guard import Spike
from pretrain.run.rollback import ROLLBACKS_FILE, Rollback, left_out, plan_rollback, read_rollbacks, record_rollback

SPIKE = Spike(50, 7.0, 3.0, 20.0)


def plan(spike: Spike = SPIKE, committed: tuple[int, ...] = (), had: tuple[Rollback, ...] = (), **guard: Any) -> Rollback:
    """Of a run of 100 steps of 4 samples; the samples below 100 were left out before."""
    training = {"global_batch_samples": 4, "micro_batch_samples": 4, "sequence_length": 8, "total_tokens": 3200}
    config = RunConfig.model_validate({"training": training, "guard": guard})
    return plan_rollback(spike, config, lambda seen, count: np.arange(seen, seen + count) + 100, committed, 7, had)


@pytest.mark.parametrize(
    ("width", "committed", "to_step", "samples"),
    [
        (0, (10, 40, 49, 50), 49, (296, 300)),  # the 50th step learns from the samples behind 49 steps
        (1, (10, 40, 48, 49), 48, (292, 304)),
        (1, (10, 40, 49), 40, (292, 304)),  # 49 has learnt from the window already
        (5, (10, 45, 60), 10, (276, 320)),
        (5, (), 0, (276, 320)),
        (200, (10,), 0, (100, 500)),  # never beyond the run
    ],
)
def test_the_newest_commit_before_the_window_and_its_samples(
    width: int, committed: tuple[int, ...], to_step: int, samples: tuple[int, int]
) -> None:
    found = plan(committed=committed, spike_window_steps=width)
    assert (found.to_step, (found.first_sample, found.end_sample)) == (to_step, samples)
    assert (found.step, found.loss, found.z, found.attempt) == (50, 7.0, 20.0, 7)
    assert (f"step {to_step} " if to_step else "its beginning") in str(found)


def test_the_run_ends_when_it_has_had_its_rollbacks() -> None:
    had = (plan(),) * 2
    assert plan(had=had).step == 50
    with pytest.raises(UserError, match=r"step 50 is 7\.0000.*rolled back 2 times \(guard\.rollbacks\).*guard\.on_spike=alarm"):
        plan(had=had, rollbacks=2)


def test_what_was_written_is_read_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    first, second = plan(), plan(committed=(10,))
    record_rollback(tmp_path, asdict(first))
    with (tmp_path / ROLLBACKS_FILE).open("a") as file:
        file.write('{"step": 12, "lo')
    assert read_rollbacks(tmp_path) == [first]
    record_rollback(tmp_path, asdict(second))
    assert read_rollbacks(tmp_path) == [first, second]


@pytest.mark.parametrize(
    ("skipped", "ranges", "expected"),
    [
        ((), (), ()),
        (((3, 5),), (), ((3, 5),)),
        ((), ((8, 12), (2, 4)), ((2, 4), (8, 12))),
        (((3, 5),), ((5, 9),), ((3, 9),)),
        (((3, 9),), ((4, 6),), ((3, 9),)),
        (((1, 2), (3, 9)), ((0, 4), (8, 20)), ((0, 20),)),
        (((3, 9),), ((3, 9),), ((3, 9),)),  # a commit that knows of it already
    ],
)
def test_ranges_ascend_and_lie_apart(skipped: Any, ranges: Any, expected: Any) -> None:
    assert left_out(skipped, [Rollback(1, 1.0, 9.0, 0, first, end, 1) for first, end in ranges]) == expected
