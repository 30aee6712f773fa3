"""What a launch is going to do, before it does it: nodes, processes, command, environment, folder, code. Pure and printable.

In: a run's configuration, a cluster file, what was asked for. Out: a `LaunchPlan`, which the renderers turn into scripts and manifests.
Every kind of launch ends in the same command on each node, `pretrain train` with its place among the nodes; nothing here says what is
trained.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, cast

from configs.cluster import ClusterConfig
from configs.data_section import RuleSection
from configs.errors import EXIT_RESUMABLE
from configs.loader import dump_config
from configs.schema import RunConfig
from configs.section import Section

Kind = Literal["local", "slurm", "kubernetes", "hostfile", "ray"]
ENVIRONMENT_FILE, NODE_SCRIPT, RUN_FILE, PLAN_FILE = "environment", "node.sh", "run.yaml", "plan.json"
"""In a launch's folder: what nodes are told (0600: it may hold secrets), what each runs, the resolved configuration, this plan."""
CLUSTER_FILE, BAD_NODES_FILE = "cluster.yaml", "bad-nodes"
"""And the cluster, as the doctor compares with it; hosts that failed its checks, one a line, where there are any."""


@dataclass(frozen=True)
class Code:
    """What the nodes run."""

    source: str
    """Absolute path of the folder that holds the packages: put in front of every node's PYTHONPATH."""
    commit: str | None
    """Of git; null where the folder is no checkout."""
    changes_sha256: str | None
    """Of `git diff HEAD` and of the packages' files that git does not know; null where nothing differs from the commit."""
    copied_from: str | None = None
    """The folder whose packages are copied to `source` when the launch's files are written; null: `source` is run as it lies there."""
    modules: tuple[str, ...] = ()
    """Files and folders of the user's own modules that the run file names, by absolute path; they are copied too."""


@dataclass(frozen=True)
class LaunchPlan:
    """One launch."""

    kind: Kind
    launch_id: str
    """Names the launch in `attempts.jsonl`, which bounds its attempts without progress, also over requeues."""
    run_name: str
    run_folder: str
    """Absolute, as all paths here."""
    folder: str
    """RUN_FOLDER/launches/LAUNCH_ID: scripts and what they print."""
    nodes: int
    processes_per_node: int
    cluster: ClusterConfig
    code: Code
    environment: dict[str, str] = field(default_factory=dict)
    """Set on every node; without the values of what is passed."""
    passed: tuple[str, ...] = ()
    """Names of the variables that the launching shell has and the cluster file lets through; their values stand in no plan."""
    chain: int = 1
    """Jobs that are queued one behind the other."""
    builds_data: bool = False
    """Whether the data is built, by Ray, instead of a training."""
    configuration: str = ""
    """The resolved run file itself, as YAML: what `run_file` holds."""

    @property
    def run_file(self) -> str:
        """The resolved configuration, on the nodes."""
        return str(PurePosixPath(self.folder) / RUN_FILE)

    def train_command(self, node: str, rendezvous: str, nodes: str | None = None) -> tuple[str, ...]:
        """What one node runs. node, rendezvous (HOST:PORT), nodes: values, or what the launcher's shell puts in their place."""
        place = ("--nodes", nodes or str(self.nodes), "--node", node, "--rendezvous", rendezvous, "--launch", self.launch_id)
        place += ("--join-seconds", f"{self.cluster.job.join_seconds:g}")
        return (self.cluster.job.python, "-m", "pretrain.cli", "train", self.run_file, *place)

    def doctor_command(self, node: str, rendezvous: str) -> tuple[str, ...]:
        """What one node runs before it, to find out what would break the training. Arguments as for `train_command`."""
        folder = PurePosixPath(self.folder)
        files = ("--cluster", str(folder / CLUSTER_FILE), "--run", self.run_file)
        if self.kind != "kubernetes":  # nothing there reads them
            files += ("--bad-nodes", str(folder / BAD_NODES_FILE))
        place = ("--nodes", str(self.nodes), "--node", node, "--rendezvous", rendezvous, "--launch", self.launch_id)
        return (self.cluster.job.python, "-m", "pretrain.cli", "doctor", *files, *place)


def resolve_run(config: RunConfig, cluster: ClusterConfig, working_folder: str) -> RunConfig:
    """The run file as nodes are given it: paths that start at working_folder made absolute, and the ranks of a node counted.

    working_folder: where the launch is asked for; nodes start elsewhere. What is a URL, begins with ~ or names a place of the machine that
    reads it (`{stdlib}`) stays as it is.
    """

    def absolute(path: Any) -> Any:
        if isinstance(path, list | tuple):
            paths = cast("list[Any] | tuple[Any, ...]", path)
            return type(paths)(absolute(one) for one in paths)
        is_elsewhere = not isinstance(path, str) or "://" in path or path.startswith(("~", "{"))
        return path if is_elsewhere else str(PurePosixPath(working_folder) / path)

    def with_absolute(section: Section, *keys: str) -> Any:
        return section.model_copy(update={key: absolute(getattr(section, key)) for key in keys})

    def with_absolute_settings(rule: RuleSection) -> RuleSection:  # the names under which a rule is given files
        files = {key: absolute(value) for key, value in rule.settings.items() if key in ("path", "paths")}
        return rule.model_copy(update={"settings": rule.settings | files})

    data = config.data.model_copy(
        update={
            "root": absolute(config.data.folder()),
            "cache": absolute(config.data.cache),
            "tokenizer": with_absolute(config.data.tokenizer, "path"),
            "sources": tuple(one if one.format == "hub" else with_absolute(one, "path") for one in config.data.sources),
            "clean": tuple(with_absolute_settings(rule) for rule in config.data.clean),
        }
    )
    return config.model_copy(
        update={
            "run": with_absolute(config.run, "root"),
            "data": data,
            "model": with_absolute(config.model, "initial_weights"),
            "parallel": config.parallel.model_copy(update={"processes": count_processes(config, cluster)}),
            "performance": with_absolute(config.performance, "compile_cache"),
            "checkpoint": with_absolute(config.checkpoint, "fast_folder"),
            "evaluate": with_absolute(config.evaluate, "tasks"),
        }
    )


def count_processes(config: RunConfig, cluster: ClusterConfig) -> int:
    """Ranks of one node: as the run file says, else one per GPU of the cluster file, else `parallel.cpu_processes`."""
    return config.parallel.processes or cluster.hardware.gpus_per_node or config.parallel.cpu_processes


def launch_folder(config: RunConfig, launch_id: str) -> str:
    """Where a launch of a resolved run keeps its files: RUN_FOLDER/launches/LAUNCH_ID."""
    return str(_run_folder(config) / "launches" / launch_id)


def _run_folder(config: RunConfig) -> PurePosixPath:
    return PurePosixPath(config.run.root) / (config.run.name or "run")


def plan_launch(
    kind: Kind,
    config: RunConfig,
    cluster: ClusterConfig,
    code: Code,
    *,
    launch_id: str,
    folder: str,
    shell_environment: Mapping[str, str],
    nodes: int | None = None,
    chain: int = 1,
    builds_data: bool = False,
) -> LaunchPlan:
    """Put together what a launch does.

    config: as `resolve_run` gives it. code: what nodes run. folder: the launch's own, absolute. shell_environment: of the shell that
    launches; the plan takes names of it only. nodes: how many; None: as the cluster file says.
    """
    job = cluster.job
    return LaunchPlan(
        kind=kind,
        launch_id=launch_id,
        run_name=config.run.name or "run",
        run_folder=str(_run_folder(config)),
        folder=folder,
        nodes=cluster.nodes if nodes is None else nodes,
        processes_per_node=count_processes(config, cluster),
        cluster=cluster,
        code=code,
        environment=dict(job.environment),
        passed=tuple(name for name in job.pass_environment if name in shell_environment and name not in job.environment),
        chain=chain,
        builds_data=builds_data,
        configuration=dump_config(config),
    )


def node_environment(plan: LaunchPlan) -> dict[str, str]:
    """What every node is told, but for what is passed: the cluster file's variables, over those that a launch needs.

    The cluster file's PYTHONPATH stands behind the code's folder, which no other may take the place of; a pod has the image's code.
    """
    job = plan.cluster.job
    wanted = {"PYTHONUNBUFFERED": "1", "TMPDIR": job.scratch}
    if job.network_interface is not None:
        wanted |= {"GLOO_SOCKET_IFNAME": job.network_interface, "NCCL_SOCKET_IFNAME": job.network_interface}
    wanted |= plan.environment
    if plan.kind != "kubernetes":
        wanted["PYTHONPATH"] = ":".join(filter(None, [plan.code.source, plan.environment.get("PYTHONPATH")]))
    return wanted


def as_json(plan: LaunchPlan) -> dict[str, Any]:
    """The plan as plain values, for `plan.json`: two plans can be compared. Without the run file, which stands beside it."""
    return {key: value for key, value in asdict(plan).items() if key != "configuration"} | {"cluster": plan.cluster.model_dump(mode="json")}


def as_text(plan: LaunchPlan) -> str:
    """The plan as a person reads it, a line for each thing."""
    hardware, code = plan.cluster.hardware, plan.code
    devices = f"{hardware.gpus_per_node} x {hardware.gpu}" if hardware.gpu else "CPUs"
    commit = f"commit {code.commit[:12]}" if code.commit else "no git commit"
    changes = f" with changes {code.changes_sha256[:12]}" if code.changes_sha256 else ""
    command = plan.train_command("NODE", "HOST:PORT")
    rows = [
        ("launch", f"{plan.launch_id} by {plan.kind}" + (f", {plan.chain} jobs one behind the other" if plan.chain > 1 else "")),
        ("run", f"{plan.run_name} in {plan.run_folder}" + (" (its data is built)" if plan.builds_data else "")),
        ("files", plan.folder),
        ("cluster", f"{plan.cluster.name}: {devices} in a node"),
        ("ranks", f"{plan.nodes} nodes x {plan.processes_per_node} processes = {plan.nodes * plan.processes_per_node}"),
        ("code", f"{'a copy of ' if code.copied_from else ''}{code.copied_from or code.source} ({commit}{changes})"),
        *(("", f"and a copy of {module}") for module in code.modules),
        *(("environment", f"{name}={value!r}") for name, value in sorted(node_environment(plan).items())),
        *(("passed", f"{name}, as this shell has it") for name in plan.passed),
    ]
    if not plan.builds_data:
        rows.append(("each node", shlex.join(command)))
    return "".join(f"{name:<12} {text}\n" for name, text in rows)


def render_environment(variables: Mapping[str, str]) -> str:
    """A file for bash's `source`. Values are quoted whole: commas, quotes, `$` and line breaks arrive as they are."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items()))


def render_node_script(plan: LaunchPlan) -> str:
    """What runs on each node: `bash node.sh NODE HOST:PORT`; the process becomes the supervisor itself, so signals reach it."""
    folder = PurePosixPath(plan.folder)
    lines = [
        "#!/usr/bin/env bash",
        f"# One node of launch {plan.launch_id}: bash {NODE_SCRIPT} NODE HOST:PORT",
        "set -eo pipefail # not -u: what sites have for modules and conda reads variables that are not set",
        *plan.cluster.job.setup,
        f"source {shlex.quote(str(folder / ENVIRONMENT_FILE))}",
        f"cd {shlex.quote(plan.code.source)}",
        *(doctor_lines(plan) if plan.cluster.job.doctor else ()),
        train_line(plan),
    ]
    return "\n".join(lines) + "\n"


_PLACE = ('"$1"', '"$2"')


def train_line(plan: LaunchPlan) -> str:
    """The last line of a node's script, $1 its number, $2 HOST:PORT: the process becomes the supervisor."""
    return f"exec {_quoted(plan.train_command(*_PLACE))}"


def _quoted(words: tuple[str, ...]) -> str:
    return " ".join(word if word in _PLACE else shlex.quote(word) for word in words)


def doctor_lines(plan: LaunchPlan) -> list[str]:
    """Lines of a node's script, $1 its number, $2 HOST:PORT. A doctor that fails ends the node with its exit status; a stop ends both."""
    stops = "TERM INT HUP USR1 USR2"
    return [
        f"trap 'kill $(jobs -p) || true; exit {EXIT_RESUMABLE}' {stops} # a stop before the training: it can be started again",
        f"{_quoted(plan.doctor_command(*_PLACE))} &",
        'wait "$!"',
        f"trap - {stops}",
    ]
