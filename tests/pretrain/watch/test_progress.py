"""Lines where there is no terminal: not too many, the last step always, and a time left that is right."""

import pytest

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


def test_only_rank_0_is_heard(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(1, 0, visible=False) as report:
        report.say("a word")
        clock[0] += 100
        report.show(1, 1.0, 1.0)
    assert capsys.readouterr() == ("", "")
