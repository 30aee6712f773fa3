"""Whether a launch can be what its plan says, before anything is written or a queue is waited in. Pure: no file is looked at.

In: a plan and the configuration it was made of. Out: nothing, or a `UserError` that names what does not fit and what to change. What
only a look at the disk can tell (data, run folder, room) is looked at by the verb.
"""

import os
from pathlib import PurePosixPath

from configs.errors import UserError
from configs.schema import RunConfig
from launch.plan import Kind, LaunchPlan, node_environment

SECTIONS: dict[Kind, str] = {"slurm": "slurm", "kubernetes": "kubernetes", "hostfile": "hosts", "ray": "ray"}
"""The section of a cluster file that a kind of launch reads."""
BUILDERS: tuple[Kind, ...] = ("slurm", "kubernetes", "ray")
"""Kinds that build data."""
FIXED_VARIABLES = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
"""Those that bash lets nobody set."""


def validate_launch(plan: LaunchPlan, config: RunConfig) -> None:
    """Raises UserError for what cannot start, cannot be divided among the ranks, or would not be seen by the nodes."""
    _check_kind(plan)
    if not plan.builds_data:
        _check_batch(plan, config)
    _check_places(plan, config)
    _check_variables(plan)


def _check_kind(plan: LaunchPlan) -> None:
    cluster, section = plan.cluster, SECTIONS.get(plan.kind)
    if section is not None and getattr(cluster, section) is None:
        there = ", ".join(kind for kind, name in SECTIONS.items() if getattr(cluster, name) is not None) or "local only"
        raise UserError(
            f"cluster {cluster.name} has no section `{section}:`, which launch {plan.kind} reads; add it, or take another --cluster "
            f"(this one is for: {there})."
        )
    if plan.kind == "local" and plan.nodes > 1:
        raise UserError(f"launch local starts one node, this machine, and {plan.nodes} were asked for; take slurm, kubernetes or hostfile.")
    if plan.kind != "slurm" and plan.chain > 1:
        raise UserError(f"--chain {plan.chain} queues jobs of Slurm one behind the other; with {plan.kind} leave it out.")
    if plan.builds_data and plan.kind not in BUILDERS:
        raise UserError(
            f"--data builds on a cluster by {', '.join(BUILDERS)}, found {plan.kind}; on one machine: pretrain data build RUN.yaml."
        )


def _check_batch(plan: LaunchPlan, config: RunConfig) -> None:
    try:
        config.training.accumulation(plan.nodes * plan.processes_per_node)
    except ValueError as error:
        raise UserError(f"{plan.nodes} nodes x {plan.processes_per_node} processes: {error}.") from None


def _check_places(plan: LaunchPlan, config: RunConfig) -> None:
    """Run folder, data, files and code lie where every node sees them, as far as the cluster file says where that is."""
    for folder in plan.cluster.job.shared_folders:
        if not PurePosixPath(folder).is_absolute():
            raise UserError(f"job.shared_folders of cluster {plan.cluster.name}: found {folder!r}, wanted an absolute path.")
    if plan.kind == "local":
        return
    places = {"run.root": plan.run_folder}
    if not config.data.is_remote:
        places["data.root"] = config.data.folder()
    if plan.kind == "kubernetes" and plan.cluster.kubernetes is not None:
        key, shared = "kubernetes.volumes", [volume.path for volume in plan.cluster.kubernetes.volumes]
    else:  # a pod has its code and its files from the image and the manifest
        key, shared = "job.shared_folders", list(plan.cluster.job.shared_folders)
        places |= {"the folder of the code": plan.code.source, "the folder of the launch": plan.folder}
    container = plan.cluster.container
    if plan.kind == "slurm" and container is not None and not shared and not container.mounts:
        raise UserError(
            f"container of cluster {plan.cluster.name} sees only what is mounted, and job.shared_folders is empty; name the folders there "
            f"that hold {', '.join(f'{what} ({path})' for what, path in places.items())}."
        )
    if not shared and plan.kind != "kubernetes":
        return
    for what, path in places.items():
        if not any(_lies_in(path, folder) for folder in shared):
            raise UserError(
                f"{what}: {path} lies in none of {key} of cluster {plan.cluster.name} ({', '.join(shared) or 'there are none'}), so nodes "
                "would not see it; move it there, or add its folder."
            )


def _lies_in(path: str, folder: str) -> bool:
    return PurePosixPath(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))


def _check_variables(plan: LaunchPlan) -> None:
    """Commas, quotes, `$` and line breaks are carried; a NUL ends every text of the system."""
    if fixed := sorted(FIXED_VARIABLES & {*plan.environment, *plan.passed}):
        raise UserError(f"the environment variable {fixed[0]} cannot be set in bash; take it out of job.environment and pass_environment.")
    texts = {f"the environment variable {name}": value for name, value in node_environment(plan).items()}
    texts |= {"run.root": plan.run_folder, "the folder of the launch": plan.folder, "the folder of the code": plan.code.source}
    if wrong := [what for what, text in texts.items() if "\0" in text]:
        raise UserError(f"{wrong[0]} holds a NUL, which no environment and no path can carry; take it out.")
