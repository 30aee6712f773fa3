"""Where the ranks of an attempt stand: their Python stacks, taken from outside, and what the system knows of each process.

In: what each rank said last (`heartbeat.py`). Out: a text file for each rank, NCCL's flight records where there are some, and for each
rank a `Place`. No torch here, and nothing that a hung rank could hold up: its stacks are written by a signal handler that needs neither the
interpreter's lock nor the rank's cooperation.
"""

import contextlib
import os
import re
import shutil
import signal
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from pretrain.run.heartbeat import STACKS_SIGNAL, Reading, stacks_file

DUMP_SECONDS = 5.0
"""Most that is waited for stacks, and once more for those of stopped processes and for flight records."""
INNERMOST = 10
"""Frames in which a call of a collective is looked for."""
# Frames that only pass a call on: torch's, DeepSpeed's, Python's own library.
_PASSED_OVER = re.compile(r"(site|dist)-packages/(torch|deepspeed)/|<frozen ")
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
# Where a rank waits for the others.
_COLLECTIVE = re.compile(r"/torch/distributed/|/deepspeed/comm/|pretrain/engine/parallel\.py|pretrain/watch/verdicts\.py")
_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')


class Frame(NamedTuple):
    """A line that a thread is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.file).parts[-3:])}:{self.line} in {self.function}"


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    state: str
    """Of its process, as the system says: `running`, `sleeping`, `stopped`, `disk-sleep` ... or `gone`."""
    lines: tuple[str, ...] = ()
    """The innermost line of its main thread that is not a library's, then those of its other threads."""
    in_collective: bool = False
    """Whether it waits for other ranks."""


def flight_record(folder: Path) -> dict[str, str]:
    """Environment variables that make NCCL keep a record of its last collectives, and write it when it is asked (torch 2.9 to 2.13)."""
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl_"),  # and the rank
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(folder / "nccl_"),  # and the rank and `.pipe`
    }


def take_stacks(folder: Path, readings: Mapping[int, Reading], into: Path) -> dict[int, Place]:
    """Write `into/rank_00000.txt` ... and NCCL's flight records, and say where each rank stands.

    folder: where the ranks write. A stopped process is let go on for the moment that its stacks take: whoever calls this is about to
    end it. A full disk costs the files, not the answer.
    """
    states = {rank: _state_of(reading.pid) for rank, reading in readings.items()}
    known = {rank: _describe_process(reading.pid, states[rank]) for rank, reading in readings.items()}
    before = {rank: stacks_file(folder, rank).stat().st_size for rank in readings}
    for reading in readings.values():
        _send(reading.pid, STACKS_SIGNAL)
    _await_stacks(folder, {rank: before[rank] for rank, state in states.items() if state in ("running", "sleeping")})
    stopped = {rank: before[rank] for rank, state in states.items() if state == "stopped"}
    for rank in stopped:  # the signal waits for it
        _send(readings[rank].pid, signal.SIGCONT)
    _await_stacks(folder, stopped)
    places: dict[int, Place] = {}
    for rank, reading in readings.items():
        main, _, dumped = stacks_file(folder, rank).read_text(errors="replace").partition("\n")
        dumped = dumped[before[rank] - len(main) - 1 :]
        text = dumped or "No stack could be taken.\n"
        with contextlib.suppress(OSError):
            into.mkdir(parents=True, exist_ok=True)
            (into / f"rank_{rank:05d}.txt").write_text(
                f"rank {rank}, phase {reading.phase}, step {reading.step}, {reading.acts} acts; {known[rank]}\n\n{text}"
            )
        places[rank] = locate(states[rank], dumped, main)
    _take_flight_records(folder, list(readings), into)
    return places


def locate(state: str, dumped: str, main_thread: str) -> Place:
    """Where a rank stands, from what the signal handler wrote. main_thread: its number, as written there."""
    threads: dict[str, list[Frame]] = {}
    current: list[Frame] = []
    for line in dumped.splitlines():
        if found := _THREAD.match(line):
            current = threads.setdefault(found[1], [])
        elif found := _FRAME.match(line):
            current.append(Frame(found[1], int(found[2]), found[3]))
    main = threads.pop(main_thread, [])
    stacks = [main, *threads.values()]
    lines = [str(line) for line in map(_own_line, stacks) if line is not None]
    in_collective = any(_COLLECTIVE.search(frame.file) for stack in stacks for frame in stack[:INNERMOST])
    return Place(state, tuple(lines), in_collective)


def _own_line(stack: list[Frame]) -> Frame | None:
    """The innermost line that is not a library's."""
    for frame in stack:
        is_python = frame.file.startswith(_LIBRARY) and "-packages" not in frame.file
        if not is_python and not _PASSED_OVER.search(frame.file):
            return frame
    return None


def _state_of(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


def _describe_process(pid: int, state: str) -> str:
    """What the system says of a process, also of one that cannot answer."""
    waits_in = ""
    with contextlib.suppress(OSError):
        waits_in = Path(f"/proc/{pid}/wchan").read_text()
    return f"process {pid} on {os.uname().nodename}: {state}" + (f", in the kernel's {waits_in}" if waits_in.strip("0") else "")


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _await_stacks(folder: Path, sizes: Mapping[int, int]) -> None:
    """Wait until the stacks of ranks are written: files that have grown beyond their sizes of before and grow no more."""
    deadline, seen = time.monotonic() + DUMP_SECONDS, dict[int, int]()
    while time.monotonic() < deadline:
        now = {rank: stacks_file(folder, rank).stat().st_size for rank in sizes}
        if now == seen and all(now[rank] > size for rank, size in sizes.items()):
            return
        seen = now
        time.sleep(0.1)


def _take_flight_records(folder: Path, ranks: list[int], into: Path) -> None:
    """Ask NCCL of each rank for its record, where it listens; what is there soon is copied."""
    asked = [rank for rank in ranks if _ask_for_record(folder / f"nccl_{rank}.pipe")]
    deadline = time.monotonic() + DUMP_SECONDS
    while time.monotonic() < deadline and not all((folder / f"nccl_{rank}").exists() for rank in asked):
        time.sleep(0.1)
    if asked:
        time.sleep(0.5)  # a record is a few hundred kilobytes
    for rank in ranks:
        with contextlib.suppress(OSError):
            shutil.copyfile(folder / f"nccl_{rank}", into / f"nccl_{rank}")


def _ask_for_record(pipe: Path) -> bool:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # there is no NCCL, or it listens no more
        return False
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(b"1")
    return True
