"""Runs on a real Slurm of two nodes that this machine plays: launched, signalled, preempted, cut off, crashing, stopped.

Run by `make cluster-tests` alone (20 minutes). Every run is launched by the verb and looked at by `pretrain status`; what it has learnt at
its end is compared, bit for bit, with a run of two ranks on one machine that nothing happened to.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.slurm_cluster import NODES, SlurmCluster, install, slurm_cluster, wait_until
from tests.faults.trainings import ROOT, Prepared, attempts_of, learnt, prepare, settings_of

pytestmark = pytest.mark.cluster
STEPS = 300
SETTINGS = settings_of(STEPS)
RUN_SECONDS, ASK_SECONDS = 240, 60
VANISHING = """
import os, signal
def vanish(groups, section):
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
"""
"""An optimizer that kills the first node's supervisor."""


@dataclass(frozen=True)
class Launched:
    """A run in the queue."""

    cluster: SlurmCluster
    run: Path
    jobs: tuple[int, ...]

    @property
    def row(self) -> dict[str, Any]:
        """What `pretrain status` says."""
        (row,) = json.loads(pretrain(self.cluster, "status", str(self.run), "--json").stdout)
        return row

    @property
    def job(self) -> dict[str, str]:
        """What Slurm says of the first job."""
        return self.cluster.job(self.jobs[0])

    @property
    def said(self) -> str:
        """What its jobs printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.run.glob("launches/*/slurm-*.log")))

    def wait(self, is_so: Callable[[dict[str, Any]], bool], seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """The first row that is so. Fails with what was printed where it does not come to be."""
        deadline = time.monotonic() + seconds
        while not is_so(row := self.row):
            assert time.monotonic() < deadline, f"{row}\n{self.job}\n{self.said[-3000:]}"
            time.sleep(2)  # looking takes a processor that the run could have
        return row

    def wait_until_it_trains(self) -> dict[str, Any]:
        """Behind its first checkpoints."""
        return self.wait(lambda row: row["state"] == "running" and row["step"] >= 10)


def pretrain(cluster: SlurmCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A verb of the command, as on a login node."""
    command = ["nice", sys.executable, "-m", "pretrain.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=RUN_SECONDS)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Generator[SlurmCluster, None, None]:
    if "cluster" not in request.config.getoption("-m"):
        pytest.skip("a Slurm is made by `make cluster-tests` only")
    if reason := install():
        pytest.skip(reason)
    with slurm_cluster() as made:
        yield made


@pytest.fixture(scope="module")
def prepared(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"), random.Random(1))


@pytest.fixture
def launch(cluster: SlurmCluster, prepared: Prepared, tmp_path: Path) -> Generator[Callable[..., Launched], None, None]:
    """Launches the tiny run, one rank on each node; what is left in the queue at the end is cancelled."""
    (tmp_path / "tiny.yaml").write_text("{}")

    def launch_it(*options: str, nodes: int = 2, doctor: bool = False, settings: dict[str, str] = SETTINGS, path: str = "") -> Launched:
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **({"PYTHONPATH": path} if path else {})}
        job = {"python": sys.executable, "network_interface": "lo", "grace_seconds": 30, "environment": environment, "doctor": doctor}
        described = {"nodes": nodes, "job": job, "slurm": {"partition": "low", "minutes": 30}}
        (tmp_path / "here.yaml").write_text(yaml.dump(described))
        per_node = {"parallel.cpu_processes": str(2 // nodes), "data.root": str(prepared.dataset), "run.root": str(tmp_path / "runs")}
        overrides = [f"{key}={value}" for key, value in {**settings, **per_node}.items()]
        cluster_file = str(tmp_path / "here.yaml")
        ended = pretrain(cluster, "launch", "slurm", str(tmp_path / "tiny.yaml"), *overrides, "--cluster", cluster_file, *options)
        assert ended.returncode == 0, ended.stderr
        run = tmp_path / "runs" / "tiny"
        (jobs_file,) = run.glob("launches/*/jobs.json")
        jobs = tuple(map(int, json.loads(jobs_file.read_text())["jobs"]))
        assert f"pretrain status {run}" in ended.stderr and f"slurm-{jobs[0]}.log" in ended.stderr
        return Launched(cluster, run, jobs)

    yield launch_it
    cluster.ask("scancel", "--user=root")
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), RUN_SECONDS, "jobs are left in the queue")


def check_that_it_learnt_the_same(launched: Launched, prepared: Prepared) -> None:
    """Waits for the end."""
    row = launched.wait(lambda row: row["state"] == "done")
    assert (row["step"], row["committed"], row["why"]) == (STEPS, STEPS, None)
    found, reference = learnt(launched.run), prepared.reference(SETTINGS)
    assert (found.step, found.state) == (reference.step, reference.state)
    assert found.rows == reference.rows


def test_it_trains_to_the_end(launch, prepared):
    launched = launch(doctor=True)
    assert launched.row["state"] in ("queued", "running")
    row = launched.wait_until_it_trains()
    assert (row["attempts"], [job["state"] for job in row["jobs"]]) == (1, ["RUNNING"])
    check_that_it_learnt_the_same(launched, prepared)
    wait_until(lambda: launched.job["JobState"] == "COMPLETED", ASK_SECONDS, launched.said)
    assert (launched.job["ExitCode"], launched.job["Restarts"]) == ("0:0", "0")
    assert "all" in launched.said and "checks passed on 2 nodes" in launched.said
    assert launched.row["jobs"] == [] and launched.row["attempts"] == 1


def check_that_it_saved_and_waits(launched: Launched) -> None:
    row = launched.wait(lambda row: row["state"] == "queued")
    assert launched.job["Restarts"] == "1" and launched.job["JobState"] == "PENDING"
    (attempt,) = attempts_of(launched.run)
    assert (attempt["status"], attempt["stopped"], len(attempt["nodes"])) == (75, True, 2)
    assert row["committed"] == row["step"] == attempt["last_step"] == attempt["committed"] < STEPS
    assert row["why"].startswith(f"job {launched.jobs[0]} waits")


def test_a_signal_before_the_time_ends(launch, cluster, prepared):
    """As `--signal=B:USR2@30` sends it: to the batch script alone."""
    launched = launch()
    launched.wait_until_it_trains()
    cluster.ask("scancel", "--signal=USR2", "--batch", str(launched.jobs[0]))
    check_that_it_saved_and_waits(launched)
    check_that_it_learnt_the_same(launched, prepared)
    assert launched.row["attempts"] == 2


def test_preempted(launch, cluster, prepared):
    launched = launch()
    launched.wait_until_it_trains()
    cluster.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 5")
    check_that_it_saved_and_waits(launched)
    check_that_it_learnt_the_same(launched, prepared)
    assert launched.row["attempts"] == 2


def test_a_node_that_is_lost(launch, cluster, prepared):
    """With all that ran there: Slurm gives the node up and puts the job back by itself, and the other node's part ends."""
    launched = launch()
    launched.wait_until_it_trains()
    cluster.lose_node("n2")
    try:
        launched.wait(lambda row: row["state"] == "queued")
        assert launched.job["Restarts"] == "1"
    finally:
        cluster.start_node("n2")
    check_that_it_learnt_the_same(launched, prepared)
    assert launched.row["attempts"] >= 2


def test_a_loop_of_crashes_ends(launch, cluster, tmp_path):
    """Killed before its first step each time, the first node's supervisor cannot even say so: the next one counts for it."""
    (tmp_path / "vanishing.py").write_text(VANISHING)
    settings = {**SETTINGS, "optimizer.kind": "vanishing:vanish", "run.attempts_in_vain": "2"}
    launched = launch("--code", "here", settings=settings, path=f"{ROOT}:{tmp_path}")
    row = launched.wait(lambda row: row["state"] == "failed" or launched.job["JobState"] == "FAILED", 2 * RUN_SECONDS)
    assert (row["step"], row["committed"]) == (0, 0)
    wait_until(lambda: launched.job["JobState"] == "FAILED", ASK_SECONDS, launched.said)
    assert launched.job["ExitCode"] == "1:0"
    vanished = [attempt["end"] for attempt in attempts_of(launched.run)]
    assert vanished == [None, None]
    assert "no other one is made" in launched.said


def test_stopped_by_the_verb(launch, cluster):
    """The run is saved; neither its job nor those behind it go on; started again, it does."""
    launched = launch("--chain", "3")
    launched.wait_until_it_trains()
    assert [job["state"] for job in launched.row["jobs"]] == ["RUNNING", "PENDING", "PENDING"]
    ended = pretrain(cluster, "stop", str(launched.run))
    assert ended.returncode == 0, ended.stderr
    row = launched.row
    assert (row["state"], row["jobs"]) == ("stopped", []) and 10 <= row["committed"] == row["step"] < STEPS
    assert f"step {row['step']:,} of {STEPS}" in ended.stderr
    wait_until(lambda: launched.job["JobState"] == "FAILED", ASK_SECONDS, launched.said)
    assert launched.job["ExitCode"] == "75:0" and launched.job["Restarts"] == "0"
    assert [cluster.job(number)["JobState"] for number in launched.jobs[1:]] == ["CANCELLED", "CANCELLED"]
    again = pretrain(cluster, "stop", str(launched.run))
    assert again.returncode == 0 and "nothing to stop" in again.stderr


def test_a_chain_of_jobs(launch, cluster, prepared):
    """The second one goes on where the first was stopped, and the third finds nothing left to do."""
    launched = launch("--chain", "3")
    launched.wait_until_it_trains()
    cluster.ask("scancel", "--signal=USR2", "--batch", str(launched.jobs[0]))
    check_that_it_learnt_the_same(launched, prepared)
    wait_until(lambda: cluster.job(launched.jobs[2])["JobState"] == "COMPLETED", ASK_SECONDS, launched.said)
    jobs = [cluster.job(number) for number in launched.jobs]
    assert [(job["JobState"], job["ExitCode"]) for job in jobs] == [("FAILED", "75:0"), ("COMPLETED", "0:0"), ("COMPLETED", "0:0")]
    assert launched.row["attempts"] == 2 and "nothing is left to do" in launched.said


def test_what_is_cancelled_does_not_come_back(launch, cluster):
    launched = launch()
    launched.wait_until_it_trains()
    cluster.ask("scancel", str(launched.jobs[0]))
    row = launched.wait(lambda row: row["state"] == "stopped")
    assert row["committed"] == row["step"] < STEPS
    wait_until(lambda: launched.job["JobState"] == "CANCELLED", ASK_SECONDS, launched.said)
    assert launched.job["Restarts"] == "0" and launched.row["jobs"] == []


def test_a_bad_node_is_not_taken_again(launch, cluster, prepared):
    launched = launch(nodes=1)
    launched.wait_until_it_trains()
    bad = launched.job["NodeList"]
    (folder,) = launched.run.glob("launches/*")
    (folder / "bad-nodes").write_text(f"{bad}.cluster.example\n")
    cluster.ask("scancel", "--signal=USR2", "--batch", str(launched.jobs[0]))
    check_that_it_learnt_the_same(launched, prepared)
    assert launched.job["ExcNodeList"] == bad
    assert launched.job["NodeList"] in set(NODES) - {bad}
