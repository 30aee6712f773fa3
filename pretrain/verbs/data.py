"""The verbs `pretrain data ...`: token shards are built, looked at, compared, verified and traced.

Rooms are imported when a verb is called, so that `pretrain --help` answers at once.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.errors import EXIT_RESUMABLE, UserError
from pretrain.verbs.arguments import (
    EXIT_DIFFERENT,
    AsJson,
    DataArgument,
    Overrides,
    RunArgument,
    RunFile,
    find_data,
    find_run,
    report_problems,
    say,
)

REPAIR = "To repair it: `pretrain data build RUN.yaml --rebuild` keeps what is whole and makes the rest again."

app = typer.Typer(no_args_is_help=True, help="Token shards: build them from text, look at them, compare and verify them, trace them.")


@app.command("build")
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
        build_with_progress(data, say, rebuild)
    except KeyboardInterrupt:
        say(f"interrupted; the finished units in {data.folder()} are kept, and the same command goes on where this one was")
        raise typer.Exit(EXIT_RESUMABLE) from None


@app.command("show")
def data_show(data: DataArgument, as_json: AsJson = False) -> None:
    """Print what a dataset holds.

    That is: counts by split and source, the mixture, what was left out and why, rules, libraries, and how a few documents begin.

    Example: pretrain data show datasets/demo
    """
    from data_pipeline.show import show_dataset
    from pretrain.data_view import tell_dataset
    from pretrain.page import open_page

    found = show_dataset(find_data(data))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_dataset(found, open_page())


@app.command("sample")
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

    folder = find_data(data)
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


@app.command("diff")
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

    found = compare_datasets(find_data(a), find_data(b))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tell_differences(found, open_page())
    if not found["equal"]:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command("rules")
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


@app.command("mixture")
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


@app.command("trace")
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
    folder = find_run(run)
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


@app.command("verify")
def data_verify(data: DataArgument, as_json: AsJson = False) -> None:
    """Compare every byte of a dataset with its manifest. Exit status 2 when something differs.

    That is tokenizer.json and every shard with its index and sidecar. Not unit.json, report.json, plan.json and dropped/: who
    trains trusts none of them, and a build takes a unit over only when each of its files is as its unit.json says.

    Example: pretrain data verify datasets/demo
    """
    from pretrain.data_view import verify_with_progress

    folder = find_data(data)
    report_problems(str(folder), verify_with_progress(folder, say), as_json, REPAIR)
