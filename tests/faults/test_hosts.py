"""A Ray cluster over two hosts, as far as one machine can have them: two network namespaces with names and addresses of their own.

Run by `make cluster-tests` alone. What it makes (namespaces, the cable between them, processes, folders) is gone at its end.
"""

import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.data_section import DataSection, RuleSection
from tests.faults.builds import QUIET, ROOT, differences, kill_all, members_of, name_of, snapshot, start_driver
from tests.faults.corpora import NEAR, RULES, describe_build, write_corpora
from tests.faults.rules import HOSTS, PAUSE_SECONDS
from tests.faults.two_hosts import Host, reason_to_skip, two_hosts

pytestmark = pytest.mark.cluster
PORT = 6399
START_SECONDS = 90
OBJECT_STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class Cluster:
    """Ray on both hosts."""

    hosts: tuple[Host, Host]
    sessions: tuple[int, int]
    """Of each host's processes."""
    folder: Path
    """Short, and shared by both."""
    environment: dict[str, str]
    """What a driver needs to join."""

    @property
    def seen(self) -> set[str]:
        """On which hosts documents were read."""
        return {path.name for path in (self.folder / "hosts").iterdir()}


@pytest.fixture(scope="module", autouse=True)
def _asked_for(request: pytest.FixtureRequest) -> None:
    if "cluster" not in request.config.getoption("-m"):
        pytest.skip("two hosts are made by `make cluster-tests` only")
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(_asked_for: None) -> Generator[Cluster, None, None]:
    """Two hosts with one CPU each, joined by a secret that both have."""
    folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))  # a short path: Ray puts sockets below it
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "hosts").mkdir()
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        hosts = stack.enter_context(two_hosts())
        sessions = [stack.enter_context(ray_on(host, hosts[0], folder, environment)) for host in hosts]
        yield Cluster(hosts, (sessions[0], sessions[1]), folder, {**environment, "RAY_ADDRESS": f"{hosts[0].address}:{PORT}"})


@pytest.fixture(scope="module")
def corpora(cluster: Cluster) -> Path:
    """Where both hosts see them."""
    return write_corpora(cluster.folder / "corpora", random.Random(1))


@pytest.fixture(scope="module")
def references(cluster: Cluster, corpora: Path) -> list[dict[str, str]]:
    """The files of the local builds, without and with deduplication."""
    found: list[dict[str, str]] = []
    for near in (False, True):
        data = describe(corpora, cluster.folder / f"reference-{near}", near)
        with start_driver(data, cluster.folder, "here") as driver:
            assert driver.wait().status == 0
        found.append(snapshot(Path(data.folder())))
    return found


def describe(corpora: Path, root: Path, near: bool) -> DataSection:
    return describe_build(
        corpora, root, clean=(*RULES, RuleSection(rule="tests.faults.rules:note_host")), deduplicate=NEAR if near else None
    )


@pytest.mark.parametrize("wrong", [{"RAY_AUTH_TOKEN_PATH": "other"}, {"RAY_AUTH_MODE": "disabled"}], ids=["another_token", "no_token"])
def test_who_has_no_token_is_refused(cluster: Cluster, corpora: Path, tmp_path, wrong):
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    environment = {**cluster.environment, **{key: value.replace("other", str(other)) for key, value in wrong.items()}}
    data = describe(corpora, cluster.folder / "refused", near=False)
    with start_driver(data, tmp_path, environment=environment, prefix=cluster.hosts[0].prefix) as driver:
        ended = driver.wait(120)
    assert ended.status == 2 and "RAY_ADDRESS" in ended.refusal, ended
    assert not cluster.seen and not list((cluster.folder / "refused" / "units").iterdir())


@pytest.mark.parametrize("near", [False, True], ids=["plain", "deduplicated"])
def test_both_hosts_make_the_bytes_of_one(cluster: Cluster, corpora: Path, references, tmp_path, near):
    data = describe(corpora, cluster.folder / f"built-{near}", near)
    with start_driver(data, tmp_path, environment=cluster.environment, prefix=cluster.hosts[0].prefix) as driver:
        ended = driver.wait()
    assert ended.status == 0, ended
    assert not differences(snapshot(Path(data.folder())), references[near])
    assert cluster.seen == {host.name for host in cluster.hosts}


def test_a_host_that_is_lost_changes_nothing(cluster: Cluster, corpora: Path, references, tmp_path):
    """The raylet of the second host is killed in the middle; its workers end with it, and the first host makes the rest."""
    data = describe(corpora, cluster.folder / "lost", near=False)
    with start_driver(data, tmp_path, environment=cluster.environment, prefix=cluster.hosts[0].prefix) as driver:
        deadline = time.monotonic() + START_SECONDS
        while driver.is_running and _num_units_done(driver.lines()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        (raylet,) = (one for one in members_of(cluster.sessions[1]) if Path(name_of(one).split(" ")[0]).name == "raylet")
        raylet.kill()
        assert driver.is_running and _num_units_done(driver.lines()) < driver.lines()[-1]["total"], "it was over before the kill"
        ended = driver.wait()
    assert ended.status == 0, ended
    assert not differences(snapshot(Path(data.folder())), references[0])


def _num_units_done(lines: list[dict]) -> int:
    return max((line["done"] for line in lines if line.get("stage") == "tokens"), default=0)


@contextmanager
def ray_on(
    host: Host, head: Host, folder: Path, environment: dict[str, str], dashboard: Sequence[str] = ("--include-dashboard=false",)
) -> Generator[int, None, None]:
    """Ray's processes of a host, in a session of their own: its id."""
    place = ["--head", f"--port={PORT}", *dashboard] if host == head else [f"--address={head.address}:{PORT}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, f"--node-ip-address={host.address}", "--num-cpus=1"]
    command += [f"--temp-dir={folder / str(host.number)}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--block"]
    slow = {PAUSE_SECONDS: "0.01", HOSTS: str(folder / "hosts")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log = folder / f"{host.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*host.prefix, *command],
            env={**os.environ, **QUIET, **environment, **slow, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        yield process.pid
    finally:
        members = [one for one in members_of(process.pid) if one.pid != process.pid]
        process.kill()
        process.wait()
        kill_all([*members, *members_of(process.pid)])
