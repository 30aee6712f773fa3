"""What the supervisors of several nodes do together: begin an attempt, end it everywhere when it fails anywhere, and learn why.

In: a `Board`, what each node's ranks came to. Out: for the ranks' page, whether to end them; for the supervisor's page, what all nodes
came to and which were lost. The first node decides; the others follow its orders and come back when it was lost for a while.
"""

import contextlib
import math
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from configs.errors import EXIT_MISTAKE, EXIT_RESUMABLE
from pretrain.run.heartbeat import Reading
from pretrain.run.nodes import LOST_SECONDS, Board, NodePlace, find_board, make_board
from pretrain.run.outcome import Outcome
from pretrain.run.stacks import Place
from pretrain.run.watchdog import Late

JOIN_SECONDS = 300.0
"""Until all nodes have to be there."""
END_SECONDS = 60.0
"""Within which a node has to have ended its ranks."""
SHARED_SECONDS = 60.0
"""Until a file of the first node is seen on another one: shared file systems keep what they know of a folder for a while."""
READY_SECONDS = 2.0
"""All nodes have to say so again and again for that long: the last word of one that is gone may arrive when a cable is mended."""
LAST_WORD_SECONDS = 5.0
"""Until all nodes have heard how it ended."""
LOOK_SECONDS = 0.2
GOOD = ("done", "stopped", "rollback")


class CallOff(NamedTuple):
    """Why the ranks of an attempt are to be ended now."""

    why: str
    wants_stacks: bool


@dataclass(frozen=True)
class NodeResult:
    """What became of one node's ranks in an attempt."""

    records: dict[int, Outcome] = field(default_factory=dict)
    exit_codes: dict[int, int] = field(default_factory=dict)
    """Of ranks that failed, but for those that were ended because another node's had."""
    late: list[Late] = field(default_factory=list)
    """Ranks that were silent; where the whole attempt hung, all."""
    places: dict[int, Place] = field(default_factory=dict)
    signals: int = 0
    """How often this node was asked to stop."""
    problem: str | None = None
    """Why the ranks could not be started."""
    is_mistake: bool = False
    """Whether that is the user's to mend."""

    @property
    def is_good(self) -> bool:
        """Whether its ranks ended by themselves, as agreed with all others."""
        ended = all(record.kind in GOOD for record in self.records.values())
        return bool(self.records) and ended and not (self.exit_codes or self.late or self.problem)

    def to_json(self) -> dict[str, Any]:
        """For the board."""
        return asdict(self) | {"late": [{**one._asdict(), "reading": one.reading._asdict()} for one in self.late]}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "NodeResult":
        """From the board."""
        return NodeResult(
            {int(rank): Outcome(**record) for rank, record in content["records"].items()},
            {int(rank): code for rank, code in content["exit_codes"].items()},
            [Late(one["rank"], Reading(**one["reading"]), one["seconds"], one["limit"]) for one in content["late"]],
            {int(rank): Place(one["state"], tuple(one["lines"]), one["in_collective"]) for rank, one in content["places"].items()},
            content["signals"],
            content["problem"],
            content["is_mistake"],
        )


class Team(Protocol):
    """Those whose ranks train together, seen from one node."""

    nodes: int
    node: int

    def rendezvous(self) -> dict[str, Any]:
        """How the ranks of all nodes find each other: arguments of torch's LaunchConfig."""
        ...

    def called_off(self) -> CallOff | None:
        """Whether the attempt failed elsewhere."""
        ...


class Alone:
    """One node: nobody else decides."""

    nodes, node = 1, 0

    def rendezvous(self) -> dict[str, Any]:
        """A port that is free by construction: nobody has to be told."""
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}

    def called_off(self) -> CallOff | None:
        """Never."""
        return None

    def name(self, number: int) -> str:
        """See `Leader`."""
        return socket.gethostname()

    def assemble(self, say: Callable[[str], None]) -> None:
        """See `Leader`: all are there."""

    def begin(self, attempt: int, folder: Path) -> None:
        """See `Leader`: nobody is to be told."""

    def gather(self, mine: NodeResult) -> tuple[dict[int, NodeResult], dict[int, str]]:
        """See `Leader`."""
        return {0: mine}, {}

    def end(self, status: int, message: str) -> None:
        """See `Leader`."""


def _static(nodes: int, node: int, host: str, port: int) -> dict[str, Any]:
    """Ranks are numbered node by node: c10d's own rendezvous would number nodes by the order in which they come."""
    return {"rdzv_backend": "static", "rdzv_endpoint": f"{host}:{port}", "rdzv_configs": {"rank": node, "timeout": int(JOIN_SECONDS)}}


class Leader:
    """The first node's side."""

    node = 0

    def __init__(self, place: NodePlace, about: dict[str, Any], join_seconds: float = JOIN_SECONDS) -> None:
        """about: what must be equal on all nodes, by what it is called. Raises UserError where no port is free."""
        self.nodes = place.nodes
        self._place, self._about, self._join_seconds = place, about, join_seconds
        self._board = make_board(place)
        self._board.post(host=socket.gethostname(), order={"act": "wait", "round": 0})
        self._round, self._port = 0, 0
        self._members: dict[int, str] = {}
        self._lost: dict[int, str] = {}

    def assemble(self, say: Callable[[str], None]) -> tuple[str, int] | None:
        """Wait until every node is ready. Returns None, or what is wrong and the exit status that it means."""
        began, told, complete_since = time.monotonic(), 0.0, math.inf
        while time.monotonic() - complete_since < READY_SECONDS:
            absent = [number for number in range(1, self.nodes) if not self._is_ready(number)]
            if not absent:
                complete_since = min(complete_since, time.monotonic())
                time.sleep(LOOK_SECONDS)
                continue
            complete_since, waited = math.inf, time.monotonic() - began
            if waited > self._join_seconds:
                there = ", ".join(self.name(number) for number in range(self.nodes) if number not in absent)
                these = f"node{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} of {self.nodes}"
                return f"{these} did not arrive within {self._join_seconds:.0f} s (there: {there}).", EXIT_RESUMABLE
            if waited - told > 10:
                told = waited
                say(f"waiting for node{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} of {self.nodes} ({waited:.0f} s)")
            time.sleep(LOOK_SECONDS)
        for number in range(1, self.nodes):
            theirs: dict[str, Any] = self._board.node(number).content["about"]
            if different := [key for key in self._about | theirs if theirs.get(key) != self._about.get(key)]:
                rows = "; ".join(f"{key} is {theirs.get(key)} there and {self._about.get(key)} on {self.name(0)}" for key in different)
                return f"{self.name(number)} is not like the first node: {rows}. All nodes need the same.", EXIT_MISTAKE
        return None

    def _is_ready(self, number: int) -> bool:
        posted = self._board.node(number)
        return posted.content.get("state") == "ready" and posted.silent_seconds < READY_SECONDS / 2

    def name(self, number: int) -> str:
        """A node, as messages name it."""
        host = socket.gethostname() if number == 0 else self._board.node(number).content.get("host", "unknown")
        return f"node {number} ({host})"

    def begin(self, attempt: int, folder: Path) -> None:
        """Order an attempt. folder: of the run, its `run.yaml` written."""
        self._round += 1
        self._lost, self._port = {}, _free_port()
        self._members = {number: self._board.node(number).content["incarnation"] for number in range(1, self.nodes)}
        run_sha256 = sha256((folder / "run.yaml").read_bytes()).hexdigest()
        order = {"act": "run", "attempt": attempt, "folder": str(folder), "run_sha256": run_sha256, "members": self._members}
        self._order(order | {"host": self._place.host, "port": self._port})

    def _order(self, order: dict[str, Any]) -> None:
        self._board.post(order=order | {"round": self._round})

    def rendezvous(self) -> dict[str, Any]:
        """See `Team`."""
        return _static(self.nodes, 0, self._place.host, self._port)

    def called_off(self) -> CallOff | None:
        """See `Team`."""
        self._lost |= self._newly_lost()
        for number in range(1, self.nodes):
            result = self._result_of(number)
            if number in self._lost or (result is not None and not result.is_good):
                off = CallOff(self._lost.get(number) or f"{self.name(number)} failed", bool(result and result.late))
                self._order({"act": "end", "why": off.why, "stacks": off.wants_stacks})
                return off
        return None

    def _newly_lost(self) -> dict[int, str]:
        lost: dict[int, str] = {}
        for number, incarnation in self._members.items():
            posted = self._board.node(number)
            if number in self._lost or self._result_of(number) is not None:
                continue
            if posted.content.get("incarnation") != incarnation:
                lost[number] = f"{self.name(number)} was lost: its supervisor began anew"
            elif posted.silent_seconds > LOST_SECONDS:
                lost[number] = f"{self.name(number)} was lost: nothing was heard of it for {posted.silent_seconds:.0f} s"
        return lost

    def _result_of(self, number: int) -> NodeResult | None:
        content = self._board.node(number).content
        ours = content.get("incarnation") == self._members.get(number)
        return NodeResult.from_json(content["result"]) if ours and content.get("ended_round") == self._round else None

    def gather(self, mine: NodeResult) -> tuple[dict[int, NodeResult], dict[int, str]]:
        """Wait until the ranks of all nodes are gone. Returns what became of each node's, and which nodes were lost (why)."""
        ending_since = None
        while waiting := [number for number in self._members if number not in self._lost and self._result_of(number) is None]:
            if ending_since is None and not mine.is_good:
                self._order({"act": "end", "why": f"{self.name(0)} failed", "stacks": bool(mine.late)})
                ending_since = time.monotonic()
            if self.called_off() is not None and ending_since is None:
                ending_since = time.monotonic()
            if ending_since is not None and time.monotonic() - ending_since > END_SECONDS:
                self._lost |= {
                    number: f"{self.name(number)} was lost: its ranks did not end within {END_SECONDS:.0f} s" for number in waiting
                }
            time.sleep(LOOK_SECONDS)
        self._order({"act": "wait"})
        results = {number: result for number in self._members if (result := self._result_of(number)) is not None}
        return {0: mine} | results, self._lost

    def end(self, status: int, message: str) -> None:
        """Tell all nodes how it ended; they end with the same status."""
        self._order({"act": "exit", "status": status, "message": message})
        deadline = time.monotonic() + LAST_WORD_SECONDS
        while time.monotonic() < deadline and any(self._is_listening(number) for number in range(1, self.nodes)):
            time.sleep(LOOK_SECONDS)
        self._board.close()

    def _is_listening(self, number: int) -> bool:
        posted = self._board.node(number)
        return posted.content.get("state") not in (None, "gone") and posted.silent_seconds < LAST_WORD_SECONDS


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Follower:
    """Another node's side."""

    def __init__(self, place: NodePlace, about: dict[str, Any], join_seconds: float = JOIN_SECONDS) -> None:
        """about: as `Leader` has it."""
        self.nodes, self.node = place.nodes, place.node
        self._place, self._about, self._join_seconds = place, about, join_seconds
        self._board: Board | None = None
        self._order: dict[str, Any] = {}

    def follow(self, run: Callable[[Path, int], NodeResult], say: Callable[[str], None]) -> int:
        """Do what the first node orders until it orders the end; its exit status. run: an attempt's ranks, by run folder and number."""
        while True:
            say(f"node {self.node} of {self.nodes}: looking for the first one at {self._place.host}:{self._place.port}")
            self._board = find_board(self._place, self._join_seconds)
            if self._board is None:
                where = f"{self._place.host}:{self._place.port}"
                say(f"error: the first node did not answer at {where} within {self._join_seconds:.0f} s.")
                return EXIT_RESUMABLE
            self._board.post(host=socket.gethostname(), about=self._about, state="ready")
            status = self._obey(self._board, run, say)
            self._board.close()
            if status is not None:
                return status
            say(f"{self._first} was lost; waiting for it")

    @property
    def _first(self) -> str:
        host = self._board.first.content.get("host", self._place.host) if self._board else self._place.host
        return f"node 0 ({host})"

    def _obey(self, board: Board, run: Callable[[Path, int], NodeResult], say: Callable[[str], None]) -> int | None:
        """Until the end is ordered (its exit status), or the first node is lost (None)."""
        done = 0
        while board.first.silent_seconds < LOST_SECONDS:
            order = board.first.content.get("order", {})
            mine = self._incarnation(order) == board.incarnation
            if order.get("act") == "exit":
                say(order["message"])
                board.post(state="gone")
                return int(order["status"])
            if order.get("act") == "run" and order["round"] > done and mine:
                self._order, done = order, order["round"]
                board.post(state="running")
                result = self._when_shared(Path(order["folder"]), order["run_sha256"]) or run(Path(order["folder"]), order["attempt"])
                board.post(state="ended", ended_round=done, result=result.to_json())
            elif order.get("act") == "wait":
                board.post(state="ready")
            time.sleep(LOOK_SECONDS)
        return None

    def _incarnation(self, order: Mapping[str, Any]) -> str | None:
        return order.get("members", {}).get(str(self.node))

    def _when_shared(self, folder: Path, run_sha256: str) -> NodeResult | None:
        """Wait until the run folder holds what the first node wrote. Returns what is wrong where it does not."""
        deadline = time.monotonic() + SHARED_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if sha256((folder / "run.yaml").read_bytes()).hexdigest() == run_sha256:
                    return None
            time.sleep(LOOK_SECONDS)
        where = f"node {self.node} ({socket.gethostname()})"
        problem = (
            f"{folder}: {where} does not see there what the first node wrote; wanted a run.root on a file system that all nodes share."
        )
        return NodeResult(problem=problem, is_mistake=True)

    def rendezvous(self) -> dict[str, Any]:
        """See `Team`."""
        return _static(self.nodes, self.node, self._order["host"], self._order["port"])

    def called_off(self) -> CallOff | None:
        """See `Team`."""
        assert self._board is not None
        first = self._board.first
        if first.silent_seconds > LOST_SECONDS:
            return CallOff(f"{self._first} was lost: nothing was heard of it for {first.silent_seconds:.0f} s", False)
        order = first.content.get("order", {})
        if order.get("round") == self._order["round"] and order.get("act") == "run":
            return None
        return CallOff(order.get("why", "the first node has given this attempt up"), bool(order.get("stacks")))
