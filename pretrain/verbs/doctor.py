"""The verb `pretrain doctor`: what is wrong with this machine or cluster, before a run finds out.

Rooms are imported when the verb is called, so that `pretrain --help` answers at once; torch only behind the checks of a node, which fork.
"""

import hashlib
import json
import netrc
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import EXIT_RESUMABLE, UserError
from pretrain.verbs.arguments import EXIT_DIFFERENT, AsJson, say

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from launch.preflight.report import Report
    from launch.preflight.site import Site

WANDB_SERVER = "https://api.wandb.ai"


def doctor(
    cluster: Annotated[
        str | None, typer.Option(help="A cluster file, or the name of one in configs/clusters: what nodes should have.", show_default=False)
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="The run that is to start: its folder, its data, its ranks.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many machines are looked at together; this command runs on each.")] = 1,
    node: Annotated[int, typer.Option(min=0, help="Which of them this is; 0 compares.")] = 0,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of the training on node 0; the doctors meet a few ports above.", show_default=False),
    ] = None,
    launch: Annotated[str | None, typer.Option(help="What the launcher calls this; other launches are not listened to.")] = None,
    bad_nodes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hosts that fail are added to it, one a line.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine, or with the nodes of a cluster. A launch does that on all its nodes before step 0.

    Each node: GPUs, driver and torch, folders (room; write, sync, rename, read; a checkpoint there and back; really shared), shared memory,
    limits, names, ports, Weights & Biases. All: the same versions, code and configuration, clocks, rates of each device, all-reduces of
    growing groups, exact and fast. Exit status: 0 nothing failed (warnings are no failure); 1 something did;
    75 a host was added to --bad-nodes, and without it another start may do better.

    Example: pretrain doctor --cluster slurm-h100 --run RUN.yaml

    On the second of two machines: pretrain doctor --nodes 2 --node 1 --rendezvous first:29400
    """
    parent, site = os.getppid(), _site(cluster, run, nodes, node, rendezvous, launch)
    from launch.preflight.examination import examine
    from launch.preflight.report import bad_hosts, to_json

    if rendezvous is not None:  # a node's script, which is not to leave it behind
        import signal

        from pretrain.run.signals import end_with_parent

        end_with_parent(parent, signal.SIGTERM)
    report = examine(site, say)
    if as_json:
        typer.echo(json.dumps({**to_json(report), "passed": not report.failures}))
    else:
        _tell(report, node)
    if bad_nodes is not None and node == 0 and (hosts := bad_hosts(report)):
        is_new = _add_lines(bad_nodes, hosts)
        say(f"{', '.join(hosts)}: written to {bad_nodes}")
        if is_new:
            raise typer.Exit(EXIT_RESUMABLE)
    if report.failures:
        raise typer.Exit(EXIT_DIFFERENT)


def _site(cluster: str | None, run: Path | None, nodes: int, node: int, rendezvous: str | None, launch: str | None) -> "Site":
    """Where the run is going to be. Raises UserError for files and options that do not fit."""
    from configs.cluster import HardwareSection, JobSection
    from configs.loader import load_cluster, load_config
    from launch.preflight.probes import PORTS_TRIED
    from launch.preflight.site import Site
    from pretrain.run.nodes import NodePlace

    config = None if run is None else load_config(run)
    described = None if cluster is None else load_cluster(cluster)
    place = NodePlace.parse(nodes, node, rendezvous, launch or "by-hand") if nodes > 1 or rendezvous is not None else None
    if place is not None and place.port > 65535 - 2 * PORTS_TRIED:
        raise UserError(f"--rendezvous: found port {place.port}, wanted one up to {65535 - 2 * PORTS_TRIED}: the doctors meet above it.")
    host, port = ("127.0.0.1", None) if place is None or nodes == 1 else (place.host, place.port)
    data = None
    if config is not None and not config.data.is_remote and not config.data.train_while_building:
        data = Path(config.data.folder())
    return Site(
        num_nodes=nodes,
        node=node,
        host=host,
        port=port,
        launch=launch or "by-hand",
        processes=config.parallel.processes if config is not None else None,
        cpu_processes=config.parallel.cpu_processes if config is not None else min(2, os.cpu_count() or 1),
        run_folder=Path(config.run.root) / (config.run.name or "run") if config is not None else Path("runs"),
        data=data,
        wandb=_wandb_server(config),
        hardware=described.hardware if described is not None else HardwareSection(),
        job=described.job if described is not None else JobSection(scratch=tempfile.gettempdir()),
        facts=_facts(config),
    )


def _facts(config: "RunConfig | None") -> dict[str, str]:
    """What has to be the same on all nodes."""
    from configs.loader import dump_config
    from launch.preflight.site import hash_code
    from pretrain.run.environment import describe_environment

    described = describe_environment()
    facts = {"python": described["python"], "code": f"sources {hash_code(Path(__file__).parents[2])}"}
    if config is not None:
        facts["configuration"] = f"SHA-256 {hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]}"
    return facts | {package: version or "none" for package, version in described["versions"].items()}


def _wandb_server(config: "RunConfig | None") -> str | None:
    """The server that rank 0 will talk to; None where no key is configured, or the run is not to be shown there."""
    server = os.environ.get("WANDB_BASE_URL") or WANDB_SERVER
    if (os.environ.get("WANDB_MODE") or (config.watch.wandb if config is not None else "auto")) in ("offline", "disabled"):
        return None
    if os.environ.get("WANDB_API_KEY"):
        return server
    with suppress(OSError, netrc.NetrcParseError):
        return server if netrc.netrc().authenticators(server.split("//")[-1].split("/")[0].split(":")[0]) else None
    return None


def _tell(report: "Report", node: int) -> None:
    """Everything on node 0, on the others what is theirs: their output may end in one terminal."""
    from launch.preflight.report import advice_of, table_of, verdict_of
    from pretrain.page import make_visible, open_page

    page = open_page()
    shown = [finding for finding in report.findings if node == 0 or finding.node == node]
    if shown:
        rows = [tuple(make_visible(cell) for cell in row) for row in table_of(shown)]
        page.table(("", "check", "node", "found", "wanted"), rows)
        page.say("what to do")
        for line in advice_of(shown):
            page.say(f"  {make_visible(line)}")
    page.say(verdict_of(report) if node == 0 else f"node {node}: {verdict_of(report)}; node 0 says all of it")


def _add_lines(path: Path, lines: list[str]) -> bool:
    """Returns whether any of them is new."""
    from configs.durable import write_file

    there = path.read_text().splitlines() if path.is_file() else []
    write_file(path, "".join(f"{line}\n" for line in dict.fromkeys([*there, *lines])).encode())
    return not set(lines) <= set(there)
