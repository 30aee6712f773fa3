"""Stacks of real processes: one that waits, one that holds the interpreter's lock, one that is stopped, one that is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.run.heartbeat import read_pulse
from pretrain.run.stacks import Place, flight_record, locate, take_stacks

ROOT = Path(__file__).parents[3]
RANK = """
import ctypes, pathlib, sys, threading
from pretrain.run.heartbeat import Pulse
pulse = Pulse.of_rank(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
def read_for_ever():
    threading.Event().wait(600)
threading.Thread(target=read_for_ever, daemon=True).start()
def hang_here():
    pulse.beat("step", 4)
    {hang}
hang_here()
"""
HANGS = {"waits": "threading.Event().wait(600)", "holds the lock": "ctypes.PyDLL(None).sleep(600)", "computes": "while True: pass"}

Start = Callable[[int, str], subprocess.Popen[bytes]]


@pytest.fixture(name="start")
def _start(tmp_path: Path) -> Iterator[Start]:
    """`start(rank, hang)`: a process that hangs, known to have begun to."""
    started: list[subprocess.Popen[bytes]] = []

    def start(rank: int, hang: str) -> subprocess.Popen[bytes]:
        code = tmp_path / f"rank_{rank}.py"
        code.write_text(RANK.format(hang=hang))
        started.append(subprocess.Popen([sys.executable, code, tmp_path, str(rank)], env={**os.environ, "PYTHONPATH": str(ROOT)}))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and ((said := read_pulse(tmp_path, rank)) is None or said.step != 4):
            time.sleep(0.02)
        time.sleep(0.3)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def take(folder: Path, ranks: int) -> dict[int, Place]:
    readings = {rank: reading for rank in range(ranks) if (reading := read_pulse(folder, rank)) is not None}
    assert len(readings) == ranks
    return take_stacks(folder, readings, folder / "stacks")


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_every_hang_has_a_stack(tmp_path: Path, start: Start, hang: str) -> None:
    process = start(0, hang)
    place = take(tmp_path, 1)[0]
    line = RANK.split("\n").index("    {hang}") + 1
    assert place.lines[0].endswith(f"rank_0.py:{line} in hang_here")
    assert place.lines[1].endswith("in read_for_ever")
    assert not place.in_collective
    text = (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert text.startswith(f"rank 0, phase step, step 4, 1 acts; process {process.pid} on {os.uname().nodename}: ")
    assert "in read_for_ever" in text


def test_a_stopped_process_and_one_that_is_gone(tmp_path: Path, start: Start) -> None:
    """The stopped one goes on for a moment, which shows where it stood; of the other it is said that there is nothing to show."""
    stopped, gone = start(0, HANGS["computes"]), start(1, HANGS["waits"])
    stopped.send_signal(signal.SIGSTOP)
    gone.kill()
    gone.wait()
    time.sleep(0.2)
    places = take(tmp_path, 2)
    assert places[0].state == "stopped"
    assert places[0].lines[0].endswith("in hang_here")
    assert places[1] == Place("gone")
    assert ": stopped" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "gone\n\nNo stack could be taken." in (tmp_path / "stacks" / "rank_00001.txt").read_text()


def test_a_full_disk_costs_the_files_and_not_the_answer(tmp_path: Path, start: Start) -> None:
    start(0, HANGS["waits"])
    (tmp_path / "stacks").touch()  # no folder can be made here
    assert take(tmp_path, 1)[0].lines[0].endswith("in hang_here")


def test_nccl_is_asked_for_its_record_where_it_listens(tmp_path: Path, start: Start) -> None:
    """What NCCL does is played: it reads from a pipe by its rank's number, and then writes a file by it."""
    variables = flight_record(tmp_path)
    pipe, record = (Path(variables[f"TORCH_NCCL_DEBUG_INFO_{kind}_FILE"] + "0") for kind in ("PIPE", "TEMP"))
    pipe = pipe.with_name(f"{pipe.name}.pipe")
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def play() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if os.read(descriptor, 128):
                    break
            except BlockingIOError:
                pass
            time.sleep(0.05)
        record.write_bytes(b"the last collectives")

    player = threading.Thread(target=play)
    player.start()
    start(0, HANGS["waits"])
    start(1, HANGS["waits"])  # nobody listens here
    os.mkfifo(tmp_path / "nccl_1.pipe")
    take(tmp_path, 2)
    player.join(30)
    os.close(descriptor)
    assert (tmp_path / "stacks" / "nccl_0").read_bytes() == b"the last collectives"
    assert not (tmp_path / "stacks" / "nccl_1").exists()


DUMP = """Thread 0x00007f0000000001 (most recent call first):
  File "/p/data/corpus.py", line 9 in read
  File "/usr/lib/python3.11/threading.py", line 982 in run

Current thread 0x00007f0000000002 (most recent call first):
  File "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 5 in all_reduce
  File "/v/lib/python3.11/site-packages/deepspeed/runtime/engine.py", line 6 in backward
  File "/p/pretrain/train.py", line 7 in train
  File "<frozen runpy>", line 88 in _run_code
"""


def test_a_dump_is_read() -> None:
    found = locate("sleeping", DUMP, "0x00007f0000000002")
    assert found == Place("sleeping", ("p/pretrain/train.py:7 in train", "p/data/corpus.py:9 in read"), in_collective=True)
    assert locate("sleeping", "", "0x00007f0000000002") == Place("sleeping")
