"""Launches on real Ray clusters: a training on two hosts one of which is lost, and a data build inside an allocation of a real Slurm.

Run by `make cluster-tests` alone. What is made (namespaces, daemons, processes, folders) is gone at the end.
"""

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.cluster import ClusterConfig
from configs.data_section import DataSection, TokenizerSection
from launch import ray_data, ray_job
from launch.plan import Code, LaunchPlan, launch_folder, plan_launch, resolve_run
from launch.slurm import submit
from launch.snapshot import as_copy, own_files, write_launch
from pretrain.checkpoint.index import state_hash
from pretrain.checkpoint.verify import list_commits, newest_step, read_commit
from tests.faults.builds import QUIET, ROOT, differences, kill_all, members_of, name_of, reference_of, snapshot
from tests.faults.corpora import describe_build, write_corpora
from tests.faults.rules import PAUSE_SECONDS
from tests.faults.slurm_cluster import install, slurm_cluster
from tests.faults.test_hosts import PORT, ray_on
from tests.faults.trainings import attempts_of, settings_of, training
from tests.faults.two_hosts import Host, reason_to_skip, two_hosts
from tests.tiny import write_tiny_dataset
from tests.training import tiny_config

pytestmark = pytest.mark.cluster
STEPS, RUN_SECONDS = 150, 400


@pytest.fixture(scope="module", autouse=True)
def _asked_for(request: pytest.FixtureRequest) -> None:
    if "cluster" not in str(request.config.getoption("-m")):
        pytest.skip("clusters are made by `make cluster-tests` only")
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture(name="folder")
def _folder() -> Generator[Path, None, None]:
    """Short: Ray puts sockets below it."""
    folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    (folder / "hosts").mkdir()
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def plan_training(folder: Path, **settings: str) -> LaunchPlan:
    """Two nodes with one rank each, on the data in `folder`; its files are written."""
    cluster = ClusterConfig.model_validate(
        {
            "name": "two-hosts",
            "nodes": 2,
            "job": {"python": sys.executable, "network_interface": "cable", "environment": QUIET, "doctor": False},
            "ray": {"cpus_per_node": 1},
        }
    )
    config = tiny_config(folder / "data", folder / "runs", **{**settings, "run.name": "tiny", "parallel.processes": "1"})
    config = resolve_run(config, cluster, str(folder))
    files = launch_folder(config, "on-ray")
    code = as_copy(Code(str(ROOT), None, None), files)
    plan = plan_launch("ray", config, cluster, code, launch_id="on-ray", folder=files, shell_environment={})
    write_launch(plan, own_files(plan, {}) | ray_job.render(plan))
    return plan


@contextmanager
def job_on(host: Host, plan: LaunchPlan, environment: dict[str, str]) -> Generator[subprocess.Popen[bytes], None, None]:
    """What Ray's job server would start on the head; what it says is in `said.txt`."""
    with Path(plan.folder, "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [*host.prefix, "bash", str(Path(plan.folder) / ray_job.JOB_SCRIPT)],
            env={**os.environ, **QUIET, **environment},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        members = members_of(process.pid)
        process.kill()
        process.wait()
        kill_all(members)


def wait_for(is_so: Callable[[], Any], seconds: float, said: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, said.read_text(errors="replace")[-5000:]
        time.sleep(0.1)


def final_state(checkpoints: Path) -> str:
    return state_hash(read_commit(list_commits(checkpoints)[0]))


def test_a_training_goes_on_when_a_host_is_lost_and_ends_with_the_same_bits(folder: Path):
    """The raylet of the second host is killed in the middle, and with it the host's supervisor and rank; then it comes back."""
    write_tiny_dataset(folder / "data")
    settings = settings_of(STEPS)
    with training(folder / "data", folder / "undisturbed", settings) as alone:
        assert alone.wait(RUN_SECONDS) == 0
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    plan = plan_training(folder, **settings)
    run = Path(plan.run_folder)
    said = Path(plan.folder) / "said.txt"
    with two_hosts() as hosts, ray_on(hosts[0], hosts[0], folder, environment), ExitStack() as second:
        session = second.enter_context(ray_on(hosts[1], hosts[0], folder, environment))
        with job_on(hosts[0], plan, {**environment, "RAY_ADDRESS": f"{hosts[0].address}:{PORT}"}) as job:
            wait_for(lambda: newest_step(run / "checkpoints") >= 10 or job.poll() is not None, RUN_SECONDS, said)
            assert job.poll() is None, said.read_text(errors="replace")[-5000:]
            (raylet,) = (one for one in members_of(session) if Path(name_of(one).split(" ")[0]).name == "raylet")
            raylet.kill()
            wait_for(lambda: not ours_on(hosts[1]), 30, said)
            assert newest_step(run / "checkpoints") < STEPS, "it was over before the kill"
            second.close()
            second.enter_context(ray_on(hosts[1], hosts[0], folder, environment))
            assert job.wait(RUN_SECONDS) == 0, said.read_text(errors="replace")[-5000:]
            wait_for(lambda: not ours_on(hosts[0]) + ours_on(hosts[1]), 30, said)
    assert final_state(run / "checkpoints") == final_state(folder / "undisturbed" / "runs" / "tiny" / "checkpoints")
    attempts = attempts_of(run)
    assert len(attempts) >= 2 and {row["launch"] for row in attempts} == {"on-ray"}, attempts
    assert attempts[-1]["status"] == 0 and attempts[-1]["num_processes"] == 2, attempts


def test_a_supervisor_that_is_killed_is_started_again_and_its_exit_status_is_kept(folder: Path):
    """The node's script is a stand-in: killed the first time, stopped early the second."""
    script = folder / "node.sh"
    script.write_text(f'echo "$@ ${{RANK:-}}" >>{folder}/started\n[ "$(wc -l <{folder}/started)" -gt 1 ] || kill -KILL $$\nexit 75\n')
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "PYTHONPATH": str(ROOT)}
    with two_hosts() as hosts, ray_on(hosts[0], hosts[0], folder, environment):
        driver = [sys.executable, "-m", "launch.ray_train", str(script), "--nodes", "1", "--stop-file", str(folder / "STOP")]
        where = {"RAY_ADDRESS": f"{hosts[0].address}:{PORT}"}
        ended = subprocess.run(
            [*hosts[0].prefix, *driver], env={**os.environ, **QUIET, **environment, **where}, capture_output=True, timeout=RUN_SECONDS
        )
    assert ended.returncode == 75, ended
    assert (folder / "started").read_text() == f"0 {hosts[0].address}:29400 \n" * 2


def ours_on(host: Host) -> list[psutil.Process]:
    """Supervisors and ranks on a host."""
    return [one for one in host.processes if any(word.startswith("pretrain.") for word in arguments_of(one))]


def arguments_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# --- by a job server ---------------------------------------------------------------------------------------


def test_a_job_server_runs_a_training_and_ends_it_politely(folder: Path):
    """The whole command, from another host: `ray job stop` has it saved and ends with 75, the next launch goes on."""
    pytest.importorskip("aiohttp_cors", reason="a job server needs ray[default] (the extra ray-jobs)")
    write_tiny_dataset(folder / "data")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    run = folder / "runs" / "tiny"
    with two_hosts() as hosts:
        server = f"http://{hosts[0].name}:8265"
        job = {"python": sys.executable, "network_interface": "cable", "environment": QUIET, "doctor": False}
        (folder / "cluster.yaml").write_text(json.dumps({"name": "ray", "job": job, "ray": {"address": server}}))
        (folder / "tiny.yaml").write_text("{}")
        dashboard = ("--include-dashboard=true", f"--dashboard-host={hosts[0].address}")
        with ray_on(hosts[0], hosts[0], folder, environment, dashboard):
            (folder / "other").write_text("0" * 64)
            with launched(hosts[1], folder, {**environment, "RAY_AUTH_TOKEN_PATH": str(folder / "other")}) as refused:
                assert refused.wait(RUN_SECONDS) == 2
            assert "refuses us" in (folder / "launched.txt").read_text()
            with launched(hosts[1], folder, environment) as first:
                wait_for(lambda: newest_step(run / "checkpoints") >= 5 or first.poll() is not None, RUN_SECONDS, folder / "launched.txt")
                name = json.loads((run / "lease.json").read_text())["launch"]
                stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "--address", server, name]
                subprocess.run([*hosts[1].prefix, *stop], env={**os.environ, **environment}, check=True, timeout=RUN_SECONDS)
                assert first.wait(RUN_SECONDS) == 75, (folder / "launched.txt").read_text()[-5000:]
            (attempt,) = attempts_of(run)
            assert attempt["status"] == 75 and attempt["committed"] == attempt["last_step"] < STEPS, attempt
            with launched(hosts[1], folder, environment) as second:
                assert second.wait(RUN_SECONDS) == 0, (folder / "launched.txt").read_text()[-5000:]
    assert newest_step(run / "checkpoints") == STEPS
    assert "held out" in (folder / "launched.txt").read_text(), "the job's log is followed"


@contextmanager
def launched(host: Host, folder: Path, environment: dict[str, str]) -> Generator[subprocess.Popen[bytes], None, None]:
    """`pretrain launch ray` on a host; what it says is in `launched.txt`."""
    given = {**settings_of(STEPS), "data.root": folder / "data", "run.root": folder / "runs", "run.name": "tiny", "parallel.processes": 1}
    command = [sys.executable, "-m", "pretrain.cli", "launch", "ray", str(folder / "tiny.yaml"), "--cluster", str(folder / "cluster.yaml")]
    with (folder / "launched.txt").open("wb") as said:
        process = subprocess.Popen(
            [*host.prefix, *command, *(f"{key}={value}" for key, value in given.items())],
            cwd=ROOT,
            env={**os.environ, **QUIET, **environment},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        members = members_of(process.pid)
        process.kill()
        process.wait()
        kill_all(members)


# --- inside an allocation ----------------------------------------------------------------------------------


def test_a_build_inside_an_allocation_is_requeued_and_makes_the_bytes_of_one_machine(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The signal before the time limit comes in the middle of the build: it ends with 75, the job begins again, and goes on."""
    if reason := install():
        pytest.skip(reason)
    corpora = write_corpora(folder / "corpora", random.Random(1))
    tokenizer = TokenizerSection(vocabulary_size=300, training_bytes=60_000)
    reference = reference_of(describe_build(corpora, folder / "reference", tokenizer=tokenizer))
    with slurm_cluster() as slurm:
        monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        plan, data = plan_build(folder, describe_build(corpora, folder / "built", workers=None, tokenizer=tokenizer))
        assert submit(plan, print) == 0
        number = int(json.loads(Path(plan.folder, "jobs.json").read_text())["jobs"][0])
        said = Path(plan.folder, f"slurm-{number}.log")
        units = Path(data.folder()) / "units"
        wait_for(lambda: len(list(units.glob("[0-9]*"))) >= 3 or slurm.job(number)["JobState"] == "FAILED", RUN_SECONDS, said)
        assert slurm.job(number)["JobState"] == "RUNNING", said.read_text(errors="replace")[-5000:]
        token = Path(plan.folder, ray_data.TOKEN_FILE)
        assert token.stat().st_mode & 0o777 == 0o600 and len(first_token := token.read_text()) == 64
        slurm.ask("scancel", "--signal=USR2", "--batch", str(number))
        wait_for(lambda: slurm.job(number)["Restarts"] == "1", RUN_SECONDS, said)
        assert not Path(data.folder(), "manifest.json").exists(), "it was over before the signal"
        wait_for(lambda: slurm.job(number)["JobState"] == "COMPLETED", RUN_SECONDS, said)
        assert not [one for one in slurm.left() if "ray" in " ".join(arguments_of(one))]
    assert not differences(snapshot(Path(data.folder())), reference)
    assert token.read_text() != first_token
    assert first_token not in said.read_text(errors="replace")
    assert said.read_text(errors="replace").count("Ray runtime started") == 4, "two nodes, two times"


def plan_build(folder: Path, data: DataSection) -> tuple[LaunchPlan, DataSection]:
    """Two nodes with one CPU each, slow enough to be stopped in the middle; its files are written."""
    cluster = ClusterConfig.model_validate(
        {
            "name": "slurm",
            "nodes": 2,
            "job": {"python": sys.executable, "network_interface": "lo", "environment": {**QUIET, PAUSE_SECONDS: "0.1"}},
            "ray": {"cpus_per_node": 1},
            "slurm": {"exclusive": False, "minutes": 30},
        }
    )
    config = tiny_config(folder / "data", folder / "runs", **{"run.name": "tiny"}).model_copy(update={"data": data})
    config = resolve_run(config, cluster, str(folder))
    files = launch_folder(config, "build")
    code = Code(str(ROOT), None, None)
    plan = plan_launch("slurm", config, cluster, code, launch_id="build", folder=files, shell_environment={}, builds_data=True)
    write_launch(plan, own_files(plan, {}) | ray_data.render_slurm_data(plan))
    return plan, config.data
