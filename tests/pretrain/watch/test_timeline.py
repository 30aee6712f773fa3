"""What a run did when: rows at every change of phase and at least every ten seconds, and the same heartbeat as before."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.run.heartbeat import Pulse, read_pulse
from pretrain.watch import timeline as module
from pretrain.watch.metrics import read_rows
from pretrain.watch.timeline import ROW_EVERY_SECONDS, TIMELINE_FILE, Timeline


class Hand:
    """Both clocks, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waited = 1000.0, 0.0
        monkeypatch.setattr(module.time, "time", lambda: self.now)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture(name="hand")
def _hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    return Hand(monkeypatch)


def told(folder: Path) -> list[tuple[Any, ...]]:
    return [(row["time"] - 1000, row["phase"], row["step"], row["waited"]) for row in read_rows(folder / TIMELINE_FILE)]


def test_a_row_at_each_change_and_every_ten_seconds(tmp_path: Path, hand: Hand) -> None:
    timeline = Timeline(tmp_path, 3, 5, Pulse.of_rank(tmp_path, 0), lambda: hand.waited, is_writer=True)
    hand.now, hand.waited = 1002.0, 0.5
    timeline.beat("first_step", 5)
    assert (reading := read_pulse(tmp_path, 0)) is not None and (reading.phase, reading.step, reading.acts) == ("start", 5, 1)
    for _ in range(2):  # micro-steps
        timeline.beat()
    hand.now = 1004.0
    timeline.beat("step", 6)
    for step in range(7, 27):
        hand.now += 1.0
        timeline.beat("step", step)
    assert list(timeline.each("evaluate", 26, "ab")) == ["a", "b"]
    hand.now += ROW_EVERY_SECONDS + 1
    timeline.wait()
    timeline.beat("end", 26)
    assert told(tmp_path) == [
        *((0, "start", 5, 0.0), (2, "first_step", 5, 0.5), (4, "step", 6, 0.5), (14, "step", 16, 0.5), (24, "step", 26, 0.5)),
        *((24, "evaluate", 26, 0.5), (35, "evaluate", 26, 0.5), (35, "end", 26, 0.5)),
    ]
    assert {row["attempt"] for row in read_rows(tmp_path / TIMELINE_FILE)} == {3}
    assert (reading := read_pulse(tmp_path, 0)) is not None
    assert (reading.phase, reading.step, reading.acts, reading.waits) == ("end", 26, 1 + 2 + 1 + 20 + 2 + 1, 1)


def test_attempts_stand_one_behind_the_other_also_behind_a_torn_row(tmp_path: Path, hand: Hand) -> None:
    for attempt in (1, 2):
        Timeline(tmp_path, attempt, 0, Pulse.of_rank(tmp_path, 0), lambda: 0.0, is_writer=True)
        with (tmp_path / TIMELINE_FILE).open("a") as file:
            file.write('{"attempt": 1, "tim')
    assert [row["attempt"] for row in read_rows(tmp_path / TIMELINE_FILE)] == [1, 2]


def test_other_ranks_beat_and_write_nothing(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, 1, 0, Pulse.of_rank(tmp_path, 1), lambda: 0.0, is_writer=False)
    timeline.beat("step", 1)
    assert (reading := read_pulse(tmp_path, 1)) is not None and reading.step == 1
    assert not (tmp_path / TIMELINE_FILE).exists()
