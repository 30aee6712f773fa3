"""Where the time of a step goes: parts that add up, by a clock of the test's own."""

import pytest
import torch

from pretrain.watch import step_times
from pretrain.watch.step_times import PARTS, StepClock, TimedStep

CPU = torch.device("cpu")


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(step_times.time, "perf_counter", lambda: self.now)

    def go(self, clock: StepClock, *parts: tuple[str, float]) -> None:
        """Enter each part and stay in it for so long."""
        for part, seconds in parts:
            clock.enter(part)  # type: ignore[arg-type]
            self.now += seconds


def test_every_second_of_a_step_belongs_to_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, clock = Hand(monkeypatch), StepClock(CPU)
    assert clock.means() == {}
    first = (("data_wait", 1.0), ("other", 0.5), ("forward", 2.0), ("backward", 4.0), ("optimizer", 0.25), ("other", 0.25))
    hand.go(clock, *first, ("forward", 2.0), ("backward", 4.0), ("optimizer", 1.0), ("other", 1.0))
    (step,) = clock.end_step(1.0)
    assert step == TimedStep({"data_wait": 1.0, "forward": 4.0, "backward": 8.0, "optimizer": 1.25, "other": 1.75}, 1.0)
    hand.now += 50.0  # an evaluation, between steps
    hand.go(clock, *first)
    (step,) = clock.end_step(3.5)
    assert (sum(step.seconds.values()), step.waited) == (8.0, 2.5), "what was waited between steps is the host's alone"
    means = clock.means()
    assert means == {
        "step_seconds": 12.0,
        "seconds/data_wait": 1.0,
        "seconds/forward": 3.0,
        "seconds/backward": 6.0,
        "seconds/optimizer": 0.75,
        "seconds/other": 1.25,
    }
    assert list(means)[1:] == [f"seconds/{part}" for part in PARTS]
    assert clock.means() == {}, "since the last call nothing has passed"


@pytest.mark.gpu
def test_on_a_gpu_parts_are_what_the_stream_did_and_nobody_waits_for_it() -> None:
    device, clock = torch.device("cuda"), StepClock(torch.device("cuda"))
    square = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    passed: list[TimedStep] = []
    for _ in range(3):
        clock.enter("data_wait")
        clock.enter("forward")
        for _ in range(4):
            square @ square
        clock.enter("backward")
        for _ in range(12):
            square @ square
        clock.enter("other")
        passed += clock.end_step(0.0)
    assert len(passed) < 3, "the host was ahead"
    torch.cuda.synchronize()
    means = clock.means()
    assert 2.0 < means["seconds/backward"] / means["seconds/forward"] < 4.0
    assert sum(value for name, value in means.items() if name != "step_seconds") == pytest.approx(means["step_seconds"])
    passed += clock.end_step(0.0)
    assert len(passed) >= 3
