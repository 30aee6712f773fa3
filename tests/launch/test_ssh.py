"""A launch over ssh, without a network: hosts that cannot take part, stops, kills, connections that fall, exit statuses."""

import signal
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest

from configs.cluster import HostsSection
from launch.hostfile import HOST_SCRIPT
from launch.ssh import Remote, join_statuses
from tests.launch.ssh_launches import GONE_SECONDS, ROOT, TOLD, Launch


@pytest.fixture
def launch(tmp_path: Path) -> Generator[Launch, None, None]:
    launch = Launch(tmp_path)
    try:
        yield launch
    finally:
        launch.close()


def test_the_command_of_ssh() -> None:
    section = HostsSection(hosts=("a",), user="train", ssh_port=2222, ssh_options=("StrictHostKeyChecking=accept-new",))
    command = Remote(section, "a", "echo 'it'\"'\"'s'").command
    assert command[:6] == ["ssh", "-T", "-a", "-x", "-o", "StrictHostKeyChecking=accept-new"]
    assert command[-8:-1] == ["ControlPath=none", "-l", "train", "-p", "2222", "--", "a"]
    assert {"BatchMode=yes", "ConnectTimeout=10"} < set(command)
    assert subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, timeout=60).stdout == "it's\n"


@pytest.mark.parametrize(
    ("statuses", "joined"),
    [
        *(((0, 0), 0), ((0, 75), 75), ((1, 75, 2), 2), ((75, 1), 75), ((1, 3), 1), ((0, 3, 1), 3)),
        *(((0, None), 0), ((1, None), 1), ((None, None), 75), ((None, 1), 75), ((None, 2), 2)),
    ],
)
def test_one_status_for_all(statuses: tuple[int | None, ...], joined: int) -> None:
    assert join_statuses(statuses) == joined


def test_nodes_get_their_place_and_their_environment_and_nothing_else(launch: Launch) -> None:
    launch.environment = {TOLD: 'it\'s "$HOME", `x`;\n$(touch x) \\ ü\t,end'}
    for node in range(3):
        launch.end_node(node, 0)
    launch.start()
    assert launch.wait() == 0, launch.printed
    extensions = set()
    for node, host in enumerate(launch.hosts):
        (told,) = launch.starts(node)
        extensions.add(told["TORCH_EXTENSIONS_DIR"])
        assert (told[TOLD], told["SECRET_OF_SHELL"]) == (launch.environment[TOLD], None)
        assert (launch.folder / "launch" / f"node-{node}.log").read_text() == f"node {node} of 127.0.0.1:29400\n"
        assert f"{host}: node {node} of 127.0.0.1:29400\n" in launch.printed
        assert "$HOME" not in (launch.folder / f"{host}.arguments").read_text()
    assert len(extensions) == 3 and all(path.startswith(f"{launch.folder}/scratch/pretrain-{launch.launch_id}-") for path in extensions)
    assert not list((launch.folder / "scratch").iterdir()) and not launch.marked()
    assert not [path for path in (Path.cwd() / "x", ROOT / "x", launch.folder / "x") if path.exists()]


def test_hosts_that_cannot_take_part_are_named_together_and_nothing_starts(launch: Launch) -> None:
    launch.hosts = ("127.0.0.1", "machine-2", "machine-3", "machine-4")
    for host in ("machine-2", "machine-4"):
        (launch.folder / f"refused-{host}").touch()
    launch.start()
    assert launch.wait() == 2
    assert (
        "2 of 4 hosts cannot take part, so nothing was started. machine-2: cannot be reached by ssh (ssh: connect to host" in launch.printed
    )
    assert "machine-4: cannot" in launch.printed and "machine-3: " not in launch.printed
    assert not any(launch.starts(node) for node in range(4))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda launch: setattr(launch, "python", "/no/python"), "found no /no/python; job.python"),
        (
            lambda launch: setattr(launch, "hosts", ("no-such-first.invalid",)),
            "does not know the first host by its name, no-such-first.invalid",
        ),
        (lambda launch: (launch.folder / "scratch").rmdir(), "scratch; name another folder of each node as job.scratch"),
        (lambda launch: setattr(launch, "hosts", ("localhost", "machine-2")), "takes the first host, localhost, for itself"),
    ],
)
def test_what_a_host_lacks_is_said(launch: Launch, spoil: Callable[[Launch], object], named: str) -> None:
    spoil(launch)
    launch.start()
    assert launch.wait() == 2
    assert named in launch.printed, launch.printed
    assert not launch.starts(0)


def test_a_folder_that_hosts_do_not_see_is_said(launch: Launch) -> None:
    """`ssh` hides the launch's folder from the second host."""
    ssh = launch.folder / "bin" / "ssh"
    elsewhere = '"$(printf %s "$word" | sed s:/launch:/elsewhere:g)"'
    hide = f'for word; do :; done; case "$*" in *" machine-2 "*) set -- -- machine-2 {elsewhere};; esac'
    ssh.write_text(ssh.read_text().replace("exec", f"{hide}\nexec"))
    launch.start()
    assert launch.wait() == 2
    assert "1 of 3 hosts cannot take part" in launch.printed and "machine-2: does not see" in launch.printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_passed_on_to_all_nodes(launch: Launch, number: signal.Signals) -> None:
    launch.start()
    launch.until_all_run()
    launch.signal(number)
    assert launch.wait() == 75, launch.printed
    assert launch.printed.count("asked to stop") == 3
    assert not launch.marked()


def test_nodes_that_do_not_end_in_their_grace_are_ended(launch: Launch) -> None:
    for node in range(3):
        (launch.folder / f"node-{node}.deaf").touch()
    launch.start()
    launch.until_all_run()
    began = time.monotonic()
    launch.signal(signal.SIGTERM)
    assert launch.wait() == 75, launch.printed
    assert 2 <= time.monotonic() - began < GONE_SECONDS and not launch.marked()


def test_a_launcher_that_is_killed_leaves_no_process(launch: Launch) -> None:
    launch.start()
    launch.until_all_run()
    launch.until(lambda: len(launch.marked()) == 9)
    launch.signal(signal.SIGKILL)
    launch.until(lambda: not launch.marked(), GONE_SECONDS)
    launch.until(lambda: not list((launch.folder / "scratch").iterdir()), 5)


def test_a_launcher_that_falls_silent_leaves_no_process(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose machine lost its power: no connection is closed."""
    monkeypatch.setattr("launch.hostfile.SILENT_SECONDS", 4)
    launch.hosts = launch.hosts[:1]
    launch.start()
    launch.until_all_run()
    launch.signal(signal.SIGSTOP)
    launch.until(lambda: not launch.marked(), GONE_SECONDS)


def test_a_host_whose_connection_fell_is_taken_in_again(launch: Launch) -> None:
    launch.start()
    launch.until_all_run()
    launch.cut("machine-2")
    launch.until(lambda: len(launch.starts(1)) == 2)
    assert "machine-2: the connection fell; it is tried again in 1 s" in launch.printed
    for node in range(3):
        launch.end_node(node, 0)
    assert launch.wait() == 0, launch.printed
    assert [[start["STARTED"] for start in launch.starts(node)] for node in range(3)] == [[None], [None, "again"], [None]]
    assert not launch.marked()


def test_what_a_lost_connection_left_is_gone_before_its_node_starts_again(launch: Launch) -> None:
    """The host's script is killed and then its connection, so that nobody there ends the node."""
    launch.hosts = launch.hosts[:2]
    launch.start()
    launch.until_all_run()
    launch.until(lambda: len(launch.marked()) == 6)
    before = set(launch.marked())
    scripts = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:3] == [f"{launch.folder}/launch/{HOST_SCRIPT}", "1"]
    ]
    assert len(scripts) == 2, scripts  # and the one in it that listens
    for process in scripts:
        process.kill()
    assert set(launch.marked()) == before
    launch.cut("machine-2")
    launch.until(lambda: len(launch.starts(1)) == 2)
    assert len(before & set(launch.marked())) == 3, "the first node's are left alone, the second one's are gone"


def test_a_host_that_does_not_come_back_is_given_up(launch: Launch) -> None:
    launch.hosts, launch.join_seconds = launch.hosts[:2], 2
    launch.start()
    launch.until_all_run()
    (launch.folder / "refused-machine-2").touch()
    launch.cut("machine-2")
    launch.until(lambda: "for 2 s now: it is not tried again" in launch.printed)
    launch.end_node(0, 75)
    assert launch.wait() == 75, launch.printed


def test_a_host_that_is_lost_at_the_end_takes_the_first_ones_status(launch: Launch) -> None:
    launch.hosts = launch.hosts[:2]
    launch.start()
    launch.until_all_run()
    (launch.folder / "refused-machine-2").touch()
    launch.cut("machine-2")
    launch.until(lambda: "machine-2: the connection fell" in launch.printed)
    launch.end_node(0, 0)
    assert launch.wait() == 0, launch.printed


@pytest.mark.parametrize(("statuses", "joined"), [((0, 2, 75), 2), ((75, 75, 75), 75), ((1, 1, 1), 1)])
def test_exit_statuses_arrive(launch: Launch, statuses: tuple[int, ...], joined: int) -> None:
    for node, status in enumerate(statuses):
        launch.end_node(node, status)
    launch.start()
    assert launch.wait() == joined, launch.printed
