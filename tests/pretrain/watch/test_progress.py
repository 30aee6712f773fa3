"""Lines where there is no terminal: not too many, the last step always, and a time left that is right."""

import sys

import pytest

from configs.steps import Steps
from pretrain.watch import progress
from pretrain.watch.progress import ProgressReport


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed at step 20 of 100, a second per step: time left counts this attempt's steps only."""
    with ProgressReport(100, 20, visible=True) as report:
        for step in range(21, 101):
            clock[0] += 1
            report.show(step, 1.25, 12345.6)
    out, err = capsys.readouterr()
    assert out == "", "what is printed is for pipes; progress goes beside it"
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(30, 101, 10)]
    assert lines[0] == "step 30/100  loss 1.250  12,346 tokens/s  70 s left"
    assert lines[-1].endswith(" 0 s left")


def test_time_left_goes_by_samples(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps of 1 sample, then ten of 3: a second per sample, 40 in all; resumed behind 5."""
    steps = Steps(40, 1, [(10, 1)], 3)
    with ProgressReport(20, 5, visible=True, samples_before=steps.samples_before) as report:
        for step in range(6, 21):
            clock[0] += steps.batch_at(steps.samples_before(step - 1))
            report.show(step, 1.0, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["12/20", "16/20", "20/20"]
    assert [line.rpartition("  ")[2] for line in lines] == ["24 s left", "12 s left", "0 s left"]


def test_a_bar_counts_steps_and_fills_by_samples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    steps = Steps(40, 1, [(10, 1)], 3)
    with ProgressReport(20, 5, visible=True, samples_before=steps.samples_before) as report:
        report.show(12, 1.0, 1.0)
        assert report._bar is not None
        (task,) = report._bar.tasks
        assert (task.completed, task.total, task.finished) == (16, 40, False)
        report.show(20, 1.0, 1.0)
        assert task.finished
    assert "step 20/20" in capsys.readouterr().err


def test_only_rank_0_is_heard(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(1, 0, visible=False) as report:
        report.say("a word")
        clock[0] += 100
        report.show(1, 1.0, 1.0)
    assert capsys.readouterr() == ("", "")
