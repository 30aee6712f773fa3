"""The data build on a Ray cluster that a launch makes for it: inside a Slurm allocation, or by KubeRay.

In: a `LaunchPlan` that builds data. Out: a batch script and what it runs on each node, or a RayJob manifest. Ray asks for a token
everywhere, its dashboard is off where nobody needs it, and it ends with the build, which goes on by itself when it is started again.

`ray stop` and `ray symmetric-run` are not used: they end every Ray on a machine, also that of another job.
"""

import shlex
from dataclasses import replace
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml

from configs.cluster import HardwareSection, KubernetesSection, RayOnClusterSection
from configs.errors import UserError
from launch.kubernetes import DATA_MANIFESTS, check_secrets, configuration_map, object_name, write_manifests
from launch.kubernetes_pod import CONFIGURATION_FOLDER, labels, template
from launch.plan import ENVIRONMENT_FILE, LaunchPlan
from launch.slurm import JOB_SCRIPT, LAST_SECONDS, options, srun

NODE_SCRIPT, TOKEN_FILE, ADDRESS_FILE = "ray-node.sh", "ray-token", "ray-address"
OBJECT_STORE_BYTES = 1_000_000_000
"""Of a node: only records travel through Ray, shards go straight to the disk."""
PORTS = 1000
"""Two jobs that share a node have two ports of so many."""
RAY = "ray.scripts.scripts"
"""The command `ray`, by its module: the interpreter is the one that has this project."""


def build_command(plan: LaunchPlan, cpus: str | None = None) -> list[str]:
    """`pretrain data build`. Where the run file leaves `data.workers` open, it would count what has joined when it begins.

    cpus: of all nodes, in the shell's words, where the cluster file does not tell how many a node has.
    """
    section, hardware = plan.cluster.ray or RayOnClusterSection(), plan.cluster.hardware
    command = [plan.cluster.job.python, "-m", "pretrain.cli", "data", "build", plan.run_file]
    per_node = section.cpus_per_node or hardware.cpus_per_node
    workers = str(plan.nodes * per_node) if per_node else cpus
    is_open = (yaml.safe_load(plan.configuration) or {}).get("data", {}).get("workers") is None
    return [*command, f"data.workers={workers}"] if is_open and workers else command


# --- Slurm -------------------------------------------------------------------------------------------------


def render_slurm_data(plan: LaunchPlan) -> dict[str, str]:
    """File name -> text: `job.sh`, submitted as a training's is (`launch.slurm.submit`), and `ray-node.sh`, which it runs on each node.

    Raises UserError without a `slurm:` section.
    """
    return {JOB_SCRIPT: _job_script(plan), NODE_SCRIPT: _node_script(plan)}


def _job_script(plan: LaunchPlan) -> str:
    slurm = plan.cluster.slurm
    if slurm is None:
        raise UserError(f"the cluster file of {plan.cluster.name} has no slurm: section; add one, or take another kind of launch.")
    node = shlex.quote(str(PurePosixPath(plan.folder) / NODE_SCRIPT))

    # A worker that is lost ends nothing: no task is ended because another one has.
    words = srun(plan).removeprefix("srun ").replace(f"--wait={LAST_SECONDS}", "--wait=0")

    def step(options: str, role: str) -> str:
        return f"srun {options} \\\n    {words} \\\n    bash {node} {role} &"

    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {option}" for option in options(plan, slurm)),
            "",
            f"# The data build of launch {plan.launch_id}, on a Ray cluster that lives as long as this job.",
            "set -uo pipefail",
            f"folder={shlex.quote(plan.folder)}",
            f'rm -f "$folder/{TOKEN_FILE}" "$folder/{ADDRESS_FILE}" # of the time before a requeue',
            "# Whoever has the token may run what he likes here: each start has another one, and only its owner can read it.",
            f"(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >\"$folder/{TOKEN_FILE}\")",
            "",
            "# Slurm's signal before the time ends reaches this script alone; srun hands it on. A cancelled job is told everywhere.",
            'trap \'[ -z "${step:-}" ] || kill -USR2 "$step"\' USR2',
            "trap : TERM",
            "# A node that is lost ends nothing here: what it had in hand is done by the others.",
            "others=$((SLURM_JOB_NUM_NODES - 1))",
            "if ((others > 0)); then",
            step('--nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" --no-kill', "worker"),
            "fi",
            step('--nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME"', "head"),
            "step=$!",
            'while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait` too',
            'wait "$step"',
            "status=$?",
            *(_REQUEUE if plan.chain == 1 else ()),
            'exit "$status" # and with this script, Slurm ends the workers',
            "",
        ]
    )


_REQUEUE = (
    "# Stopped early. A job that was cancelled is not RUNNING any more, and a requeue would bring it back.",
    'if [ "$status" -eq 75 ] && [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") =~ JobState=RUNNING|Reason=TimeLimit ]]; then',
    "    trap '' TERM # the requeue ends this script, too",
    '    scontrol requeue "$SLURM_JOB_ID"',
    "fi",
)


def _node_script(plan: LaunchPlan) -> str:
    section, job = plan.cluster.ray or RayOnClusterSection(), plan.cluster.job
    folder, python = PurePosixPath(plan.folder), shlex.quote(job.python)
    token, address = (shlex.quote(str(folder / name)) for name in (TOKEN_FILE, ADDRESS_FILE))
    cpus = section.cpus_per_node or '"$SLURM_CPUS_ON_NODE"'
    all_cpus = "$((SLURM_JOB_NUM_NODES * SLURM_CPUS_ON_NODE))"
    build = " ".join(f'"{word}"' if all_cpus in word else shlex.quote(word) for word in build_command(plan, all_cpus))
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Ray on one node of launch {plan.launch_id}, and on the head the build: bash {NODE_SCRIPT} head|worker",
            "set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set",
            *job.setup,
            f"source {shlex.quote(str(folder / ENVIRONMENT_FILE))}",
            f"cd {shlex.quote(plan.code.source)}",
            f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} RAY_USAGE_STATS_ENABLED=0",
            "",
            "# A name that nobody can foresee, and short: Ray puts sockets below it, whose paths have at most 107 bytes.",
            f"scratch=$(mktemp -d {shlex.quote(f'{job.scratch}/r-XXXXXX')})",
            "trap exit INT TERM",
            "trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf \"$scratch\"' EXIT",
            "trap '' USR2 # Slurm's signal to stop is for the build alone: Ray would end under it",
            "start_ray() {",
            f'    {python} -m {RAY} start "$@" --temp-dir="$scratch/t" --num-cpus={cpus} --num-gpus=0 \\',
            f"        --object-store-memory={OBJECT_STORE_BYTES} --disable-usage-stats --block &",
            "}",
            "",
            f"address={address}",
            'if [ "$1" = worker ]; then',
            '    until [ -s "$address" ]; do sleep 1; done',
            '    start_ray --address="$(cat "$address")"',
            '    wait "$!"',
            "    exit",
            "fi",
            f"host=$({python} -c {shlex.quote(_find_address(plan))})",
            f"port=$(({section.port} + SLURM_JOB_ID % {PORTS}))",
            'start_ray --head --node-ip-address="$host" --port="$port" --include-dashboard=false',
            'until (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; do kill -0 "$!"; sleep 1; done # or it ends here',
            'export RAY_ADDRESS="$host:$port"',
            'echo "$RAY_ADDRESS" >"$address.new" && mv "$address.new" "$address"',
            "",
            "# Others join while it works.",
            "trap : USR2 # a handler, which the build does not inherit",
            f"{build} &",
            "build=$!",
            "status=0",
            'wait "$build" || status=$?',
            'while kill -0 "$build" 2>/dev/null; do status=0; wait "$build" || status=$?; done # a signal ends `wait` too',
            'exit "$status"',
            "",
        ]
    )


def _find_address(plan: LaunchPlan) -> str:
    """A line of Python that prints this node's address, as the others reach it."""
    interface = plan.cluster.job.network_interface
    if interface is None:
        return "import ray.util; print(ray.util.get_node_ip_address())"
    return f"import psutil, socket; print(next(a.address for a in psutil.net_if_addrs()[{interface!r}] if a.family == socket.AF_INET))"


# --- Kubernetes --------------------------------------------------------------------------------------------


def render_kubernetes_data(plan: LaunchPlan) -> dict[str, str]:
    """File name -> text: the run file in a ConfigMap, and KubeRay's RayJob (ray.io/v1, of KubeRay 1.6 or later, which knows authOptions).

    The head is the first node and works, too. The cluster is gone when the build has ended; one that failed is begun again as often as
    `kubernetes.retries` says, and goes on where it was. The token is made by KubeRay, in a Secret of the cluster's own. KubeRay starts the
    build by Ray's job server, so the image needs `ray[default]`. Raises UserError without a `kubernetes:` section, and where the pods would
    not get what was passed.
    """
    section = plan.cluster.kubernetes
    if section is None:
        raise UserError(f"the cluster file of {plan.cluster.name} has no kubernetes: section; add one, with image and volumes at least.")
    check_secrets(plan, section)
    name = object_name(plan)
    others = {"groupName": "workers", "replicas": plan.nodes - 1, "minReplicas": plan.nodes - 1, "maxReplicas": plan.nodes - 1}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": section.namespace,
            "labels": labels(name) | ({"kueue.x-k8s.io/queue-name": section.queue} if section.queue else {}),
        },
        "spec": {
            "entrypoint": shlex.join(build_command(replace(plan, folder=CONFIGURATION_FOLDER))),
            "shutdownAfterJobFinishes": True,
            "backoffLimit": section.retries,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": _pods(plan, section, name, "ray-head"),
                **({"workerGroupSpecs": [others | _pods(plan, section, name, "ray-worker")]} if plan.nodes > 1 else {}),
            },
        },
    }
    return {DATA_MANIFESTS: write_manifests([configuration_map(plan, name), job])}


def _pods(plan: LaunchPlan, section: KubernetesSection, name: str, container: str) -> dict[str, Any]:
    """What Ray is started with, and in which pods; KubeRay adds the command. A build needs no GPUs."""
    cpus = plan.cluster.ray.cpus_per_node if plan.cluster.ray is not None else None
    parameters = {"temp-dir": f"{plan.cluster.job.scratch}/ray"} | ({"num-cpus": str(cpus)} if cpus else {})
    without_gpus = replace(plan, cluster=plan.cluster.model_copy(update={"hardware": HardwareSection()}))
    return {"rayStartParams": parameters, "template": template(without_gpus, section, name, {"name": container})}
