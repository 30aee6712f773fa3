"""The command `pretrain`: verbs, their arguments, what they print, and the exit status.

Rooms are imported when a verb is called, so that `pretrain --help` answers at once.
Exit status: 0 done; 1 `data diff` found a difference; 2 the user's mistake, in one or two sentences; 75 stopped early, can be
resumed; 130 interrupted, begins again; else a defect.
"""

import errno
import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import EXIT_DONE, EXIT_MISTAKE, EXIT_RESUMABLE, UserError
from configs.redaction import read_secret_files, redact_output
from pretrain.verbs import checkpoints, compare, data, doctor, launch, model, report, status, wandb
from pretrain.verbs.arguments import AsJson, Overrides, RunArgument, RunFile, find_run, report_problems, say

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from pretrain.run.folder import RunFolder

INTERRUPTED = 130
"""What typer makes of Ctrl-C, and what a shell expects of it."""
CONTINUING_VERBS = (["train"], ["demo"], ["data", "build"], ["wandb", "sync"])
"""Those that go on where they were stopped; all others begin again."""
FALL_BACK = "Training falls back to the newest commit that is whole and moves this one aside."
NOT_A_DEFECT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}
"""Errors of a file system that only its owner can mend."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Text goes in, a pretrained decoder-only Transformer comes out.\n\n"
        "Start with `pretrain demo`. Run files and overrides look the same everywhere:\n"
        "pretrain train RUN.yaml optimizer.peak_lr=3e-4"
    ),
)
config_app = typer.Typer(no_args_is_help=True, help="Run files.")
checkpoints_app = typer.Typer(no_args_is_help=True, help="The commits of a run.")
app.add_typer(data.app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(wandb.app, name="wandb")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("pretrain"))
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Text goes in, a pretrained decoder-only Transformer comes out.

    Start with `pretrain demo`. Run files and overrides look the same everywhere:
    pretrain train RUN.yaml optimizer.peak_lr=3e-4
    """


@app.command()
def demo(
    corpus: Annotated[
        Path | None, typer.Option(help="A folder, .txt, .jsonl[.gz|.zst] or .parquet to learn from instead.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the trained model continues.", show_default=False)] = None,
    torture: Annotated[
        bool, typer.Option("--torture", help="Instead: train twice, kill ranks of the second training, compare every bit.")
    ] = False,
    kills: Annotated[int | None, typer.Option(min=1, help="How many, with --torture (5).", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the kills of another --torture, to repeat them.", show_default=False)] = None,
) -> None:
    """Everything, end to end, on this machine, in minutes: text, tokenizer, shards, training, a stop, a resume, a paragraph.

    Example: pretrain demo --corpus my-notes/

    Killed at random, and the same bits at the end: pretrain demo --torture --kills 5
    """
    if torture:
        from pretrain.torture import run_torture

        raise typer.Exit(run_torture(corpus, kills or 5, seed))
    if kills is not None or seed is not None:
        raise UserError("--kills and --seed belong to --torture; add it, or leave them out.")
    from pretrain.demo import run_demo

    raise typer.Exit(run_demo(corpus, prompt))


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew: a run that is there is moved to NAME.before-N first.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="How many machines train together; this command runs on each.")] = 1,
    node: Annotated[int, typer.Option(min=0, help="Which of them this is; 0 decides.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of node 0, as the others reach it.", show_default=False)
    ] = None,
    launch: Annotated[
        str | None, typer.Option(help="What the launcher calls this; it bounds attempts in vain over restarts.", show_default=False)
    ] = None,
    join_seconds: Annotated[float, typer.Option(min=1, help="Until all nodes have to be there.")] = 300.0,
) -> None:
    """Train on this machine, on all its devices. Started again, the same file continues its run.

    Example: pretrain train configs/runs/demo.yaml run.name=hot optimizer.peak_lr=1e-2

    A branch of another run: pretrain train RUN.yaml run.name=decay start_from=runs/base@1000 start_with=everything

    On two machines, on the second one: pretrain train RUN.yaml --nodes 2 --node 1 --rendezvous first:29400 (`pretrain launch` does that)
    """
    from configs.loader import load_config

    config = load_config(run_file, overrides or [])
    from pretrain.run.nodes import NodePlace, leave

    place = NodePlace.parse(nodes, node, rendezvous, launch or "by-hand") if nodes > 1 else None
    from pretrain.checkpoint.parent import pin_parent
    from pretrain.checkpoint.places import places_of
    from pretrain.checkpoint.verify import is_committed, newest_step
    from pretrain.data.corpus import open_corpus
    from pretrain.data.order import DataOrder
    from pretrain.data.remote import described_in
    from pretrain.mixture_view import check_repeats
    from pretrain.run.attempt import follow
    from pretrain.run.folder import RunFolder
    from pretrain.run.supervisor import supervise

    _refuse_a_moved_run(run_file, config)
    corpus = open_corpus(config)  # unfinished or unfit data is said before anything is made or started
    DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)  # and so is a mixture that does not fit it
    while not corpus.has_begun:
        awaited = ", ".join(source.name for source in corpus.sources if not source.has_begun)
        say(f"waiting for the first unit of {awaited} in {config.data.folder()}")
        time.sleep(10)
        corpus = open_corpus(config)
    if place is not None and place.node > 0:
        leave(follow(config, say, place, join_seconds))
    if fresh:
        _set_aside(RunFolder.of(config))
    config = pin_parent(config, RunFolder.of(config).path, corpus.tokenizer_sha256, say)
    if not is_committed(RunFolder.of(config).checkpoints, config.training.total_steps):
        for warning in check_repeats(config):
            say(f"WARNING: {warning}")
        if config.data.verify_before_training:
            _refuse_damaged_data(Path(config.data.folder()))

    def newest_anywhere(checkpoints: Path) -> int:
        return max(newest_step(place.checkpoints) for place in places_of(config.checkpoint, checkpoints.parent))

    dataset = described_in(config.data)
    status = supervise(config, dataset, say, is_committed, newest_anywhere, launch, place, join_seconds)
    if place is not None:
        leave(status)
    raise typer.Exit(status)


app.command()(launch.launch)
app.command()(doctor.doctor)
app.command()(status.status)
app.command()(status.stop)
app.command()(compare.compare)
app.command()(report.report)
app.command()(model.generate)
app.command()(model.inspect)
app.command()(model.evaluate)
app.command("export")(model.export_model)
app.command("import")(model.import_model)


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a run file as it is resolved, with every default; the output is itself a valid run file.

    Example: pretrain config show configs/runs/demo.yaml training.global_batch_samples=8
    """
    from configs.loader import dump_config, load_config

    config = load_config(run_file, overrides or [])
    typer.echo(json.dumps(config.model_dump(mode="json"), indent=1) if as_json else dump_config(config), nl=as_json)


@config_app.command("keys")
def config_keys(as_json: AsJson = False) -> None:
    """Print every key of a run file, its default, and what becomes of it when it differs as a run goes on.

    free: taken without a word. applied: taken, said and recorded in attempts.jsonl. refused: the run keeps its own.

    Example: pretrain config keys
    """
    from configs.changes import all_keys
    from pretrain.page import open_page

    keys = all_keys()
    if as_json:
        typer.echo(json.dumps([key._asdict() for key in keys]))
        return
    rows = [(key.name, key.at_resume, text if len(text := json.dumps(key.default)) <= 60 else f"{text[:57]}...") for key in keys]
    open_page().table(("key", "when it differs", "default"), rows)


@checkpoints_app.command("list")
def checkpoints_list(run: RunArgument, as_json: AsJson = False) -> None:
    """Print the commits of a run, newest first: step, tokens, loss, size, state, and whether the next save removes them.

    No file is read whole: `pretrain checkpoints verify` does that.

    Example: pretrain checkpoints list runs/demo
    """
    folder = find_run(run)
    from pretrain.checkpoint_view import list_checkpoints, tell_checkpoints
    from pretrain.page import open_page

    found = list_checkpoints(folder)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_checkpoints(found, folder.checkpoints, open_page())


@checkpoints_app.command("verify")
def checkpoints_verify(run: RunArgument, as_json: AsJson = False) -> None:
    """Read every byte of every commit and compare it with its manifest. Exit status 2 when something differs.

    Example: pretrain checkpoints verify runs/demo
    """
    folder = find_run(run)
    from pretrain.checkpoint.verify import list_commits, verify_commit

    problems = [problem for path in list_commits(folder.checkpoints) for problem in verify_commit(path)]
    report_problems(f"{folder.checkpoints} ({len(list_commits(folder.checkpoints))} commits)", problems, as_json, FALL_BACK)


checkpoints_app.command("import")(checkpoints.import_commit)
checkpoints_app.command("export")(checkpoints.export_commit)
checkpoints_app.command("matrix")(checkpoints.matrix)


def _set_aside(folder: "RunFolder") -> None:
    """Nothing is deleted, and nothing is taken from under an attempt that is running."""
    from pretrain.run.lease import Lease

    if folder.path.is_dir():
        with Lease(folder):
            aside = folder.set_aside()
        if aside is not None:
            say(f"the run that was in {folder.path} is now in {aside}")


def _refuse_a_moved_run(run_file: Path, config: "RunConfig") -> None:
    """A `run.yaml` inside a run folder names that folder; in a copy it would go on with the original."""
    from pretrain.run.folder import RunFolder

    here, named = run_file.resolve().parent, RunFolder.of(config).path
    if run_file.name == "run.yaml" and (here / "environment.json").is_file() and here != named:
        raise UserError(
            f"{run_file} is in another run folder than it names ({named}); to go on here: run.root={here.parent} run.name={here.name}."
        )


def _refuse_damaged_data(folder: Path) -> None:
    from data_pipeline.manifest import load_manifest
    from data_pipeline.verify import dataset_bytes, verify_dataset

    if (size := dataset_bytes(load_manifest(folder))) > 2e9:
        say(f"verifying {size / 1e9:.0f} GB of shards (data.verify_before_training=false leaves it out)")
    if problems := verify_dataset(folder):
        raise UserError(f"{folder} is damaged: {'; '.join(problems[:3])}. {data.REPAIR}")


def main() -> None:
    """Entry point of the command."""
    redact_output()
    # All end a verb as Ctrl-C does. While ranks run, the supervisor passes them on instead.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` and `&` of a shell ask for that
            signal.signal(number, _interrupt)
    try:
        read_secret_files()
        status = app(prog_name="pretrain", standalone_mode=False)
    except UserError as error:
        say(f"error: {error}")
        status = EXIT_MISTAKE
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as ended:  # while Ray starts, it answers SIGTERM itself, by ending with the signal's number
        status = INTERRUPTED if ended.code == signal.SIGTERM else ended.code
        if isinstance(ended.__context__, BrokenPipeError):  # typer's own answer to it
            status = _stop_writing()
    except BrokenPipeError:
        status = _stop_writing()
    except OSError as error:
        if error.errno not in NOT_A_DEFECT:
            raise
        say(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror}.")
        status = EXIT_MISTAKE
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer carries its own copy of click's classes, by version
        if show is None:
            raise
        show()
        status = EXIT_MISTAKE
    if status == INTERRUPTED:
        goes_on = any(sys.argv[1 : 1 + len(verb)] == verb for verb in CONTINUING_VERBS)
        say("interrupted; the same command " + ("goes on where this one was" if goes_on else "begins again"))
        status = EXIT_RESUMABLE if goes_on else INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()  # else the interpreter finds out, and ends with 120
    sys.exit(status)


def _stop_writing() -> int:
    """Who read what is printed has seen enough (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_DONE


class Interrupted(KeyboardInterrupt):
    """A class of its own: once KeyboardInterrupt itself has passed through code run by `exec` (torch's import does that),
    CPython ends by SIGINT, whatever exit status is asked for."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


if __name__ == "__main__":
    main()
