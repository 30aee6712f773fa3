"""What the guard makes of the numbers of steps: skips in a row, spikes, and when the run must not go on."""

import math
import random
import statistics
from typing import NamedTuple

import pytest

from configs.errors import UserError
from configs.guard_section import GuardSection
from pretrain.run.guard import FEWEST_LOSSES, NUM_LOSSES, SCALE_SEARCH_STEPS, SMALLEST_SPREAD, Guard, Skip, Spike, first_spike, robust_z

NAN = math.nan


class Step(NamedTuple):
    step: int
    loss: float
    applied: bool = True


def steps(losses: list[float], first: int = 1) -> list[Step]:
    """Steps whose update was applied where the loss is finite."""
    return [Step(number, loss, math.isfinite(loss)) for number, loss in enumerate(losses, start=first)]


def calm(count: int, seed: int, level: float = 3.0, noise: float = 0.02) -> list[float]:
    chosen = random.Random(seed)
    return [level + chosen.gauss(0, noise) for _ in range(count)]


def test_skips_are_counted_in_a_row_and_the_fifth_ends_the_run() -> None:
    guard = Guard(GuardSection(), scales_loss=False)
    found = guard.judge(steps([3.0, NAN, NAN, NAN, NAN, 3.0, math.inf]))
    assert [(one.step, one.in_a_row) for one in found if isinstance(one, Skip)] == [(2, 1), (3, 2), (4, 3), (5, 4), (7, 1)]
    assert [str(one.loss) for one in found] == ["nan"] * 4 + ["inf"]
    with pytest.raises(UserError, match=r"step 11 was skipped, the last of 5 in a row: its gradient is not finite.*peak_lr"):
        guard.judge([Step(step, 3.0, applied=False) for step in range(8, 20)])


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_limit_is_the_run_file_s(limit: int) -> None:
    guard = Guard(GuardSection(skips_in_a_row=limit), scales_loss=False)
    assert len(guard.judge(steps([NAN] * (limit - 1)))) == limit - 1
    with pytest.raises(UserError, match=rf"step 9 was skipped, the last of {limit} in a row: its loss is nan"):
        guard.judge(steps([NAN], first=9))


def test_the_search_for_a_loss_scale_is_no_fault_until_there_is_none_left() -> None:
    guard = Guard(GuardSection(), scales_loss=True)
    found = guard.judge([Step(step, 3.0, applied=False) for step in range(1, SCALE_SEARCH_STEPS + 1)])
    assert [(one.in_a_row, one.is_scale_search) for one in found if isinstance(one, Skip)] == [
        (number, True) for number in range(1, SCALE_SEARCH_STEPS + 1)
    ]
    (nan,) = guard.judge(steps([NAN], first=17))
    assert (nan.in_a_row, nan.is_scale_search) == (1, False), "what the search skipped is not counted with it"
    with pytest.raises(UserError, match="step 18 was skipped, the last of 17 in a row.*fp16 is too narrow"):
        guard.judge([Step(18, 3.0, applied=False)])
    guard = Guard(GuardSection(), scales_loss=True)
    with pytest.raises(UserError, match="step 5 was skipped, the last of 5 in a row: its loss is nan"):
        guard.judge(steps([NAN] * 5))


def test_what_was_applied_with_a_loss_that_is_not_finite_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match="the loss of step 4 is nan, and its update was applied"):
        Guard(GuardSection(), scales_loss=False).judge([Step(4, NAN, applied=True)])


def test_a_commit_s_loss_is_the_last_finite_one() -> None:
    guard = Guard(GuardSection(), scales_loss=False)
    guard.judge(steps([NAN]))
    with pytest.raises(UserError, match="no step so far had a loss that is finite"):
        _ = guard.finite_loss
    guard.judge(steps([2.5, NAN]))
    assert guard.finite_loss == 2.5


def test_a_spike_is_told_once_with_its_distance(seed: int) -> None:
    guard = Guard(GuardSection(), scales_loss=False)
    before = calm(200, seed)
    assert guard.judge(steps(before)) == []
    found = guard.judge(steps([3.5, 3.6, 3.4, *calm(50, seed + 1)], first=201))
    (spike,) = found
    assert isinstance(spike, Spike) and spike == first_spike(found)
    middle = statistics.median(before[-NUM_LOSSES:])
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in before[-NUM_LOSSES:])
    assert (spike.step, spike.loss, spike.median) == (201, 3.5, middle)
    assert spike.z == pytest.approx((3.5 - middle) / max(spread, SMALLEST_SPREAD * middle))


def test_a_fall_is_no_spike_nor_is_the_first_of_a_run() -> None:
    guard = Guard(GuardSection(), scales_loss=False)
    assert guard.judge(steps([3.0, 3.0, 9.0, *[3.0] * (FEWEST_LOSSES - 4)])) == []
    assert guard.judge(steps([0.1])) == []
    (spike,) = guard.judge(steps([9.0]))
    assert spike.z == pytest.approx((9.0 - 3.0) / (0.005 * 3.0)), "equal losses have a smallest spread"


def test_ignored_or_far_limits_find_nothing(seed: int) -> None:
    losses = steps([*calm(200, seed), 5.0])
    assert Guard(GuardSection(on_spike="ignore"), scales_loss=False).judge(losses) == []
    assert Guard(GuardSection(spike_z=1000.0), scales_loss=False).judge(losses) == []
    assert len(Guard(GuardSection(spike_z=20.0), scales_loss=False).judge(losses)) == 1


def test_a_resumed_guard_judges_as_one_that_was_never_away(seed: int) -> None:
    losses = [*calm(150, seed), 4.0, *calm(20, seed + 1), 4.0]
    whole = Guard(GuardSection(), scales_loss=False)
    found = whole.judge(steps(losses))
    resumed = Guard(GuardSection(), scales_loss=False, losses=[NAN, *losses[:160][-NUM_LOSSES:]])
    assert resumed.judge(steps(losses[160:], first=161)) == found[1:]
    assert len(found) == 2


@pytest.mark.parametrize("number", range(20))
def test_no_alarm_on_calm_curves(seed: int, number: int) -> None:
    """A power law with noise that shrinks too, as losses have it, and a linear fall of the learning rate at the end."""
    chosen = random.Random(f"{seed} {number}")
    noise = chosen.choice((0.002, 0.01, 0.05))
    curve = [2 + 8 * (step + 1) ** -0.4 for step in range(3000)]
    curve = [loss * (1 + chosen.gauss(0, noise)) - (0.1 * max(0, step - 2400) / 600) for step, loss in enumerate(curve)]
    assert Guard(GuardSection(), scales_loss=False).judge(steps(curve)) == []


def test_an_alarm_within_five_steps_of_noise_for_data(seed: int) -> None:
    """A window of steps whose targets are noise: the loss goes to that of a uniform guess and comes back."""
    chosen = random.Random(seed)
    losses = [*calm(300, seed, noise=0.05), *(3.0 + min(1, n / 4) * 2 + chosen.gauss(0, 0.1) for n in range(1, 30)), *calm(100, seed)]
    found = Guard(GuardSection(), scales_loss=False).judge(steps(losses))
    assert found and 301 <= found[0].step <= 305


@pytest.mark.parametrize(("value", "others", "z"), [(5.0, [1.0, 2.0, 3.0, 4.0, 5.0], 2 / 1.4826), (3.0, [1.0, 2.0, 3.0, 4.0, 5.0], 0.0)])
def test_robust_z(value: float, others: list[float], z: float) -> None:
    assert robust_z(value, others) == (3.0, pytest.approx(z))
