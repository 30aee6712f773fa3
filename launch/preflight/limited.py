"""Several acts at once, each in a process of its own, none for longer than its limit.

In: functions. Out: what each came to, as JSON has it, or why it did not. One that is stuck (a hung mount, a driver that does not
answer) holds up nobody. No torch here: what is forked has to be small, and best of one thread.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_PR_SET_PDEATHSIG = 1
REAP_SECONDS = 0.5


class Failed(NamedTuple):
    """An act that raised, or did not end in time."""

    why: str


def within(acts: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Do several things at once, each in a process of its own. Returns what each came to, as JSON has it, or `Failed`.

    A process that is stuck in the kernel cannot be killed: it is left behind, and nobody waits for it.
    """
    deadline = time.monotonic() + seconds
    contents = dict.fromkeys(acts, b"")
    with selectors.DefaultSelector() as pipes:
        started: list[int] = []
        for name, act in acts.items():
            pid, pipe = _start(act)
            started.append(pid)
            pipes.register(pipe, selectors.EVENT_READ, name)
        while pipes.get_map() and (ready := pipes.select(max(0.0, deadline - time.monotonic()))):
            for key, _ in ready:
                part = os.read(key.fd, 1 << 16)
                contents[key.data] += part
                if not part:
                    pipes.unregister(key.fd)
                    os.close(key.fd)
        stuck = {key.data for key in pipes.get_map().values()}
        for key in list(pipes.get_map().values()):
            os.close(key.fd)
    _end(started)
    return {name: Failed(f"no answer in {seconds:g} s") if name in stuck else _read(content) for name, content in contents.items()}


def _start(act: Callable[[], Any]) -> tuple[int, int]:
    reading, writing = os.pipe()
    library, parent = ctypes.CDLL(None), os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        with contextlib.suppress(OSError):  # it was quicker
            os.setpgid(pid, pid)
        return pid, reading
    try:
        os.setpgid(0, 0)  # whatever it starts is ended with it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        if sys.platform == "linux":
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        try:
            answer = {"came_to": act()}
        except OSError as error:
            answer = {"why": f"{error.filename or 'it'}: {error.strerror or error}"}
        except Exception as error:
            answer = {"why": f"{type(error).__name__}: {error}"}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
    finally:
        os._exit(0)


def _read(content: bytes) -> Any:
    try:
        answer = json.loads(content)
    except ValueError:
        return Failed("its process died")
    return answer["came_to"] if "came_to" in answer else Failed(answer["why"])


def _end(started: Sequence[int]) -> None:
    for pid in started:
        with contextlib.suppress(OSError):  # all of it is gone
            os.killpg(pid, signal.SIGKILL)
    waiting, until = list(started), time.monotonic() + REAP_SECONDS
    while waiting and time.monotonic() < until:
        waiting = [pid for pid in waiting if not os.waitpid(pid, os.WNOHANG)[0]]
        time.sleep(0.01 if waiting else 0)
