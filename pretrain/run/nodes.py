"""The supervisors of a run's nodes: what each says of itself, and what the first one orders.

In: how many nodes there are, which one this is, where the first one is to be found. Out: a `Board` on which every node posts what it does
and the first one posts what all are to do next; on both sides, for how long the other one has been silent. What is made of it stands in
`team.py`.

The board is torch's TCPStore, kept by the first node's supervisor. Only a thread talks to it: a network that is cut holds up that
thread, and whoever asks sees the silence grow. There is no time in what is posted, only a counter: clocks of two nodes may differ by hours.
"""

import contextlib
import errno
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

from configs.errors import UserError

LOST_SECONDS = 20.0
"""A node that said nothing for so long is lost. Longer than a switch takes to find another path, and than a loaded machine pauses."""
EXCHANGE_SECONDS = 0.3
PORTS_TRIED = 5
"""Where the first node's port is taken, it takes one of those behind it; the others ask each, until one is this launch's."""
ANSWER_SECONDS = 5.0
_NOTHING = "{}"


class NodePlace(NamedTuple):
    """Where this supervisor stands among those of a run."""

    nodes: int
    node: int
    """0 is the first: it decides."""
    host: str
    """Of the first node, as the others reach it."""
    port: int
    launch: str
    """Which launch this is: nodes of another one are not listened to."""

    @staticmethod
    def parse(nodes: int, node: int, rendezvous: str | None, launch: str) -> "NodePlace":
        """What the command line says. Raises UserError."""
        host, colon, port = (rendezvous or "").rpartition(":")
        if not colon or not host or not port.isdigit() or not 1024 <= int(port) <= 65535 - PORTS_TRIED:
            raise UserError(
                f"--rendezvous: found {rendezvous!r}, wanted HOST:PORT of the first node (a port from 1024 on), such as node1:29400."
            )
        if not 0 <= node < nodes:
            raise UserError(f"--node {node} of --nodes {nodes}: wanted a number from 0 to {nodes - 1}.")
        return NodePlace(nodes, node, host, int(port), launch)


class Posted(NamedTuple):
    """What somebody posted last, as it is seen from here."""

    content: dict[str, Any]
    silent_seconds: float
    """Since anything of it, its counter included, changed."""


class Board:
    """What the nodes post. Made by the first node, found by the others; `close` it at the end."""

    def __init__(self, place: NodePlace, store: Any) -> None:
        """store: a TCPStore in which all keys of this launch are there (see `make_board` and `find_board`)."""
        self._place, self._store = place, store
        self._mine: dict[str, Any] = {}
        self._seen: dict[str, tuple[bytes | str, dict[str, Any], float]] = {}
        self._lock, self._ended, self._changed = threading.Lock(), threading.Event(), threading.Event()
        self._counter = itertools.count(1)
        self.incarnation = uuid.uuid4().hex
        """Whose words these are: a supervisor that began anew knows nothing of what was ordered before."""
        self._thread = threading.Thread(target=self._talk, name="nodes", daemon=True)
        self._thread.start()

    def post(self, **content: Any) -> None:
        """What this node says from now on (JSON), beside what it said before; the others see it within a second."""
        with self._lock:
            self._mine = self._mine | content
        self._changed.set()

    def node(self, number: int) -> Posted:
        """What a node says: on the first node, of every other one."""
        return self._posted(_node_key(self._place, number))

    @property
    def first(self) -> Posted:
        """What the first node says, which is what it orders."""
        return self._posted(_node_key(self._place, 0))

    def _posted(self, key: str) -> Posted:
        with self._lock:
            _, content, changed = self._seen.get(key, (_NOTHING, {}, time.monotonic()))
        return Posted(content, time.monotonic() - changed)

    def _talk(self) -> None:
        is_first = self._place.node == 0
        keys = [_node_key(self._place, number) for number in (range(1, self._place.nodes) if is_first else (0,))]
        with self._lock:
            self._seen = {key: (_NOTHING, {}, time.monotonic()) for key in keys}
        while not self._ended.is_set():
            with self._lock:
                said = json.dumps(self._mine | {"counter": next(self._counter), "incarnation": self.incarnation})
            try:
                self._store.set(_node_key(self._place, self._place.node), said)
                found = self._store.multi_get(keys) if keys else []
            except Exception:  # the other end is gone: that is what the silence says
                return
            with self._lock:
                for key, content in zip(keys, found, strict=True):
                    if content != self._seen[key][0]:
                        self._seen[key] = (content, json.loads(content), time.monotonic())  # once, not at every look
            self._changed.wait(EXCHANGE_SECONDS)
            self._changed.clear()

    def close(self) -> None:
        """Say the last word, and go."""
        self._changed.set()
        time.sleep(2 * EXCHANGE_SECONDS)
        self._ended.set()
        self._changed.set()
        self._thread.join(ANSWER_SECONDS)


def leave(status: int) -> NoReturn:
    """End this process at once. In the interpreter's own clean-up, a thread that waits for a node that is gone would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _node_key(place: NodePlace, number: int) -> str:
    return f"pretrain/{place.launch}/{number}"


def make_board(place: NodePlace) -> Board:
    """The first node's: it listens. Raises UserError where no port of those that are tried is free."""
    from torch._C._distributed_c10d import TCPStore  # where torch.distributed has it from

    for port in range(place.port, place.port + PORTS_TRIED):
        try:
            store = TCPStore("localhost", port, None, True, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False)
        except RuntimeError as error:  # torch's own class, which says EADDRINUSE in its text
            if os.strerror(errno.EADDRINUSE).lower() not in str(error).lower():
                raise
            continue
        for number in range(place.nodes):
            store.set(_node_key(place, number), _NOTHING)
        return Board(place, store)
    raise UserError(
        f"ports {place.port} to {place.port + PORTS_TRIED - 1} of {place.host} are taken; give another one (job.rendezvous_port of the "
        "cluster file, or --rendezvous HOST:PORT)."
    )


def find_board(place: NodePlace, seconds: float) -> Board | None:
    """Another node's: it looks for the first one. None where that was not there within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for port in range(place.port, place.port + PORTS_TRIED):
            if (store := _look_for_store(place, port)) is not None:
                return Board(place, store)
        time.sleep(1)
    return None


def _look_for_store(place: NodePlace, port: int) -> Any:
    """A store that holds this launch's keys; None where nobody, or somebody else, answers. In a thread: a stranger may never answer."""
    from torch._C._distributed_c10d import TCPStore  # where torch.distributed has it from

    found: list[Any] = []

    def look() -> None:
        with contextlib.suppress(Exception):  # refused, unknown host, another protocol: all the same
            socket.create_connection((place.host, port), ANSWER_SECONDS).close()  # torch would print a page where nobody listens
            store = TCPStore(place.host, port, None, False, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False)
            if store.check([_node_key(place, 0)]):
                found.append(store)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(2 * ANSWER_SECONDS)
    return found[0] if found else None
