"""Supervisors of two nodes (processes of this machine, a rank each): they begin together, end together, and name what failed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from configs.errors import UserError
from pretrain.run.attempt import decide_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.heartbeat import Reading
from pretrain.run.nodes import PORTS_TRIED, NodePlace
from pretrain.run.outcome import Outcome
from pretrain.run.stacks import Place
from pretrain.run.team import NodeResult
from pretrain.run.watchdog import Late
from tests.faults.trainings import settings_of
from tests.tiny import write_tiny_dataset

ROOT = Path(__file__).parent.parent.parent.parent
STEPS, LIMIT_SECONDS = 60, 120
COMMAND = """
from pretrain.run import lease, nodes, supervisor, team
nodes.LOST_SECONDS = team.LOST_SECONDS = 5.0
supervisor.PAUSES_SECONDS = (0.0, 0.0, 0.0)
lease.ABANDONED_AFTER_SECONDS = 3.0
from pretrain.cli import main
main()
"""


class Node:
    """One of two supervisors."""

    def __init__(self, folder: Path, number: int, port: int, **settings: str) -> None:
        self.port, self.said_file = port, folder / f"said-{number}.txt"
        given = {"data.root": folder / "data", "run.root": folder / "runs", **settings_of(STEPS), "parallel.cpu_processes": "1", **settings}
        place = ["--nodes", "2", "--node", str(number), "--rendezvous", f"localhost:{port}", "--launch", "test", "--join-seconds", "15"]
        command = [sys.executable, "-c", COMMAND, "train", str(folder / "tiny.yaml"), *(f"{key}={value}" for key, value in given.items())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        with self.said_file.open("ab") as said:
            self.process = subprocess.Popen([*command, *place], cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self.said_file.read_text()

    @property
    def ranks(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if "pretrain.train" in child.cmdline()]

    def wait(self) -> int:
        return self.process.wait(LIMIT_SECONDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_dataset(tmp_path / "data", seed=5)
    (tmp_path / "tiny.yaml").write_text("{}")
    return tmp_path


@contextmanager
def two_nodes(folder: Path, **settings: str) -> Generator[list[Node], None, None]:
    """Both are started; nothing of them is left behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65535 - PORTS_TRIED)
    nodes = [Node(folder, number, port, **settings) for number in (0, 1)]
    try:
        yield nodes
    finally:
        for node in nodes:
            family = [node.process, *psutil.Process(node.process.pid).children(recursive=True)] if node.process.poll() is None else []
            for process in family:
                process.kill()
            node.process.wait()


def steps_of(folder: Path) -> int:
    """Rows so far."""
    rows = folder / "runs" / "tiny" / "metrics.jsonl"
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


def until(condition: Callable[[], bool], nodes: list[Node]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline and all(node.process.poll() is None for node in nodes), [node.said for node in nodes]
        time.sleep(0.02)


def attempts(folder: Path) -> list[tuple[int | None, str]]:
    return [(row.get("status"), row["cause"]) for row in RunFolder(folder / "runs" / "tiny").attempts()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Last step and hash of what one node with two ranks learns."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_tiny_dataset(folder / "data", seed=5)
    (folder / "tiny.yaml").write_text("{}")
    given = {"data.root": folder / "data", "run.root": folder / "runs", **settings_of(STEPS)}
    command = [
        sys.executable,
        "-m",
        "pretrain.cli",
        "train",
        str(folder / "tiny.yaml"),
        *(f"{key}={value}" for key, value in given.items()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=LIMIT_SECONDS)
    return learnt_by(folder)


def learnt_by(folder: Path) -> tuple[str, str]:
    from pretrain.checkpoint.index import state_hash
    from pretrain.checkpoint.verify import list_commits, read_commit

    newest = list_commits(folder / "runs" / "tiny" / "checkpoints")[0]
    return newest.name, state_hash(read_commit(newest))


def test_a_rank_is_killed_on_one_node_and_a_node_is_stopped_and_all_go_on(folder: Path, undisturbed: tuple[str, str]) -> None:
    """SIGKILL of a rank of the second node, then SIGTERM to its supervisor: the attempt fails and is stopped on both; the same bits."""
    with two_nodes(folder) as nodes:
        until(lambda: steps_of(folder) > 8, nodes)
        nodes[1].ranks[0].kill()
        until(lambda: len(attempts(folder)) == 1 and steps_of(folder) > 20, nodes)
        nodes[1].process.send_signal(signal.SIGUSR2)
        assert [node.wait() for node in nodes] == [75, 75], [node.said for node in nodes]
    host = socket.gethostname()
    (_, killed), (_, stopped) = attempts(folder)
    assert killed.startswith(f"rank 1 on node 1 ({host}) was ended by SIGKILL") and stopped.startswith("stopped and saved at step")
    with two_nodes(folder) as nodes:
        assert [node.wait() for node in nodes] == [0, 0], [node.said for node in nodes]
        assert all("done: 60 steps" in node.said for node in nodes)
    assert learnt_by(folder) == undisturbed


@pytest.mark.long
def test_a_node_that_is_cut_off_is_named_and_the_run_goes_on_when_it_is_back(folder: Path, undisturbed: tuple[str, str]) -> None:
    """The second node's processes are stopped for longer than a node may be silent, as by a cut cable, and let go on."""
    with two_nodes(folder) as nodes:
        until(lambda: steps_of(folder) > 8, nodes)
        family = [psutil.Process(nodes[1].process.pid), *nodes[1].ranks]
        for process in family:
            process.suspend()
        until(lambda: len(attempts(folder)) == 1, nodes[:1])
        for process in family:
            process.resume()
        assert [node.wait() for node in nodes] == [0, 0], [node.said for node in nodes]
    assert attempts(folder)[0][1].startswith(f"node 1 ({socket.gethostname()}) was lost: nothing was heard of it for ")
    assert learnt_by(folder) == undisturbed


@pytest.mark.long
def test_a_supervisor_that_is_killed_takes_its_ranks_along_and_the_others_give_up(folder: Path) -> None:
    """The second node's is killed: its ranks go at once, and the first one waits for another one. Then the first one's is."""
    with two_nodes(folder) as nodes:
        until(lambda: steps_of(folder) > 8, nodes)
        rank = nodes[1].ranks[0]
        nodes[1].process.kill()
        psutil.wait_procs([rank], timeout=30)
        assert not rank.is_running()
        nodes[1].process.wait()
        nodes[1] = Node(folder, 1, nodes[0].port)
        until(lambda: len(attempts(folder)) == 1 and steps_of(folder) > 20, nodes)
        assert attempts(folder)[0][1].startswith("node 1 (")
        rank = nodes[0].ranks[0]
        nodes[0].process.kill()
        assert nodes[1].wait() == 75, nodes[1].said
        psutil.wait_procs([rank], timeout=30)
        assert not rank.is_running() and "the first node did not answer" in nodes[1].said


def test_a_node_that_is_not_like_the_first_is_refused_by_name(folder: Path) -> None:
    with two_nodes(folder) as nodes:
        nodes[1].process.kill()
        nodes[1].process.wait()
        nodes[1] = Node(folder, 1, nodes[0].port, **{"optimizer.peak_lr": "2e-2"})
        assert [node.wait() for node in nodes] == [2, 2], [node.said for node in nodes]
        for node in nodes:
            assert f"node 1 ({socket.gethostname()}) is not like the first node: configuration is" in node.said


@pytest.mark.long
def test_an_absent_node_is_named(folder: Path) -> None:
    with two_nodes(folder, **{"run.attempts_in_vain": "1"}) as nodes:
        nodes[1].process.kill()
        assert nodes[0].wait() == 1, nodes[0].said  # of a launch, which would begin it again for ever
    assert attempts(folder) == [(75, f"node 1 of 2 did not arrive within 15 s (there: node 0 ({socket.gethostname()})).")]


@pytest.mark.parametrize("text", [None, "host", "host:", ":29400", "host:80", "host:70000", "host:65534", "host:x"])
def test_a_rendezvous_that_is_none_is_refused(text: str | None) -> None:
    with pytest.raises(UserError, match="wanted HOST:PORT"):
        NodePlace.parse(2, 0, text, "test")
    with pytest.raises(UserError, match="wanted a number from 0 to 1"):
        NodePlace.parse(2, 2, "host:29400", "test")


def test_what_a_node_tells_arrives_as_it_was() -> None:
    reading = Reading(7, "step", 3, 9, 0)
    told = NodeResult({1: Outcome("stopped", "x", 1, 2)}, {2: -9}, [Late(1, reading, 8.0, 7.0)], {1: Place("running", ("a", "b"), True)}, 2)
    assert NodeResult.from_json(told.to_json()) == told


def test_the_one_that_did_not_arrive_is_found_over_all_nodes() -> None:
    """Both ranks are silent; the one of the second node has done fewer acts."""
    late = [Late(0, Reading(7, "step", 3, 9, 0), 8.0, 7.0), Late(1, Reading(8, "step", 3, 8, 0), 7.5, 7.0)]
    results = {number: NodeResult(late=[one], places={number: Place("sleeping", ("x.py:3 in f",))}) for number, one in enumerate(late)}
    verdict = decide_attempt(results, {}, "rank {} there".format, 10, Path("stacks"))
    assert verdict.message.startswith("rank 1 there did not arrive: silent for 8 s in phase step, step 3") and verdict.is_fault
    lost = decide_attempt(results, {2: "node 2 (c) was lost"}, "rank {} there".format, 10, Path("stacks"))
    assert (lost.status, lost.message) == (75, "node 2 (c) was lost. The run can be resumed.")
