"""What a run will see of each source: `pretrain data mixture`, and the check of repeats before `pretrain train`.

In: a resolved configuration, of which the dataset's manifest is opened. Out: plain values, ready for JSON, and the same as
tables; or a refusal of too many epochs. No token is read, and no torch is loaded; where documents are chopped, the index of
some shards is read, which says where they start.
"""

from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.manifest import load_manifest
from data_pipeline.packing import count_chopped
from data_pipeline.records import ShardRecord
from data_pipeline.report import describe_packing, sum_packing
from data_pipeline.shards import Shard
from pretrain.checkpoint.verify import newest_readable_commit
from pretrain.data.corpus import open_corpus
from pretrain.data.order import DataOrder
from pretrain.data.remote import described_in
from pretrain.data_view import PACKING_HEADERS, spell_packing
from pretrain.page import Page
from pretrain.run.folder import RunFolder

COUNTED_SHARDS = 64
"""Of a source, evenly chosen: the documents that chopping cuts are counted in no more, or a large corpus would take hours."""
GOOD_EPOCHS = 4
"""Up to here repeated text is almost as good as new (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models")."""


def check_repeats(config: RunConfig) -> list[str]:
    """What is to be said of sources that are seen too often: sentences, of which there are none beside a limit of one's own.

    Raises UserError where a source is seen more often than `mixture.max_epochs`, and as `open_corpus` and `DataOrder` do.
    """
    return _judge_repeats(config, _order(config))


def _judge_repeats(config: RunConfig, order: DataOrder) -> list[str]:
    limit = config.mixture.max_epochs
    training = config.training
    total = training.steps.total_samples
    epochs, cursors = order.epochs(total), order.mixture.cursors(total)
    often = [source for source in order.sources if epochs[source.name] > (limit or GOOD_EPOCHS)]
    if not often:
        return []
    names = ", ".join(source.name for source in often)
    numbers = ", ".join(
        f"{source.name} {_spell_epochs(epochs[source.name])} times ({cursors[source.name]:,} samples of {source.num_samples:,})"
        for source in often
    )
    if limit is None:
        return [
            f"this run sees {numbers}. Up to {GOOD_EPOCHS} times text is almost as good as new, beyond each time teaches less (Muennighoff "
            "et al. 2023); mixture.max_epochs sets a limit."
        ]
    fewer = _largest_total(config, order, limit)
    raise UserError(
        f"mixture.max_epochs is {limit:g}, and this run would see {numbers}. "
        f"{f'Lower training.total_tokens to {fewer} at most, or give' if fewer else 'Give'} {names} less weight, add text to it, or raise "
        "mixture.max_epochs."
    )


def _largest_total(config: RunConfig, order: DataOrder, limit: float) -> int | None:
    """The most tokens in whole steps for which no source is seen more often; None where the last stage or size of a step is not reached."""
    steps = config.training.steps
    fits, too_many = 0, steps.total_steps
    while fits < too_many - 1:
        middle = (fits + too_many) // 2
        if max(order.epochs(steps.samples_before(middle)).values()) <= limit:
            fits = middle
        else:
            too_many = middle
    num_samples = steps.samples_before(fits)
    begins = max(order.mixture.stages[-1].first_sample, steps.phases[-1].first_sample) < num_samples
    return num_samples * config.training.sequence_length if begins else None


def describe_mixture(config: RunConfig, step: int | None = None) -> dict[str, Any]:
    """What each stage and the run as a whole see of each source; with `step`, also how much of it has been seen by then.

    What a run that has begun leaves out on purpose does not count. Raises UserError as `check_repeats` does, but for repeats.
    """
    training = config.training
    if step is not None and not 0 <= step <= training.total_steps:
        raise UserError(f"the run has the steps 1 to {training.total_steps}, asked for step {step}.")
    order = _order(config)
    if progress := newest_readable_commit(RunFolder.of(config).checkpoints):
        order = order.skipping(progress.state.skipped_samples)
    total = training.steps.total_samples
    end = _number_behind(order, total)
    bounds = [*(stage.first_sample for stage in order.mixture.stages), end]
    stages: list[dict[str, Any]] = []
    for stage, first, behind in zip(order.mixture.stages, bounds[:-1], bounds[1:], strict=True):
        seen, by_its_end = _count(order, first, behind), _count(order, 0, behind)
        before = sum(_count(order, 0, first).values())
        stages.append(
            {
                "first_step": training.steps.step_of(before) + 1,
                "num_steps": training.steps.step_of(before + sum(seen.values())) - training.steps.step_of(before),
                "first_token": before * training.sequence_length,
                "num_tokens": sum(seen.values()) * training.sequence_length,
                "sequence_length": stage.sequence_length,
                "sources": {
                    source.name: {"share": int(count) / stage.interleaving.period}
                    | _amount(config, seen[source.name], source.num_samples)
                    | {"epochs_by_its_end": _epochs(by_its_end[source.name], source.num_samples)}
                    for source, count in zip(order.sources, stage.interleaving.counts_S, strict=True)
                },
            }
        )
    seen, built = _count(order, 0, end), _measure_sources(config, order)
    now = None if step is None else _count(order, 0, _number_behind(order, training.steps.samples_before(step)))
    sources = {
        source.name: {"samples_per_epoch": source.num_samples}
        | built[source.name]
        | _amount(config, seen[source.name], source.num_samples)
        | ({} if now is None else {"by_now": _amount(config, now[source.name], source.num_samples)})
        for source in order.sources
    }
    return {
        "dataset": config.data.folder(),
        "packing": training.packing,
        "sequence_length": training.sequence_length,
        "global_batch_samples": training.global_batch_samples,
        "batch_ramp": [section.model_dump() for section in training.batch_ramp],
        "total_steps": training.total_steps,
        "total_tokens": total * training.sequence_length,
        "max_epochs": config.mixture.max_epochs,
        "one_epoch": sum_packing(training.sequence_length, [one["one_epoch"] for one in built.values()]),
        "step": step,
        "stages": stages,
        "sources": sources,
        "too_small": [source.name for source in order.sources if not source.num_samples],
        "problems": _list_problems(config, order),
    }


def _order(config: RunConfig) -> DataOrder:
    return DataOrder(open_corpus(config).sources, config.mixture, config.training, config.run.seed)


def _number_behind(order: DataOrder, seen: int) -> int:
    """The number behind the last of the first `seen` samples."""
    return int(order.numbers(seen - 1, 1)[0]) + 1 if seen else 0


def _count(order: DataOrder, first: int, end: int) -> dict[str, int]:
    """Samples of each source with the numbers [first, end), without those that are skipped on purpose."""
    ranges = [(first, end, 1), *((max(first, start), min(end, stop), -1) for start, stop in order.skipped)]
    cursors = [(order.mixture.cursors(start), order.mixture.cursors(stop), sign) for start, stop, sign in ranges if start < stop]
    return {source.name: sum(sign * (stop[source.name] - start[source.name]) for start, stop, sign in cursors) for source in order.sources}


def _amount(config: RunConfig, samples: int, per_epoch: int) -> dict[str, Any]:
    return {"samples": samples, "tokens": samples * config.training.sequence_length, "epochs": _epochs(samples, per_epoch)}


def _epochs(samples: int, per_epoch: int) -> float:
    return samples / max(1, per_epoch)


def _measure_sources(config: RunConfig, order: DataOrder) -> dict[str, dict[str, Any]]:
    """Of each source the tokens that were built, what making samples of them leaves over or adds, and what it does to documents."""
    folder, length, packed = described_in(config.data), config.training.sequence_length, config.training.packing == "best_fit"
    shards: dict[str, list[ShardRecord]] = {source.name: [] for source in order.sources}
    for shard in load_manifest(folder).shards("train"):
        (name,) = shard.sources
        shards[name].append(shard)
    found: dict[str, dict[str, Any]] = {}
    for source in order.sources:
        num_tokens = num_documents = documents_cut = padding_tokens = 0
        every = -(-len(shards[source.name]) // COUNTED_SHARDS)
        for number, shard in enumerate(shards[source.name]):
            if packed:
                num_documents += shard.num_documents
                documents_cut += shard.packings[str(length)].documents_cut
                padding_tokens += shard.packings[str(length)].padding_tokens
            elif number % every == 0 and not config.data.is_remote:
                num_documents += shard.num_documents
                documents_cut += _count_cut(folder / shard.name, num_tokens % length, length)
            num_tokens += shard.num_tokens
        found[source.name] = {
            "tokens_built": num_tokens,
            "left_over_tokens": 0 if packed else num_tokens % length,
            "padding_tokens": padding_tokens,
            "one_epoch": describe_packing(length, source.num_samples, num_documents, documents_cut, padding_tokens),
        }
    return found


def _count_cut(prefix: Path, num_before: int, length: int) -> int:
    """Documents of a shard that lie in more than one sample, when the sample that is open at its start has `num_before` tokens.

    At a source's end the tokens that are left over count as a sample: whatever reaches into them is cut.
    """
    starts = Shard(prefix).document_starts
    # The tokens before are like one more document, shorter than a sample: it is never cut.
    return count_chopped(np.concatenate([[0], num_before + starts]), length).documents_cut


def _list_problems(config: RunConfig, order: DataOrder) -> list[str]:
    try:
        return _judge_repeats(config, order)
    except UserError as error:  # here it is what was asked for
        return [str(error)]


# --- as tables ----------------------------------------------------------------------------------------------


def tell_mixture(found: dict[str, Any], page: Page) -> None:
    """What `describe_mixture` found."""
    length = found["sequence_length"]
    smaller = "".join(f"{section['global_batch_samples']:,} to " for section in found["batch_ramp"][:1])
    page.say(
        f"{found['dataset']}: {found['total_steps']:,} steps of {smaller}{found['global_batch_samples']:,} samples of {length:,} tokens, "
        f"{found['total_tokens']:,} tokens; packing {found['packing']}"
    )
    for number, stage in enumerate(found["stages"], 1):
        cut = f", in sequences of {stage['sequence_length']:,}" if stage["sequence_length"] < length else ""
        now = " (now)" if _is_now(stage, found["step"]) else ""
        page.say(
            f"\nstage {number}{now}: {stage['num_steps']:,} steps from step {stage['first_step']:,} on, {stage['num_tokens']:,} tokens "
            f"from token {stage['first_token']:,} on{cut}"
        )
        rows = [_stage_row(name, one) for name, one in stage["sources"].items() if one["share"]]
        page.table(("source", "% of samples", "samples", "tokens", "epochs", "epochs by its end"), rows)
        if resting := [name for name, one in stage["sources"].items() if not one["share"]]:
            page.say(f"resting: {', '.join(resting)}")
    page.say("\nthe run")
    headers = ["source", "tokens built", "left over" if found["packing"] == "chop" else "padding", "samples per epoch"]
    headers += ["samples", "tokens", "epochs"]
    if found["step"] is not None:
        headers += [f"samples by step {found['step']:,}", "epochs by then"]
    page.table(headers, [_run_row(name, one, found["packing"]) for name, one in found["sources"].items()])
    page.say(f"\none epoch, packing {found['packing']}")
    rows = [[name, *spell_packing(one["one_epoch"])] for name, one in found["sources"].items()]
    page.table(("source", *PACKING_HEADERS), [*rows, *([["all", *spell_packing(found["one_epoch"])]] if len(rows) > 1 else [])])
    if found["too_small"]:
        page.say(f"\nless text than one sample, never seen: {', '.join(found['too_small'])}")
    for problem in found["problems"]:
        page.say(f"\nWARNING: {problem}")


def _is_now(stage: dict[str, Any], step: int | None) -> bool:
    """Whether the step that comes next is of this stage."""
    return step is not None and stage["first_step"] <= step + 1 < stage["first_step"] + stage["num_steps"]


def _stage_row(name: str, one: dict[str, Any]) -> list[str]:
    epochs = (_spell_epochs(one[key]) for key in ("epochs", "epochs_by_its_end"))
    return [name, f"{100 * one['share']:.2f}", f"{one['samples']:,}", f"{one['tokens']:,}", *epochs]


def _run_row(name: str, one: dict[str, Any], packing: str) -> list[str]:
    counts = [one["tokens_built"], one["left_over_tokens" if packing == "chop" else "padding_tokens"], one["samples_per_epoch"]]
    row = [name, *(f"{count:,}" for count in (*counts, one["samples"], one["tokens"])), _spell_epochs(one["epochs"])]
    if "by_now" in one:
        row += [f"{one['by_now']['samples']:,}", _spell_epochs(one["by_now"]["epochs"])]
    return row


def _spell_epochs(epochs: float) -> str:
    return f"{epochs:,.2f}" if epochs >= 0.01 or not epochs else f"{epochs:.2g}"
