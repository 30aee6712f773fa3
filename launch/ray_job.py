"""A launch on a Ray cluster that is there already: its data build, or its training, as one of that cluster's jobs.

In: a `LaunchPlan` whose cluster file has `ray.address`, the address of Ray's job server. Out: the script that the job runs, and its exit
status once it is over. The cluster's nodes have to share the launch's folder. What is secret stays in a file there: what is sent to the
job server can be read by everybody who may look at its dashboard.
"""

import asyncio
import ipaddress
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from configs.cluster import RayOnClusterSection
from configs.errors import EXIT_DEFECT, EXIT_DONE, EXIT_RESUMABLE, UserError
from launch.plan import ENVIRONMENT_FILE, NODE_SCRIPT, LaunchPlan, node_environment, render_node_script
from launch.ray_data import build_command

JOB_SCRIPT = "ray-job.sh"
NOT_FOUND = 127
ANSWER_SECONDS, LOOK_SECONDS = 10.0, 5.0
OPEN_TO_ALL = "CVE-2023-48022"


def render(plan: LaunchPlan) -> dict[str, str]:
    """File name -> text: what the job runs and, for a training, what that runs on each node. Pure."""
    command = build_command(plan) if plan.builds_data else _driver_command(plan)
    folder, source = PurePosixPath(plan.folder), shlex.quote(plan.code.source)
    lines = [
        "#!/usr/bin/env bash",
        f"# The Ray job of launch {plan.launch_id}, on the head; Ray says in RAY_ADDRESS where that is.",
        "set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set",
        *plan.cluster.job.setup,
        f"source {shlex.quote(str(folder / ENVIRONMENT_FILE))}",
        f"cd {source}",
        f"exec {shlex.join(command)}",
    ]
    script = {JOB_SCRIPT: "\n".join(lines) + "\n"}
    return script if plan.builds_data else script | {NODE_SCRIPT: render_node_script(plan)}


def _driver_command(plan: LaunchPlan) -> list[str]:
    job, section = plan.cluster.job, plan.cluster.ray or RayOnClusterSection()
    gpus = plan.processes_per_node if plan.cluster.hardware.gpus_per_node else 0
    command = [job.python, "-m", "launch.ray_train", str(PurePosixPath(plan.folder) / NODE_SCRIPT), "--nodes", str(plan.nodes)]
    command += ["--cpus", str(section.cpus_per_node or 1), "--gpus", str(gpus), "--port", str(job.rendezvous_port)]
    return [*command, "--stop-file", str(PurePosixPath(plan.run_folder) / "STOP")]


def submit(plan: LaunchPlan, say: Callable[[str], None]) -> int:
    """Have the job run, and print what it prints until it is over. Returns its exit status; 0 where the user looks away before.

    Its files are in the launch's folder already. Raises UserError where the job server is not reached, takes no job from us, or would take
    one from anybody, and where the head does not see the launch's folder.
    """
    section = plan.cluster.ray
    if section is None or section.address is None:
        raise UserError(f"the cluster file of {plan.cluster.name} has no ray.address; set it to that of the job server: http://HEAD:8265.")
    _refuse_open_server(section.address)
    client = _connect(section.address)
    job = client.submit_job(
        entrypoint=shlex.join(["bash", str(PurePosixPath(plan.folder) / JOB_SCRIPT)]),
        submission_id=plan.launch_id,
        runtime_env={"env_vars": _told_to_ray(plan)},
    )
    stop = f"ray job stop --address {section.address} {job}"
    say(f"job {job} runs on {section.address}; to stop it: {stop if plan.builds_data else f'pretrain stop {plan.run_folder}'}")
    try:
        asyncio.run(_follow(client, job))
        details = _wait(client, job, say)
    except KeyboardInterrupt:
        say(f"nobody listens any more, and the job goes on; to listen again: ray job logs --address {section.address} --follow {job}")
        say(f"to stop it: {stop}")
        return EXIT_DONE
    return _status_of(plan, details)


def _told_to_ray(plan: LaunchPlan) -> dict[str, str]:
    """Environment of the job and of all its workers; everybody who may look at the dashboard reads it.

    So nothing passed is in it: the job itself has that from its file, and a build's workers have what their nodes were started with, such
    as the hub's HF_TOKEN. `ray job stop` waits for RAY_JOB_STOP_WAIT_TIME_S before it kills.
    """
    return node_environment(plan) | {"RAY_JOB_STOP_WAIT_TIME_S": str(plan.cluster.job.grace_seconds), "RAY_DEDUP_LOGS": "0"}


def _refuse_open_server(address: str) -> None:
    """Ray's job server runs what it is sent. One that others can reach, and that asks for no token, is everybody's."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"ray.address: found {address!r}, wanted that of the job server: http://HEAD:8265.")
    if _is_loopback(parts.hostname):
        return
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise UserError(f"{address} answers {error.code} {error.reason}, as no job server of Ray does; set ray.address to one.") from None
    except OSError as error:
        raise _unreachable(address, str(getattr(error, "reason", error))) from None
    raise UserError(
        f"{address} takes jobs without a token, from everybody who reaches it ({OPEN_TO_ALL}): start that cluster with "
        "RAY_AUTH_MODE=token, or have it listen on the head's 127.0.0.1 alone and reach it by an ssh tunnel."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unreachable(address: str, why: str) -> UserError:
    return UserError(
        f"no job server of Ray is reached at {address}: {why}. Is the head up, with its dashboard (ray[default] installed, not "
        "--include-dashboard=false), and is ray.address the dashboard's, as seen from here?"
    )


def _connect(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = address  # or RAY_ADDRESS, where it is set, would take the place of the cluster file's
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address} refuses us: {str(error).splitlines()[0]}; set RAY_AUTH_MODE=token and, in RAY_AUTH_TOKEN_PATH, a file with that "
            "cluster's token."
        ) from None
    except ConnectionError as error:
        raise _unreachable(address, str(error).rstrip(".")) from None
    except RuntimeError as error:
        raise UserError(f"{address} is no job server that this Ray can use: {error}") from None


async def _follow(client: Any, job: str) -> None:
    """Print what the job prints. Returns at its end, or where the connection falls."""
    try:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)
    except RuntimeError:  # the connection: the job may be well
        return


def _wait(client: Any, job: str, say: Callable[[str], None]) -> Any:
    """What Ray says of a job that is over."""
    details, heard = client.get_job_info(job), time.monotonic()
    while not details.status.is_terminal():
        if time.monotonic() - heard > 60:
            say(f"job {job}: {details.status}, without anything to read from here")
            heard = time.monotonic()
        time.sleep(LOOK_SECONDS)
        details = client.get_job_info(job)
    return details


def _status_of(plan: LaunchPlan, details: Any) -> int:
    """The exit status of what the job ran, as its driver left it."""
    if details.driver_exit_code == NOT_FOUND:
        raise UserError(
            f"the head of the Ray cluster does not see {plan.folder}, or has no {plan.cluster.job.python}; set run.root to a folder that "
            "all its nodes share, and job.python of the cluster file."
        )
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code) if details.driver_exit_code >= 0 else EXIT_DEFECT
    return {"SUCCEEDED": EXIT_DONE, "STOPPED": EXIT_RESUMABLE}.get(str(details.status), EXIT_DEFECT)
