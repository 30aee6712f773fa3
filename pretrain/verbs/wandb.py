"""The verbs `wandb sync` and `wandb dashboard`: what a run shows in Weights & Biases, after the fact.

In: a run folder, for the dashboard also a run file. Out: rows on the server or in an offline folder; a workspace, saved or printed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from pretrain.verbs.arguments import RunArgument, find_run, say

if TYPE_CHECKING:
    from configs.schema import RunConfig

app = typer.Typer(no_args_is_help=True, help="What a run shows in Weights & Biases.")


@app.command()
def sync(
    run: RunArgument,
    offline: Annotated[
        bool, typer.Option("--offline", help="Write one fresh offline folder instead, to be carried to where there is a network.")
    ] = False,
) -> None:
    """Send the rows of metrics.jsonl that the server lacks: of an outage, of a full queue, of attempts without a network.

    What the server has is not sent again, so it may be interrupted, and called as often as one likes.

    Example: pretrain wandb sync runs/demo
    """
    folder = find_run(run)
    from pretrain.verbs.standing import is_alive

    if folder.lease_file.exists() and is_alive(folder.lease_file):
        raise UserError(f"{folder.path} is running, and shows its rows itself; wait for its end, or `pretrain stop {run}`.")
    from pretrain.watch.metrics import METRICS_FILE
    from pretrain.watch.replay import sync_online, write_offline

    if not (folder.path / METRICS_FILE).is_file():
        raise UserError(f"{folder.path} has no {METRICS_FILE}: it has not logged a step yet.")
    if offline:
        done = write_offline(folder.load_config(), folder.path, say)
        typer.echo(f"{done.num_rows:,} rows are in {done.place}; where there is a network: wandb sync {done.place}")
        return
    done = sync_online(folder.load_config(), folder.path, say)
    typer.echo(f"{done.place}: {done.num_rows:,} rows, {done.num_sent:,} of them sent now, {done.num_missing:,} missing")
    if done.num_missing:
        raise UserError(f"{done.num_missing:,} rows are not shown yet; the server may need a minute: then the same command again.")


@app.command()
def dashboard(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a name below runs/, or a run file.", show_default=False)],
    as_definition: Annotated[bool, typer.Option("--print", help="Print its definition as JSON; nothing is sent.")] = False,
) -> None:
    """Make the dashboard of a run's project in Weights & Biases: health, loss, throughput, memory, data, restarts.

    Each call makes a new view; it shows all runs of the project.

    Example: pretrain wandb dashboard runs/demo --print
    """
    config = _configuration(run)
    from pretrain.watch.dashboard import build_workspace, describe_workspace, save_workspace

    entity, project = config.watch.wandb_entity, config.watch.wandb_project
    if as_definition:
        typer.echo(json.dumps(describe_workspace(build_workspace(entity or "", project)), indent=1))
        return
    from pretrain.watch.wandb_run import has_api_key

    if not has_api_key():
        raise UserError("no W&B API key is configured: `wandb login`, or set WANDB_API_KEY; with --print the definition is written here.")
    typer.echo(save_workspace(entity, project))


def _configuration(run: str) -> "RunConfig":
    """A run file need not have been run."""
    if Path(run).suffix in (".yaml", ".yml"):
        from configs.loader import load_config

        return load_config(Path(run))
    return find_run(run).load_config()
