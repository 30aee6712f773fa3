"""Where the doctors of all nodes meet: words under keys, in torch's TCPStore, kept by node 0 above the ports that the training tries.

In: a `Site`. Out: a `Meeting`, made by node 0 and found by the others, or why there is none. What is told there is JSON.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from launch.preflight.probes import PORTS_TRIED
from launch.preflight.report import Trouble
from launch.preflight.site import Site

ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.1
SAY_SECONDS = 10.0


class Meeting(NamedTuple):
    """Words that all nodes hear: a key, and JSON."""

    store: Any
    """A PrefixStore over node 0's TCPStore."""
    prefix: str
    port: int

    def tell(self, key: str, content: Any) -> None:
        self.store.set(key, json.dumps(content))

    def is_told(self, key: str) -> bool:
        return bool(self.store.check([key]))

    def hear(self, key: str) -> Any:
        """Of a key that was told."""
        return json.loads(self.store.get(key))

    def wait(self, keys: Sequence[str], seconds: float, tell: Callable[[list[str]], object] | None = None) -> list[str]:
        """Wait until all are told. Returns those that were not in time. tell: is told now and then which are awaited."""
        began = time.monotonic()
        missing, said = [key for key in keys if not self.is_told(key)], began
        while missing and time.monotonic() < began + seconds:
            time.sleep(LOOK_SECONDS)
            missing = [key for key in missing if not self.is_told(key)]
            if tell is not None and missing and time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                tell(missing)
        return missing


def ports_of(site: Site) -> list[int]:
    """Where node 0 listens: above the ports of the training, which may still be open from an attempt before."""
    return [0] if site.port is None else [site.port + PORTS_TRIED + more for more in range(PORTS_TRIED)]


def make_meeting(site: Site) -> Meeting | Trouble:
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    prefix = f"doctor/{site.launch}"
    for port in ports_of(site):
        try:
            store = TCPStore("localhost", port, None, True, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False)
        except RuntimeError as error:  # torch's own class, which says EADDRINUSE in its text
            if os.strerror(errno.EADDRINUSE).lower() not in str(error).lower():
                raise
            continue
        meeting = Meeting(PrefixStore(prefix, store), prefix, store.port)
        meeting.tell("open", True)
        return meeting
    advice = "another run is there: stop it, or choose job.rendezvous_port in the cluster file"
    return Trouble(f"ports {ports_of(site)[0]} to {ports_of(site)[-1]} are taken", "one that is free", advice)


def find_meeting(site: Site, say: Callable[[str], object]) -> Meeting | None:
    """None where node 0 was not there in time."""
    began = said = time.monotonic()
    while time.monotonic() < began + site.job.join_seconds:
        for port in ports_of(site):
            if (meeting := _look_for_meeting(site, port)) is not None:
                return meeting
        if time.monotonic() > said + SAY_SECONDS:
            said = time.monotonic()
            say(f"waiting for node 0 at {site.host}:{ports_of(site)[0]}, {said - began:.0f} of {site.job.join_seconds:.0f} s")
        time.sleep(0.5)
    return None


def _look_for_meeting(site: Site, port: int) -> Meeting | None:
    """In a thread: a stranger at that port may never answer."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    found: list[Meeting] = []

    def look() -> None:
        with contextlib.suppress(Exception):  # refused, unknown host, another protocol: all the same
            socket.create_connection((site.host, port), ANSWER_SECONDS).close()  # torch would try for as long as its limit is
            prefix = f"doctor/{site.launch}"
            store = TCPStore(site.host, port, None, False, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False)
            meeting = Meeting(PrefixStore(prefix, store), prefix, port)
            if meeting.is_told("open"):
                found.append(meeting)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(2 * ANSWER_SECONDS)
    return found[0] if found else None
