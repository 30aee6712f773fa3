"""The command `pretrain`: verbs, their arguments, what they print, and the exit status.

Rooms are imported when a verb is called, so that `pretrain --help` answers at once.
Exit status: 0 done; 1 `data diff` found a difference; 2 the user's mistake, in one or two sentences; 75 stopped early, can be
resumed; else a defect.
"""

import errno
import importlib.metadata
import json
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from pretrain.run.folder import RunFolder

EXIT_DONE, EXIT_DIFFERENT, EXIT_MISTAKE, EXIT_RESUMABLE = 0, 1, 2, 75
INTERRUPTED = 130
"""What typer makes of Ctrl-C."""
FALL_BACK = "Training falls back to the newest commit that is whole and moves this one aside."
REPAIR = "To repair it: `pretrain data build RUN.yaml --rebuild` keeps what is whole and makes the rest again."
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
data_app = typer.Typer(no_args_is_help=True, help="Token shards: build them from text, look at them, compare and verify them, trace them.")
config_app = typer.Typer(no_args_is_help=True, help="Run files.")
checkpoints_app = typer.Typer(no_args_is_help=True, help="The commits of a run.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(checkpoints_app, name="checkpoints")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="A run file, such as configs/runs/demo.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Dotted overrides, such as optimizer.peak_lr=3e-4.", show_default=False)
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a name below runs/, or a run file.", show_default=False)]
DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="A folder of built shards, or a run file.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
) -> None:
    """Everything, end to end, on this machine, in minutes: text, tokenizer, shards, training, a stop, a resume, a paragraph.

    Example: pretrain demo --corpus my-notes/
    """
    from pretrain.demo import run_demo

    raise typer.Exit(run_demo(corpus, prompt))


@app.command()
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train on this machine, on all its devices. Started again, the same file continues its run.

    Example: pretrain train configs/runs/demo.yaml run.name=hot optimizer.peak_lr=1e-2
    """
    from configs.loader import load_config

    config = load_config(run_file, overrides or [])
    from pretrain.checkpoint.verify import is_committed
    from pretrain.data.corpus import open_corpus
    from pretrain.data.order import DataOrder
    from pretrain.data.remote import described_in
    from pretrain.mixture_view import check_repeats
    from pretrain.run.folder import RunFolder
    from pretrain.run.supervisor import supervise

    _refuse_a_moved_run(run_file, config)
    corpus = open_corpus(config)  # unfinished or unfit data is said before anything is made or started
    DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)  # and so is a mixture that does not fit it
    while not corpus.has_begun:
        awaited = ", ".join(source.name for source in corpus.sources if not source.has_begun)
        _say(f"waiting for the first unit of {awaited} in {config.data.folder()}")
        time.sleep(10)
        corpus = open_corpus(config)
    if not is_committed(RunFolder.of(config).checkpoints, config.training.total_steps):
        for warning in check_repeats(config):
            _say(f"WARNING: {warning}")
        if config.data.verify_before_training:
            _refuse_damaged_data(Path(config.data.folder()))
    raise typer.Exit(supervise(config, described_in(config.data), _say, is_committed))


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="Choose among the likeliest tokens that reach this probability.", show_default=False),
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed writes the same text.")] = 0,
) -> None:
    """Let the newest checkpoint of a run continue a text, to the end-of-text token.

    Example: pretrain generate runs/demo --prompt "def read_file(path):" --temperature 0.6
    """
    folder = _find_run(run)
    from pretrain.write import write_text

    for piece in write_text(
        folder, prompt, say=_say, max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        typer.echo(piece, nl=False)
    typer.echo()


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a run file as it is resolved, with every default; the output is itself a valid run file.

    Example: pretrain config show configs/runs/demo.yaml training.global_batch_samples=8
    """
    from configs.loader import dump_config, load_config

    config = load_config(run_file, overrides or [])
    typer.echo(json.dumps(config.model_dump(mode="json"), indent=1) if as_json else dump_config(config), nl=as_json)


@data_app.command("build")
def data_build(
    run_file: RunFile,
    overrides: Overrides = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Keep of what lies there all that is whole and still fits, and make the rest anew.")
    ] = False,
) -> None:
    """Build the dataset of a run file. A killed build goes on where it was.

    It tells how far it is: by bars in a terminal, elsewhere by a line where a stage starts, one where it has ended, and one every
    30 seconds. Interrupted, it ends with exit status 75.

    Example: pretrain data build configs/runs/demo.yaml data.workers=2
    """
    from configs.loader import load_config
    from pretrain.build import build_with_progress

    data = load_config(run_file, overrides or []).data
    try:
        build_with_progress(data, _say, rebuild)
    except KeyboardInterrupt:
        _say(f"interrupted; the finished units in {data.folder()} are kept, and the same command goes on where this one was")
        raise typer.Exit(EXIT_RESUMABLE) from None


@data_app.command("show")
def data_show(data: DataArgument, as_json: AsJson = False) -> None:
    """Print what a dataset holds.

    That is: counts by split and source, the mixture, what was left out and why, rules, libraries, and how a few documents begin.

    Example: pretrain data show datasets/demo
    """
    from data_pipeline.show import show_dataset
    from pretrain.data_view import tell_dataset
    from pretrain.page import open_page

    found = show_dataset(_find_data(data))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_dataset(found, open_page())


@data_app.command("sample")
def data_sample(
    data: DataArgument,
    source: Annotated[str | None, typer.Option(help="Only of this source; without it, of all.", show_default=False)] = None,
    count: Annotated[int, typer.Option(min=1, help="So many documents.")] = 3,
    split: Annotated[Literal["train", "held_out"], typer.Option(help="Of this split.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="The same seed chooses the same documents.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Show so many tokens of each.")] = 200,
    document: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only the document of this id, or of this name; of either split.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print documents as the model sees them.

    Their tokens are told apart by two backgrounds in a terminal, elsewhere by a |. Control characters are shown; \\xNN is a byte
    of a character that several tokens share.

    Example: pretrain data sample datasets/demo --source stdlib --count 2 --tokens 80
    """
    from dataclasses import asdict

    from data_pipeline.show import find_document, sample_documents
    from pretrain.data_view import tell_document
    from pretrain.page import open_page

    folder = _find_data(data)
    if document is not None:
        found = [find_document(folder, document, source, tokens)]
    else:
        found = sample_documents(folder, source, split, count, seed, tokens)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
        return
    page = open_page()
    for number, one in enumerate(found):
        if number:
            typer.echo()
        tell_document(one, page)


@data_app.command("diff")
def data_diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A folder of built shards, or a run file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print in what two datasets differ.

    That is: configuration, rules, libraries, tokenizer, inputs, counts, shards and documents. Exit status, as that of diff: 0
    when the manifests are equal byte for byte, 1 when they differ. Documents are compared by id, numbers of tokens and bytes, and
    split; that takes at most 48 bytes of memory for each that stands in shards which differ.

    Example: pretrain data diff datasets/demo datasets/demo-cleaned
    """
    from data_pipeline.compare import compare_datasets
    from pretrain.data_view import tell_differences
    from pretrain.page import open_page

    found = compare_datasets(_find_data(a), _find_data(b))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_differences(found, open_page())
    if not found["equal"]:
        raise typer.Exit(EXIT_DIFFERENT)


@data_app.command("rules")
def data_rules(as_json: AsJson = False) -> None:
    """Print every rule that data.clean may name.

    Each with its settings and their defaults, and below it what it does.

    Example: pretrain data rules
    """
    from data_pipeline.cleaning import describe_rules
    from pretrain.data_view import tell_rules
    from pretrain.page import open_page

    rules = describe_rules()
    if as_json:
        typer.echo(json.dumps(rules))
    else:
        tell_rules(rules, open_page())


@data_app.command("mixture")
def data_mixture(
    run_file: RunFile,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(min=0, help="Also what has been seen when this step is done.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run will see of each source: by stage and as a whole, in samples, tokens and epochs.

    Also which sources rest, which are too small for one sample, and what is left over at a source's end. A token is not read.

    Example: pretrain data mixture configs/runs/demo.yaml training.total_tokens=1_000_000_000
    """
    from configs.loader import load_config
    from pretrain.mixture_view import describe_mixture, tell_mixture
    from pretrain.page import open_page

    found = describe_mixture(load_config(run_file, overrides or []), step)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_mixture(found, open_page())


@data_app.command("trace")
def data_trace(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="What this step learns from; 1 is the first update.", show_default=False)] = None,
    from_step: Annotated[int | None, typer.Option(help="What the steps from this one on learn from, ...", show_default=False)] = None,
    to_step: Annotated[int | None, typer.Option(help="... up to this one.", show_default=False)] = None,
    sample: Annotated[int | None, typer.Option(help="What this sample of the order is; 0 is the first.", show_default=False)] = None,
    document: Annotated[
        str | None, typer.Option(metavar="ID", help="When the document of this id, or of this name, is seen.", show_default=False)
    ] = None,
    source: Annotated[str | None, typer.Option(help="Only of this source; without it, of all.", show_default=False)] = None,
    text: Annotated[int, typer.Option(min=0, help="Show so many characters of each part of a document; 0: no text.")] = 80,
    as_json: AsJson = False,
) -> None:
    """Print which documents a run saw when: those of a step or a sample, or the steps of a document.

    Asked with one of --step, --from-step with --to-step, --sample, --document. Computed from the run's run.yaml, the dataset's
    manifest and the seed: nothing is replayed and no weights are loaded. --document reads the ids of one shard after the other.

    Example: pretrain data trace runs/demo --step 120 --text 200
    """
    questions = {"--step": step, "--from-step with --to-step": from_step or to_step, "--sample": sample, "--document": document}
    asked = [name for name, value in questions.items() if value is not None]
    if (from_step is None) != (to_step is None):
        raise UserError(f"found {'--from-step' if to_step is None else '--to-step'} alone; wanted --from-step with --to-step.")
    if len(asked) != 1:
        raise UserError(f"found {' and '.join(asked) or 'no question'}; wanted exactly one of {', '.join(questions)}.")
    folder = _find_run(run)
    from dataclasses import asdict

    from pretrain.page import open_page
    from pretrain.trace import Trace, describe_run, tell_samples, tell_traced_document

    trace = Trace(folder)
    if document is not None:
        found = trace.document(document, source)
        answer: dict[str, Any] = {"document": asdict(found)}
        tell = partial(tell_traced_document, trace, found)
    else:
        first, last = (step, step) if step is not None else (from_step, to_step)
        samples = [trace.sample(sample, text)] if sample is not None else trace.steps(first or 0, last or 0, source, text)
        answer = {"samples": [asdict(one) for one in samples]}
        tell = partial(tell_samples, trace, samples)
    if as_json:
        typer.echo(json.dumps(describe_run(trace) | answer))
    else:
        tell(open_page())


@data_app.command("verify")
def data_verify(data: DataArgument, as_json: AsJson = False) -> None:
    """Compare every byte of a dataset with its manifest. Exit status 2 when something differs.

    That is tokenizer.json and every shard with its index and sidecar. Not unit.json, report.json, plan.json and dropped/: who
    trains trusts none of them, and a build takes a unit over only when each of its files is as its unit.json says.

    Example: pretrain data verify datasets/demo
    """
    from pretrain.data_view import verify_with_progress

    folder = _find_data(data)
    _report_problems(str(folder), verify_with_progress(folder, _say), as_json, REPAIR)


@checkpoints_app.command("list")
def checkpoints_list(run: RunArgument, as_json: AsJson = False) -> None:
    """Print the commits of a run, newest first.

    Example: pretrain checkpoints list runs/demo
    """
    folder = _find_run(run)
    from pretrain.checkpoint.verify import list_commits, read_commit

    rows: list[dict[str, Any]] = []
    for path in list_commits(folder.checkpoints):
        try:
            commit = read_commit(path)
        except ValueError as error:
            rows.append({"name": path.name, "problem": str(error)})
            continue
        size = sum(known["bytes"] for known in commit.files.values())
        rows.append({"name": path.name, **commit.state.to_json(), "bytes": size, "ranks": commit.world_size, "attempt": commit.attempt})
    if as_json:
        typer.echo(json.dumps(rows))
    elif not rows:
        typer.echo(f"{folder.checkpoints}: no commits yet")
    for row in rows if not as_json else []:
        known = f"{row['tokens_seen']:,} tokens, {row['bytes'] / 1e6:.1f} MB, {row['ranks']} ranks" if "bytes" in row else row["problem"]
        typer.echo(f"{row['name']}  {known}")


@checkpoints_app.command("verify")
def checkpoints_verify(run: RunArgument, as_json: AsJson = False) -> None:
    """Read every byte of every commit and compare it with its manifest. Exit status 2 when something differs.

    Example: pretrain checkpoints verify runs/demo
    """
    folder = _find_run(run)
    from pretrain.checkpoint.verify import list_commits, verify_commit

    problems = [problem for path in list_commits(folder.checkpoints) for problem in verify_commit(path)]
    _report_problems(f"{folder.checkpoints} ({len(list_commits(folder.checkpoints))} commits)", problems, as_json, FALL_BACK)


def _refuse_a_moved_run(run_file: Path, config: "RunConfig") -> None:
    """A `run.yaml` inside a run folder names that folder; in a copy it would go on with the original."""
    from pretrain.run.folder import RunFolder

    here, named = run_file.resolve().parent, RunFolder.of(config).path
    if run_file.name == "run.yaml" and (here / "environment.json").is_file() and here != named:
        raise UserError(
            f"{run_file} is in another run folder than it names ({named}); to go on here: run.root={here.parent} run.name={here.name}."
        )


def _refuse_damaged_data(folder: Path) -> None:
    from data_pipeline.manifest import dataset_bytes, load_manifest, verify_dataset

    if (size := dataset_bytes(load_manifest(folder))) > 2e9:
        _say(f"verifying {size / 1e9:.0f} GB of shards (data.verify_before_training=false leaves it out)")
    if problems := verify_dataset(folder):
        raise UserError(f"{folder} is damaged: {'; '.join(problems[:3])}. {REPAIR}")


def _find_run(text: str) -> "RunFolder":
    from pretrain.run.folder import RunFolder

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        from configs.loader import load_config

        return RunFolder.existing(RunFolder.of(load_config(path)).path)
    return RunFolder.existing(path if path.exists() or len(path.parts) > 1 else Path("runs") / text)


def _find_data(path: Path) -> Path:
    if path.suffix in (".yaml", ".yml"):
        from configs.loader import load_config
        from pretrain.data.remote import refuse_remote

        config: RunConfig = load_config(path)
        refuse_remote(config.data, "this command")
        return Path(config.data.folder())
    return path


def _report_problems(what: str, problems: list[str], as_json: bool, advice: str) -> None:
    if as_json:
        typer.echo(json.dumps({"verified": what, "problems": problems}))
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{what}: {len(problems)} found to be wrong. {advice}" if problems else f"{what}: every byte is as it was written")
    if problems:
        raise typer.Exit(EXIT_MISTAKE)


def _say(text: str) -> None:
    with suppress(OSError):  # nobody listens any more: no reason to stop
        typer.echo(text, err=True)


def main() -> None:
    """Entry point of the command."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does; while ranks run, the supervisor passes them on instead
        signal.signal(number, _interrupt)
    try:
        status = app(prog_name="pretrain", standalone_mode=False)
    except UserError as error:
        _say(f"error: {error}")
        status = EXIT_MISTAKE
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as ended:  # while Ray starts, it answers SIGTERM itself, by ending with the signal's number
        status = INTERRUPTED if ended.code == signal.SIGTERM else ended.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_DONE
    except OSError as error:
        if error.errno not in NOT_A_DEFECT:
            raise
        _say(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror}.")
        status = EXIT_MISTAKE
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer carries its own copy of click's classes, by version
        if show is None:
            raise
        show()
        status = EXIT_MISTAKE
    if status == INTERRUPTED:
        _say("interrupted; the same command goes on where this one was")
        status = EXIT_RESUMABLE
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
