"""A launch over ssh on two hosts, as far as one machine can have them: it trains, loses a host for a while, and leaves nothing behind.

Run by `make cluster-tests` alone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from configs.cluster import ClusterConfig
from pretrain.watch.metrics import METRICS_FILE, read_rows
from tests.faults.builds import name_of
from tests.faults.trainings import ROOT, Learnt, attempts_of, learnt, prepare, settings_of
from tests.faults.two_hosts import Host, install_ssh, reason_to_skip, ssh_between, two_hosts

pytestmark = pytest.mark.cluster
RUN_SECONDS, GONE_SECONDS = 400, 30
STEPS, CUT_AT_STEP = 160, 40
SETTINGS = settings_of(STEPS, checkpoint__every_steps="20", evaluate__every_steps="80", watch="{log_every_steps: 1, wandb: disabled}")


@dataclass(frozen=True)
class Site:
    """Two hosts that ssh reaches, and what a run on them needs."""

    hosts: tuple[Host, Host]
    folder: Path
    cluster_file: Path

    def command(self, name: str, kind: str, **more: str) -> list[str]:
        """A verb on the run of this name."""
        given = {"data.root": self.folder / "data", "run.root": self.folder / "runs", "run.name": name, **SETTINGS, **more}
        settings = [f"{key}={value}" for key, value in given.items()]
        return [sys.executable, "-m", "pretrain.cli", *kind.split(), str(self.folder / "run.yaml"), *settings]

    def run(self, name: str) -> Path:
        """Its folder."""
        return self.folder / "runs" / name

    def steps_of(self, name: str) -> int:
        """How far it is."""
        path = self.run(name) / METRICS_FILE
        return max((int(row["step"]) for row in read_rows(path) if "loss" in row), default=0) if path.exists() else 0

    @property
    def of_runs(self) -> list[psutil.Process]:
        """What runs on the hosts, but for ssh and its daemons: supervisors, ranks, scripts."""
        return [one for host in self.hosts for one in processes_of_runs(host)]


def processes_of_runs(host: Host) -> list[psutil.Process]:
    return [one for one in host.processes if "sshd" not in name_of(one) and not name_of(one).startswith("ssh ")]


@pytest.fixture(scope="module", autouse=True)
def _asked_for(request: pytest.FixtureRequest) -> None:
    if "cluster" not in request.config.getoption("-m"):
        pytest.skip("two hosts are made by `make cluster-tests` only")
    if reason := reason_to_skip() or install_ssh():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def site(_asked_for: None) -> Generator[Site, None, None]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        for name in ("keys", "scratch"):
            (folder / name).mkdir()
        (folder / "run.yaml").write_text("{}")
        prepare(folder, random.Random(1))
        hosts = stack.enter_context(two_hosts())
        options = stack.enter_context(ssh_between(hosts, folder / "keys"))
        cluster = ClusterConfig.model_validate(
            {
                "name": "two",
                "nodes": 2,
                "job": {
                    "python": sys.executable,
                    "scratch": str(folder / "scratch"),
                    "environment": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                    "network_interface": "cable",
                    "join_seconds": 180.0,
                    "grace_seconds": 60,
                },
                "hosts": {"hosts": tuple(host.name for host in hosts), "ssh_options": options},
            }
        )
        (folder / "cluster.yaml").write_text(json.dumps(cluster.model_dump(mode="json")))
        yield Site(hosts, folder, folder / "cluster.yaml")


@pytest.fixture(scope="module")
def reference(site: Site) -> Learnt:
    """What two ranks of one machine learn, undisturbed."""
    with start(site, site.command("reference", "train"), "reference") as process:
        assert process.wait(RUN_SECONDS) == 0, said(site, "reference")
    return learnt(site.run("reference"))


@contextmanager
def start(site: Site, command: list[str], name: str) -> Generator[subprocess.Popen[bytes], None, None]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (site.folder / f"{name}.said").open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=site.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in (process, *family):
            one.kill()
        process.wait()


@contextmanager
def launch(site: Site, name: str, **more: str) -> Generator[subprocess.Popen[bytes], None, None]:
    """The launcher, on the first host; one rank on each. more: settings of the cluster's job."""
    settings = {"parallel.cpu_processes": "1", **{f"cluster.job.{key}": value for key, value in more.items()}}
    command = [*site.command(name, "launch hostfile", **settings), "--cluster", str(site.cluster_file)]
    with start(site, [*site.hosts[0].prefix, *command], name) as process:
        yield process


def said(site: Site, name: str) -> str:
    return (site.folder / f"{name}.said").read_text(errors="replace")


def until(site: Site, name: str, process: subprocess.Popen[bytes], reached: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, said(site, name)[-6000:]
        time.sleep(0.1)


def test_a_host_that_is_cut_off_for_a_while_changes_nothing(site: Site, reference: Learnt) -> None:
    name = "cut"
    with launch(site, name) as process:
        until(site, name, process, lambda: site.steps_of(name) >= CUT_AT_STEP)
        site.hosts[1].pull_cable()
        try:
            until(site, name, process, lambda: not processes_of_runs(site.hosts[1]), GONE_SECONDS)
            until(site, name, process, lambda: "host2: the connection fell" in said(site, name), 90)
            until(site, name, process, lambda: "node 1 (host2) was lost" in said(site, name), 90)
        finally:
            site.hosts[1].plug_cable()
        assert process.wait(RUN_SECONDS) == 0, said(site, name)[-6000:]
    assert not site.of_runs
    found = learnt(site.run(name))
    assert (found.step, found.state) == (reference.step, reference.state)
    assert found.rows == reference.rows
    causes = [attempt["cause"] for attempt in attempts_of(site.run(name))]
    assert len(causes) == 2 and "node 1 (host2) was lost" in causes[0], causes


def test_the_node_that_decides_is_lost_and_comes_back(site: Site, reference: Learnt) -> None:
    """Its connection ends, and with it its supervisor and its rank; the other host waits for it."""
    name = "first"
    with launch(site, name, doctor="false") as process:
        until(site, name, process, lambda: site.steps_of(name) >= CUT_AT_STEP)
        (connection,) = (one for one in psutil.Process(process.pid).children() if one.name() == "ssh" and "host1" in one.cmdline())
        connection.kill()
        assert process.wait(RUN_SECONDS) == 0, said(site, name)[-6000:]
    assert "host1: the connection fell" in said(site, name) and "node 0 (host1) was lost" in said(site, name)
    assert not site.of_runs
    assert learnt(site.run(name)).state == reference.state


def test_a_launcher_that_is_killed_leaves_no_rank_on_any_host(site: Site) -> None:
    name = "killed"
    with launch(site, name, doctor="false") as process:
        until(site, name, process, lambda: site.steps_of(name) >= 5)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        deadline = time.monotonic() + GONE_SECONDS
        while site.of_runs and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not site.of_runs, [name_of(one) for one in site.of_runs]


def test_a_launch_that_is_stopped_goes_on_where_it_was(site: Site, reference: Learnt) -> None:
    name, before = "stopped", set((site.folder / "scratch").iterdir())
    with launch(site, name, doctor="false") as process:
        until(site, name, process, lambda: site.steps_of(name) >= 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(RUN_SECONDS) == 75, said(site, name)[-6000:]
    assert not site.of_runs
    assert 5 <= int(learnt(site.run(name)).step.removeprefix("step-")) < STEPS
    with launch(site, name, doctor="false") as process:
        assert process.wait(RUN_SECONDS) == 0, said(site, name)[-6000:]
    assert learnt(site.run(name)).state == reference.state
    assert set((site.folder / "scratch").iterdir()) == before


def test_a_host_that_is_not_there_is_named_before_anything_starts(site: Site) -> None:
    name = "absent"
    site.hosts[1].pull_cable()
    try:
        with launch(site, name) as process:
            assert process.wait(60) == 2
    finally:
        site.hosts[1].plug_cable()
    assert "1 of 2 hosts cannot take part, so nothing was started. host2: cannot be reached by ssh" in said(site, name)
    assert not (site.run(name) / "attempts.jsonl").exists()
