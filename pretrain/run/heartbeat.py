"""What a rank says of itself while it works: its phase, its step, how many acts it has done in it.

In: one call for each act, from the loop. Out: a file of a few bytes in the attempt's folder, mapped into memory, which the supervisor
reads from outside (`watchdog.py`), and beside it this rank's Python stacks, written when a signal asks for them. No torch.

A beat is a write into memory: under a microsecond, no system call, no lock. There is no time in it: who reads counts by its own clock for
how long nothing has changed, so neither another clock nor a beat that was read when half written can mislead it.
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

Phase = Literal["start", "step", "evaluate", "score", "save", "end", "gone"]
PHASES: tuple[Phase, ...] = ("start", "step", "evaluate", "score", "save", "end", "gone")
"""`start`: until the first step is done. `end`: all is saved; what is left is to close and leave. `gone`: there is no such process."""

STACKS_SIGNAL = signal.SIGQUIT
"""Makes a rank write its stacks, also one that holds the interpreter's lock. Stop signals and NCCL use others."""

_LAYOUT = struct.Struct("<QQQQQ")
T = TypeVar("T")


class Reading(NamedTuple):
    """What a rank's file says."""

    pid: int
    phase: Phase
    step: int
    acts: int
    """Done so far; the same on all ranks that have come as far."""
    waits: int
    """Signs of life while nothing was done."""


class Pulse:
    """A rank's heartbeat."""

    def __init__(self, memory: "mmap.mmap | bytearray") -> None:
        self._memory, self._pid, self._phase, self._step, self._acts, self._waits = memory, os.getpid(), 0, 0, 0, 0
        self._write()

    @staticmethod
    def of_rank(folder: Path, rank: int) -> "Pulse":
        """That of a rank of an attempt: heard by the supervisor, which from now on can ask for stacks too."""
        stacks = stacks_file(folder, rank).open("w")  # it stays open: a signal writes to it
        stacks.write(f"{threading.main_thread().ident:#018x}\n")
        stacks.flush()
        faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
        with pulse_file(folder, rank).open("w+b") as file:
            file.truncate(_LAYOUT.size)
            return Pulse(mmap.mmap(file.fileno(), _LAYOUT.size))

    def beat(self, phase: Phase | None = None, step: int | None = None) -> None:
        """An act is done; from here on it is another phase or step, if one is named."""
        if phase is not None:
            self._phase = PHASES.index(phase)
        if step is not None:
            self._step = step
        self._acts += 1
        self._write()

    def wait(self) -> None:
        """Nothing is done, and that is no stall: what is waited for comes from elsewhere."""
        self._waits += 1
        self._write()

    def each(self, phase: Phase, step: int, things: Iterable[T]) -> Iterator[T]:
        """The same things, with a beat before each."""
        for thing in things:
            self.beat(phase, step)
            yield thing

    def _write(self) -> None:
        _LAYOUT.pack_into(self._memory, 0, self._pid, self._phase, self._step, self._acts, self._waits)


UNHEARD = Pulse(bytearray(_LAYOUT.size))
"""Of a training that nobody watches from outside."""


def pulse_file(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies."""
    return folder / f"rank_{rank:05d}.pulse"


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks: first a line with its main thread's number."""
    return folder / f"rank_{rank:05d}.stacks"


def read_pulse(folder: Path, rank: int) -> Reading | None:
    """What a rank says of itself; None before it has said anything."""
    content = b""
    with contextlib.suppress(FileNotFoundError):
        content = pulse_file(folder, rank).read_bytes()
    if len(content) != _LAYOUT.size or not any(content):
        return None
    pid, phase, step, acts, waits = _LAYOUT.unpack(content)
    return Reading(pid, PHASES[phase] if _is_there(pid) else "gone", step, acts, waits)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
