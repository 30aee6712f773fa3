"""The verb `launch`: a run on a cluster, planned, looked at, written down and handed over.

In: a run file, a cluster file, a kind. Out: the launch's folder, and the exit status of what its kind does with it. Everything that can be
known to fail is refused before anything is written; `--dry-run` ends there.
"""

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from configs.errors import UserError
from pretrain.verbs.arguments import Overrides, RunFile, say

if TYPE_CHECKING:
    from configs.cluster import ClusterConfig
    from configs.schema import RunConfig
    from launch.plan import LaunchPlan

Kind = Literal["slurm", "kubernetes", "hostfile", "ray", "local"]
Render = Callable[["LaunchPlan"], dict[str, str]]
Submit = Callable[["LaunchPlan", Callable[[str], None]], int]

OF_THE_CLUSTER = "cluster."
"""Overrides that begin so are for the cluster file."""


def launch(
    kind: Annotated[Kind, typer.Argument(help="What starts the nodes.", show_default=False)],
    run_file: RunFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="C", help="A cluster file, or the name of one in configs/clusters; local: this-machine.", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many; else as the cluster file says.", show_default=False)] = None,
    chain: Annotated[int, typer.Option(min=1, help="Slurm: so many jobs one behind the other, instead of a job that requeues.")] = 1,
    data: Annotated[bool, typer.Option("--data", help="Build the run's data there, by Ray, instead of training.")] = False,
    code: Annotated[Literal["copy", "here"], typer.Option(help="Nodes run a copy of the code, or the code where it lies.")] = "copy",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and every file, and touch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Start a run on a cluster: one supervisor on each node, by Slurm, Kubernetes, ssh or Ray; or here, as a node would.

    What is of a place (partition, image, modules, environment, paths) stands in a cluster file; an override that begins with cluster. is
    for it. The launch's files lie in RUN_FOLDER/launches/ID (kubernetes: launches/ID here); of this shell's environment only what
    job.pass_environment names goes along.

    Example: pretrain launch slurm RUN.yaml optimizer.peak_lr=3e-4 cluster.slurm.partition=gpu --cluster slurm-h100 --nodes 4 --dry-run

    A rehearsal on this machine: pretrain launch local configs/runs/demo.yaml
    """
    if as_json and not dry_run:
        raise UserError("--json prints what --dry-run shows; add --dry-run, or leave it out.")
    if cluster is None and kind != "local":
        raise UserError(f"launch {kind} needs --cluster C: a cluster file, or the name of one in configs/clusters.")
    from configs.loader import dump_config, load_cluster, load_config
    from launch.plan import resolve_run
    from launch.snapshot import own_files, write_launch
    from launch.validate import validate_launch
    from pretrain.data.remote import refuse_remote

    of_the_cluster = [one for one in overrides or [] if one.startswith(OF_THE_CLUSTER)]
    described = load_cluster(cluster or "this-machine", [one.removeprefix(OF_THE_CLUSTER) for one in of_the_cluster])
    if kind == "local":
        described = _with_our_python(described)
    config = load_config(run_file, [one for one in overrides or [] if one not in of_the_cluster])
    config = resolve_run(config, described, str(Path.cwd()))
    plan = _plan(kind, config, described, code, nodes, chain, data)
    validate_launch(plan, config)
    if data:
        refuse_remote(config.data, "a build")
    else:
        plan = replace(plan, configuration=dump_config(_look_here(config, must_see=kind != "kubernetes")))
    render, submit = _launcher(plan)
    rendered = render(plan)
    if dry_run:
        _show(plan, own_files(plan, {}) | rendered, as_json)
        return
    write_launch(plan, own_files(plan, os.environ) | rendered)
    say(f"launch {plan.launch_id} of run {plan.run_name}: its files are in {plan.folder}")
    raise typer.Exit(submit(plan, say))


def _plan(
    kind: Kind, config: "RunConfig", cluster: "ClusterConfig", code: Literal["copy", "here"], nodes: int | None, chain: int, data: bool
) -> "LaunchPlan":
    """The plan, named by the time and four digits. Pods need not share a folder with this machine: their manifests are written here."""
    from launch.plan import launch_folder, plan_launch
    from launch.snapshot import as_copy, describe_code, in_place

    launch_id = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = str(Path.cwd() / "launches" / launch_id) if kind == "kubernetes" else launch_folder(config, launch_id)
    found = describe_code(Path(__file__).parent.parent.parent, config, Path.cwd())
    if kind != "kubernetes":  # a pod has the image's code
        found = as_copy(found, folder) if code == "copy" else in_place(found)
    return plan_launch(
        kind,
        config,
        cluster,
        found,
        launch_id=launch_id,
        folder=folder,
        shell_environment=os.environ,
        nodes=nodes or _all_hosts(kind, cluster),
        chain=chain,
        builds_data=data,
    )


def _all_hosts(kind: Kind, cluster: "ClusterConfig") -> int | None:
    """Over ssh a launch takes every host that is named, where the cluster file does not say how many; else None. Raises UserError."""
    from launch.hostfile import read_hostfile

    if kind != "hostfile" or cluster.hosts is None or "nodes" in cluster.model_fields_set:
        return None
    return len(cluster.hosts.hosts or (read_hostfile(Path(cluster.hosts.hostfile)) if cluster.hosts.hostfile else ())) or None


def _launcher(plan: "LaunchPlan") -> tuple[Render, Submit]:
    """What renders the files of a launch beside those that all have, and what hands it over once they are written."""
    from launch import hostfile, kubernetes, local, ray_data, ray_job, slurm

    if plan.builds_data and plan.kind == "slurm":
        return ray_data.render_slurm_data, slurm.submit
    if plan.builds_data and plan.kind == "kubernetes":
        return ray_data.render_kubernetes_data, kubernetes.submit
    modules = {"local": local, "slurm": slurm, "kubernetes": kubernetes, "hostfile": hostfile, "ray": ray_job}
    return modules[plan.kind].render, modules[plan.kind].submit


def _with_our_python(cluster: "ClusterConfig") -> "ClusterConfig":
    """On this machine a node has the interpreter that runs here, unless the cluster file names another one."""
    if "python" in cluster.job.model_fields_set:
        return cluster
    return cluster.model_copy(update={"job": cluster.job.model_copy(update={"python": sys.executable})})


def _look_here(config: "RunConfig", must_see: bool) -> "RunConfig":
    """What the nodes would only find out behind the queue: data, parent, run folder, room. Returns it with its parent pinned.

    must_see: whether this machine sees what the nodes see; where it does not and the data is not here, they look. Raises UserError.
    """
    from pretrain.checkpoint.parent import pin_parent
    from pretrain.checkpoint.places import places_of
    from pretrain.checkpoint.verify import newest_step
    from pretrain.data.corpus import open_corpus
    from pretrain.data.order import DataOrder
    from pretrain.run.folder import RunFolder

    if not must_see and not config.data.is_remote and not Path(config.data.folder()).is_dir():
        say(f"{config.data.folder()} is not seen from here: data, run folder and room are looked at by the nodes")
        return config
    corpus = open_corpus(config)
    DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)
    _check_tokenizer(config, corpus.tokenizer_sha256)
    run = RunFolder.of(config)
    config = pin_parent(config, run.path, corpus.tokenizer_sha256, say)
    newest = max(newest_step(place.checkpoints) for place in places_of(config.checkpoint, run.path))
    run.check(config, newest)
    _check_room(config, run.path, newest)
    return config


def _check_tokenizer(config: "RunConfig", of_the_data: str) -> None:
    from data_pipeline.tokenizer import tokenizer_hash

    path = config.data.tokenizer.path
    if path is not None and Path(path).is_file() and tokenizer_hash(Path(path)) != of_the_data:
        raise UserError(
            f"{config.data.folder()} was built with another tokenizer than data.tokenizer.path names ({path}); build the data anew, or "
            "name the one that it was built with."
        )


def _check_room(config: "RunConfig", run: Path, step: int) -> None:
    """For the commits to come, as a run does at its start; a model of the user's own is counted there only."""
    from pretrain.checkpoint.retention import check_room
    from pretrain.model.operations import tabulate_model

    if config.checkpoint.store is not None or config.model.implementation or config.model.block:
        return
    there = next(path for path in (run, *run.parents) if path.is_dir())
    steps = config.training.total_steps
    num_saves = (steps - step) // (config.checkpoint.every_steps or steps) + 1
    table = tabulate_model(config.model, config.training.micro_batch_samples, config.training.sequence_length, 4, None)
    check_room(there / "checkpoints", config.checkpoint, table.parameters, num_saves)


def _show(plan: "LaunchPlan", files: Mapping[str, str], as_json: bool) -> None:
    from launch import plan as plans

    if as_json:
        typer.echo(json.dumps({"plan": plans.as_json(plan), "files": files}))
        return
    typer.echo(plans.as_text(plan), nl=False)
    for name, content in files.items():
        typer.echo(f"\n--- {name}")
        typer.echo(content, nl=not content.endswith("\n"))
