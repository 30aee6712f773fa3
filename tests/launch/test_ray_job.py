"""Launches on Ray: what is rendered, what the job server is sent, and which servers are refused.

A real cluster with two hosts is in tests/faults/test_ray_cluster.py; a real Slurm, too.
"""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from aiohttp import web

from configs.cluster import (
    ClusterConfig,
    ContainerSection,
    HardwareSection,
    JobSection,
    KubernetesSection,
    RayOnClusterSection,
    SlurmSection,
    VolumeSection,
)
from configs.errors import UserError
from launch.plan import Code, LaunchPlan, render_environment
from launch.ray_data import build_command, render_kubernetes_data, render_slurm_data
from launch.ray_job import JOB_SCRIPT, render, submit

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TOKEN = "f3" * 32
HOSTILE = {"COMMAS": "a,b;c", "QUOTES": 'it\'s "so"', "DOLLAR": "$HOME $(touch x) `touch y`", "LINES": "one\ntwo"}


def plan_of(**changes: Any) -> LaunchPlan:
    """A launch on a cluster that has a section for everything."""
    cluster = ClusterConfig(
        name="test",
        nodes=2,
        hardware=HardwareSection(gpu="H100", gpus_per_node=8, cpus_per_node=64),
        job=JobSection(setup=("module load cuda",), shared_folders=("/shared",), scratch="/scratch"),
        slurm=SlurmSection(partition="cpu", minutes=60),
        kubernetes=KubernetesSection(
            image="registry/pretrain:1", volumes=(VolumeSection(claim="work", path="/shared"),), resources={"cpu": "32", "memory": "64Gi"}
        ),
        ray=RayOnClusterSection(address="http://head:8265", cpus_per_node=32),
    )
    plan = LaunchPlan(
        kind="ray",
        launch_id="20261123-abc",
        run_name="my_run",
        run_folder="/shared/runs/my run",
        folder="/shared/runs/my run/launches/20261123-abc",
        nodes=2,
        processes_per_node=8,
        cluster=cluster,
        code=Code(source="/shared/it's code", commit="0" * 40, changes_sha256=None),
        configuration="data:\n  workers: null\n",
    )
    return replace(plan, **changes)


def with_cluster(plan: LaunchPlan, **sections: Any) -> LaunchPlan:
    return replace(plan, cluster=plan.cluster.model_copy(update=sections))


RENDERED: dict[str, Callable[[], dict[str, str]]] = {
    "ray-training": lambda: render(plan_of()),
    "ray-data": lambda: render(plan_of(builds_data=True)),
    "ray-slurm": lambda: render_slurm_data(plan_of(builds_data=True)),
    "ray-slurm-chain": lambda: render_slurm_data(with_cluster(plan_of(builds_data=True, chain=3), ray=None, hardware=HardwareSection())),
    "ray-slurm-apptainer": lambda: render_slurm_data(
        with_cluster(plan_of(builds_data=True), container=ContainerSection(runtime="apptainer", image="/shared/image.sif"))
    ),
    "ray-kubernetes": lambda: render_kubernetes_data(plan_of(builds_data=True)),
}


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_rendered_is_as_it_was(name):
    """The files are for people, too: a change is looked at. `UPDATE_GOLDEN=1` writes them anew."""
    for file, text in RENDERED[name]().items():
        golden = HERE / "golden" / f"{name}-{file}"
        if os.environ.get("UPDATE_GOLDEN"):
            golden.write_text(text)
        assert text == golden.read_text(), golden


@pytest.mark.parametrize("name", RENDERED)
def test_scripts_have_nothing_that_shellcheck_finds(name):
    for file, text in RENDERED[name]().items():
        if not file.endswith(".sh"):
            continue
        command = [str(Path(sys.executable).with_name("shellcheck")), "--exclude=SC1091", "-"]
        checked = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
        assert checked.returncode == 0, f"{name} {file}\n{checked.stdout}"


# --- the build's command -----------------------------------------------------------------------------------


def test_a_build_uses_the_cpus_of_all_nodes_unless_the_run_file_says_how_many():
    assert build_command(plan_of())[-1] == "data.workers=64"
    assert build_command(plan_of(configuration="data:\n  workers: 5\n"))[-1] == plan_of().run_file
    unknown = with_cluster(plan_of(), ray=None, hardware=HardwareSection())
    assert build_command(unknown)[-1] == unknown.run_file
    assert build_command(unknown, "$CPUS")[-1] == "data.workers=$CPUS"


def test_the_job_script_carries_any_environment_and_keeps_the_exit_status(tmp_path):
    """Run for real: `python` is a script that says what it got."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$PWD" "$@" "$COMMAS" "$QUOTES" "$DOLLAR" "$LINES" >"$SAID"\nexit 75\n')
    python.chmod(0o755)
    folder = tmp_path / "it's $HOME; a folder"
    folder.mkdir()
    (folder / "environment").write_text(render_environment({**HOSTILE, "SAID": str(tmp_path / "said")}))
    plan = with_cluster(
        plan_of(builds_data=True, folder=str(folder), code=Code(str(folder), None, None)), job=JobSection(python=str(python))
    )
    (folder / JOB_SCRIPT).write_text(render(plan)[JOB_SCRIPT])
    assert subprocess.run(["bash", str(folder / JOB_SCRIPT)], timeout=30).returncode == 75
    said = (tmp_path / "said").read_text().split("\0")[:-1]
    assert said == [str(folder), "-m", "pretrain.cli", "data", "build", f"{folder}/run.yaml", "data.workers=64", *HOSTILE.values()]
    assert not list(folder.glob("[xy]"))


# --- Kubernetes --------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """As `kubectl --validate=strict` reads it: no field that the schema does not have."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found and found.get("type") == "object":
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    found = strict(json.loads((HERE / "schemas" / "rayjob.json").read_text()))
    found["properties"]["metadata"] = {"type": "object"}  # what every object has: not KubeRay's to say
    found["definitions"]["pod"]["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(found)


def manifests(plan: LaunchPlan) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render_kubernetes_data(plan)["rayjob.yaml"]))


@pytest.mark.parametrize("nodes", [1, 2, 9])
def test_the_rayjob_is_what_kuberay_takes(schema, nodes):
    configuration, job = manifests(plan_of(builds_data=True, nodes=nodes))
    assert not list(schema.iter_errors(job))
    spec = job["spec"]["rayClusterSpec"]
    assert 1 + sum(group["replicas"] for group in spec.get("workerGroupSpecs", [])) == nodes
    assert job["spec"]["shutdownAfterJobFinishes"] and spec["authOptions"] == {"mode": "token"}
    assert configuration["data"]["run.yaml"] == plan_of().configuration


def test_a_field_that_kuberay_does_not_know_would_be_found(schema):
    _, job = manifests(plan_of(builds_data=True))
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["comand"] = ["true"]
    job["spec"]["shutdownAfterJobFinished"] = True
    assert len(list(schema.iter_errors(job))) == 2


def test_a_build_in_pods_takes_no_gpus_and_no_secret_by_value():
    section = KubernetesSection(image="registry/pretrain:1", secrets={"HF_TOKEN": ("hub", "key")})
    plan = with_cluster(plan_of(builds_data=True), kubernetes=section)
    _, job = manifests(plan)
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "key"}}} in container["env"]


def test_kubernetes_and_slurm_need_their_sections():
    plan = plan_of(builds_data=True)
    with pytest.raises(UserError, match="no kubernetes: section"):
        render_kubernetes_data(with_cluster(plan, kubernetes=None))
    with pytest.raises(UserError, match="WANDB_API_KEY would be passed"):
        render_kubernetes_data(replace(plan, passed=("WANDB_API_KEY",)))
    with pytest.raises(UserError, match="no slurm: section"):
        render_slurm_data(with_cluster(plan, slurm=None))


# --- the job server ----------------------------------------------------------------------------------------


class Server:
    """Answers as Ray's job server does (ray/dashboard/modules/job), to those who have the token, if it wants one."""

    def __init__(self, token: str | None, ends: dict[str, Any]) -> None:
        self.token, self.ends, self.jobs = token, ends, list[dict[str, Any]]()

    @web.middleware
    async def check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.token is not None and "authorization" not in request.headers:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token is not None and request.headers["authorization"] != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"})

    async def listed(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def take(self, request: web.Request) -> web.Response:
        self.jobs.append(await request.json())
        return web.json_response({"submission_id": self.jobs[-1]["submission_id"], "job_id": "1"})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        await answer.send_str("what the job prints\n")
        await answer.close()
        return answer

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"type": "SUBMISSION", "entrypoint": "x", "submission_id": request.match_info["job"], **self.ends})


@contextmanager
def serving(token: str | None = TOKEN, **ends: Any) -> Generator[tuple[Server, int], None, None]:
    """A job server on a port of its own, of all interfaces."""
    server, started, found = Server(token, ends), threading.Event(), list[Any]()

    async def serve() -> None:
        app = web.Application(middlewares=[server.check])
        app.add_routes([web.get("/api/version", server.version), web.get("/api/jobs/", server.listed), web.post("/api/jobs/", server.take)])
        app.add_routes([web.get("/api/jobs/{job}/logs/tail", server.tail), web.get("/api/jobs/{job}", server.info)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "0.0.0.0", 0)
        await site.start()
        over = asyncio.Event()
        found.extend([site._server.sockets[0].getsockname()[1], asyncio.get_running_loop(), over])  # type: ignore[union-attr]
        started.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield server, found[0]
    finally:
        found[1].call_soon_threadsafe(found[2].set)
        thread.join()


def submit_apart(address: str, tmp_path: Path, token: str | None) -> subprocess.CompletedProcess[str]:
    """`submit` in a process of its own: Ray reads its token once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RAY_ADDRESS": "http://not-this-one:1", "RAY_AUTH_MODE": "disabled"}
    if token is not None:
        file = tmp_path / "token"
        file.touch(stat.S_IRUSR | stat.S_IWUSR)
        file.write_text(token)
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    code = (
        "import sys; from tests.launch.test_ray_job import *\n"
        "plan = with_cluster(plan_of(environment={'PLACE': 'here'}), ray=RayOnClusterSection(address=sys.argv[1]))\n"
        "try: sys.exit(submit(plan, print))\n"
        "except UserError as error: sys.exit(f'error: {error}')"
    )
    command = [sys.executable, "-c", code, address]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 75, 75), ("STOPPED", None, 75), ("FAILED", -9, 1)],
)
def test_a_job_is_submitted_and_followed_and_its_exit_status_is_kept(tmp_path, status, exit_code, expected):
    with serving(status=status, driver_exit_code=exit_code) as (server, port):
        ended = submit_apart(f"http://{socket.gethostname()}:{port}", tmp_path, TOKEN)
    assert ended.returncode == expected, ended
    assert "what the job prints\n" in ended.stdout and "pretrain stop" in ended.stdout
    (job,) = server.jobs
    assert job["submission_id"] == "20261123-abc"
    assert job["entrypoint"] == "bash '/shared/runs/my run/launches/20261123-abc/ray-job.sh'"
    told = job["runtime_env"]["env_vars"]
    assert (told["PLACE"], told["PYTHONPATH"], told["RAY_JOB_STOP_WAIT_TIME_S"]) == ("here", "/shared/it's code", "120")
    assert TOKEN not in json.dumps(job) + ended.stdout + ended.stderr


def test_a_folder_that_the_head_does_not_see_is_named(tmp_path):
    with serving(status="FAILED", driver_exit_code=127) as (_, port):
        ended = submit_apart(f"http://127.0.0.1:{port}", tmp_path, TOKEN)
    assert ended.returncode == 1 and "does not see /shared/runs/my run/launches" in ended.stderr, ended


def test_a_server_that_takes_jobs_from_everybody_is_refused(tmp_path):
    with serving(token=None, status="SUCCEEDED", driver_exit_code=0) as (server, port):
        ended = submit_apart(f"http://{socket.gethostname()}:{port}", tmp_path, None)
        assert "without a token" in ended.stderr and "CVE-2023-48022" in ended.stderr and not server.jobs, ended
        assert submit_apart(f"http://127.0.0.1:{port}", tmp_path, None).returncode == 0  # nobody else reaches that


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "another"])
def test_who_has_no_token_is_told_how_to_give_it(tmp_path, token):
    with serving() as (server, port):
        ended = submit_apart(f"http://127.0.0.1:{port}", tmp_path, token)
    assert "refuses us" in ended.stderr and "RAY_AUTH_TOKEN_PATH" in ended.stderr and not server.jobs, ended


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://{host}:{port}", "no job server of Ray is reached"),
        ("http://no-such-host.invalid:8265", "no job server of Ray is reached"),
        ("ray://head:10001", "wanted that of the job server"),
        ("head:8265", "wanted that of the job server"),
    ],
)
def test_an_address_that_is_none_is_refused(address, words):
    with socket.socket() as unused:
        unused.bind(("", 0))
        address = address.format(port=unused.getsockname()[1], host=socket.gethostname())
        with pytest.raises(UserError, match=words):
            submit(with_cluster(plan_of(), ray=RayOnClusterSection(address=address)), print)


def test_a_server_that_is_not_running_is_said(tmp_path):
    with socket.socket() as unused:
        unused.bind(("", 0))
        ended = submit_apart(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, TOKEN)
    assert "no job server of Ray is reached" in ended.stderr, ended


def test_a_cluster_file_without_an_address_is_refused():
    with pytest.raises(UserError, match=r"has no ray\.address"):
        submit(with_cluster(plan_of(), ray=None), print)
