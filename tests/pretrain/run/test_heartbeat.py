"""What a rank says of itself, as another process reads it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from pretrain.run.heartbeat import UNHEARD, Pulse, Reading, pulse_file, read_pulse


def test_what_is_said_is_read(tmp_path: Path) -> None:
    assert read_pulse(tmp_path, 3) is None
    pulse = Pulse.of_rank(tmp_path, 3)
    assert read_pulse(tmp_path, 3) == Reading(os.getpid(), "start", 0, 0, 0)
    pulse.beat()
    assert read_pulse(tmp_path, 3) == Reading(os.getpid(), "start", 0, 1, 0)
    pulse.beat("step", 7)
    pulse.wait()
    pulse.wait()
    assert read_pulse(tmp_path, 3) == Reading(os.getpid(), "step", 7, 2, 2)
    seen = [(thing, read_pulse(tmp_path, 3)) for thing in pulse.each("evaluate", 7, "ab")]
    assert seen == [(thing, Reading(os.getpid(), "evaluate", 7, 3 + n, 2)) for n, thing in enumerate("ab")]
    assert read_pulse(tmp_path, 2) is None


def test_a_file_that_was_only_made_says_nothing(tmp_path: Path) -> None:
    pulse_file(tmp_path, 0).touch()
    assert read_pulse(tmp_path, 0) is None
    pulse_file(tmp_path, 0).write_bytes(bytes(40))
    assert read_pulse(tmp_path, 0) is None


def test_of_a_process_that_ended_it_is_said(tmp_path: Path) -> None:
    code = "import sys, pathlib; from pretrain.run.heartbeat import Pulse; Pulse.of_rank(pathlib.Path(sys.argv[1]), 1).beat('save', 9)"
    root = Path(__file__).parents[3]
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    assert rank.wait(60) == 0
    assert read_pulse(tmp_path, 1) == Reading(rank.pid, "gone", 9, 1, 0)


def test_a_beat_costs_microseconds(tmp_path: Path) -> None:
    """Ten of the smallest steps' beats are less than a five-hundredth of a step of 10 ms: 20 us. The best of many counts."""
    pulse, least = Pulse.of_rank(tmp_path, 0), float("inf")
    for _ in range(200):
        began = time.perf_counter()
        for _ in range(100):
            pulse.beat()
        least = min(least, (time.perf_counter() - began) / 100)
    print(f"a beat takes {1e6 * least:.2f} us")
    assert least < 2e-6


def test_a_training_that_nobody_watches_beats_too() -> None:
    UNHEARD.beat("step", 1)
    assert list(UNHEARD.each("evaluate", 1, range(3))) == [0, 1, 2]
