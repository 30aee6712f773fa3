"""A polite stop: a signal only sets a flag, and all ranks stop after the same step."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What Slurm (USR1, USR2 or TERM before the time limit), Kubernetes (TERM), a person (Ctrl-C) and a closed terminal (HUP) send."""
LOOK_SECONDS = 1.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class StopRequest:
    """Whether this process was asked to stop. The loop shares it with all ranks and acts on the common answer."""

    def __init__(self, file: Path | None = None) -> None:
        """file: one that asks by being there; it is looked for once a second at most."""
        self._asked, self._file, self._looked = False, file, float("-inf")
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    @property
    def asked(self) -> bool:
        """Once it is true, it stays so."""
        if not self._asked and self._file is not None and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):  # a file system that stumbles asks for nothing
                self._asked = self._file.exists()
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def end_with_parent(parent: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the one that started it, `parent`, ends; at once where it has ended (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:  # it went while we were importing, and the kernel says nothing of what was before it was asked
        os.kill(os.getpid(), how)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ended, so that they can be found and ended (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
