"""The verb `compare`: what two runs differ in, and whether it is more than noise.

In: two run folders. Out: the difference of their losses with 95 % intervals, of their held-out losses, speed, memory and goodput, and the
keys of their configurations that differ; as text or JSON. How differences are reckoned stands in `pretrain/watch/compare.py`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.verbs.arguments import AsJson

if TYPE_CHECKING:
    from configs.changes import Change
    from pretrain.checkpoint.verify import Commit
    from pretrain.run.folder import RunFolder
    from pretrain.watch.compare import Comparison, LossDifference

ORDER_KEYS = (
    *("run.seed", "mixture.stages", "objective.kind", "start_from", "start_with"),
    *("training.sequence_length", "training.packing", "training.global_batch_samples", "training.batch_ramp"),
    "training.fill_in_the_middle",
)
"""Keys, or sections, that decide which samples a step learns from, besides the data."""
SHOWN_EVALUATIONS = 5


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN_A", help="A run folder, a name below runs/, or a run file.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="RUN_B", help="The run whose values are told relative to RUN_A's.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two runs at equal numbers of tokens: loss with a 95 % interval, held-out loss, speed, memory, goodput, differing keys.

    Every difference is RUN_B less RUN_A. Where both saw the same samples in the same order, rows of the same step are compared, which
    tells much smaller differences.

    Example: pretrain compare runs/base runs/hot
    """
    from configs.changes import changes_between
    from pretrain.verbs.status import find
    from pretrain.watch.compare import compare_runs
    from pretrain.watch.metrics import read_run

    runs = [find(text) for text in (first, second)]
    changes = [one for one in changes_between(*(run.load_config() for run in runs)) if one.key not in ("run.name", "run.root")]
    tables = [read_run(run.path) for run in runs]
    commits = _newest_common_commits(*runs)
    doubt = _find_other_samples(changes, commits, any("rollback/number" in table.column_names for table in tables))
    found = compare_runs(tables[0], tables[1], same_samples=doubt is None)
    goodputs = [_goodput(run) for run in runs]
    same_tokenizer = _is_same_tokenizer(changes, commits)
    if as_json:
        keys = {change.key: [change.old, change.new] for change in changes}
        about = {"runs": [str(run.path) for run in runs], "not_paired_because": doubt, "same_tokenizer": same_tokenizer}
        typer.echo(json.dumps(about | asdict(found) | {"goodput": goodputs, "differing_keys": keys}))
        return
    names = [run.path.name for run in runs]
    for line in _tell(found, names, doubt, goodputs, same_tokenizer):
        typer.echo(line)
    _tell_keys(changes, names)


def _newest_common_commits(first: "RunFolder", second: "RunFolder") -> "tuple[Commit, Commit] | None":
    """Of the newest step that both have committed, intact."""
    from pretrain.checkpoint.verify import commit_folder_of, list_commits, read_whole_commit

    steps = [{folder.name for folder in list_commits(run.checkpoints)} for run in (first, second)]
    for name in sorted(steps[0] & steps[1], key=lambda name: int(name.rpartition("-")[2]), reverse=True):
        step = int(name.rpartition("-")[2])
        one, two = (read_whole_commit(commit_folder_of(run.checkpoints, step)) for run in (first, second))
        if one is not None and two is not None:
            return one, two
    return None


def _find_other_samples(changes: "Sequence[Change]", commits: "tuple[Commit, Commit] | None", went_back: bool) -> str | None:
    """Why equal numbers of tokens need not be the same samples; None: they are."""
    for change in changes:
        if any(change.key == key or change.key.startswith(f"{key}.") for key in ORDER_KEYS):
            return f"{change.key} differs"
    if went_back or (commits and commits[0].state.skipped_samples != commits[1].state.skipped_samples):
        return "one of them went back and left samples out"
    if commits is not None:
        return None if commits[0].identity == commits[1].identity else f"their data differs up to step {commits[0].state.step:,}"
    return next((f"{one.key} differs" for one in changes if one.key.startswith("data.") and one.at_resume != "free"), None)


def _is_same_tokenizer(changes: "Sequence[Change]", commits: "tuple[Commit, Commit] | None") -> bool:
    if commits is not None and all("tokenizer" in commit.identity for commit in commits):
        return commits[0].identity["tokenizer"] == commits[1].identity["tokenizer"]
    return not any(change.key.startswith("data.tokenizer") for change in changes)


def _goodput(run: "RunFolder") -> float | None:
    """Where the run has a timeline."""
    from pretrain.watch.ledger import read_ledger

    return read_ledger(run.path).goodput if (run.path / "timeline.jsonl").is_file() else None


def _tell(
    found: "Comparison", names: Sequence[str], doubt: str | None, goodputs: Sequence[float | None], same_tokenizer: bool
) -> Iterator[str]:
    """The comparison in lines."""
    from pretrain.watch.spelling import spell_bytes, spell_count

    if found.last_tokens <= found.first_tokens:
        yield f"{names[0]} and {names[1]} have no range of tokens in common in which both logged a loss."
    else:
        yield f"{names[1]} less {names[0]}, from {spell_count(found.first_tokens)} to {spell_count(found.last_tokens)} tokens:"
        if not same_tokenizer:
            yield "Their tokenizers differ: losses per token are of different tokens. Compare bits per byte."
        yield from _tell_losses(found, names, doubt)
    for one in found.held_out[-SHOWN_EVALUATIONS:]:
        bits = "" if one.difference_bits_per_byte is None else f", {one.difference_bits_per_byte:+.4f} bits per byte"
        yield f"held out at {spell_count(one.tokens)} tokens: {one.difference_nats_per_token:+.4f} nats per token{bits}"
    if not found.held_out:
        yield "held out: no evaluation after the same number of tokens"
    spell_share: Callable[[float], str] = lambda share: f"{100 * share:.0f} %"  # noqa: E731
    for what, values, spell in (
        ("tokens/s", (found.first_tokens_per_second, found.second_tokens_per_second), spell_count),
        ("memory", (found.first_memory_bytes, found.second_memory_bytes), spell_bytes),
        ("goodput", goodputs, spell_share),
    ):
        one, two = values
        if one is not None and two is not None:
            yield f"{what}: {spell(two)} against {spell(one)}" + (f", {two / one:.3f} times" if one else "")


def _tell_losses(found: "Comparison", names: Sequence[str], doubt: str | None) -> Iterator[str]:
    from pretrain.watch.compare import LEAST_ROWS

    last, *_ = found.losses
    if last.difference is None:
        wanted = f"logged rows, wanted {LEAST_ROWS}. Train on, or log more often (watch.log_every_steps)."
        yield f"The range is too short to tell: its last tenth has {last.num_rows} {wanted}"
        return
    if last.is_told:
        yield f"{names[1] if last.difference < 0 else names[0]} has the lower loss in the last tenth, beyond the noise of the curves."
    elif last.difference == last.low == last.high == 0:
        yield "Their losses are the same, row by row."
    else:
        yield "Which has the lower loss in the last tenth cannot be told from noise."
    yield from map(_tell_loss, found.losses)
    why = (
        "both saw the same samples in the same order; rows are compared in pairs"
        if found.is_paired
        else (f"not in pairs, as {doubt or 'too few rows are of the same steps'}: each curve's own noise counts")
    )
    yield f"({why}; another seed may differ by more)"


def _tell_loss(one: "LossDifference") -> str:
    from pretrain.watch.spelling import spell_count

    place = f"loss {one.where:<10} ({spell_count(one.tokens)} tokens)"
    if one.difference is None:
        return f"{place}: too few rows to tell ({one.num_rows})"
    return f"{place}: {one.difference:+.4f} nats per token, 95 %: {one.low:+.4f} to {one.high:+.4f}"


def _tell_keys(changes: "Sequence[Change]", names: Sequence[str]) -> None:
    from pretrain.page import make_visible, open_page

    if not changes:
        typer.echo("No key of their configurations differs.")
        return
    rows: list[Sequence[str]] = [(change.key, _spell(change.old), _spell(change.new)) for change in changes]
    open_page().table(("key", *map(make_visible, names)), rows)


def _spell(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
