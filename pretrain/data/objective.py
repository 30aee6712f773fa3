"""What is learnt from a micro-batch: next token, continuations only, prefixes that see both ways, or a function of the user's own.

In: a `MicroBatch` of next tokens, as `batches.make_batch` makes it. Out: one of the same shapes with other labels, and where asked
for with `prefix_BT`. Nothing here has a state: what comes out depends on the tokens alone, so a resumed run, and any number of
ranks, learns the same.

A *segment* is the part of a document that lies in one row: its end of text in front and all that follows up to the next one, or up to
the row's end. Each segment is judged by itself. With `training.packing: chop` a document is cut wherever a row ends: a part behind the
separator has no separator any more and is learnt whole, which is right, for all of it is continuation; a part that ends before its
separator is learnt whole too, which is not what was asked for, but nothing in the row tells it from a text without one. With
`best_fit` only documents longer than a row are cut, so it is what these objectives are for.

A function of the user's own (`objective.kind: package.module:function`) is called as function(batch, **objective.settings) and
returns a `MicroBatch`, best by `dataclasses.replace`. It is given int32 tensors on the CPU, in a thread that reads ahead, and may change
labels (-100: nothing is learnt), `prefix_BT`, documents and positions, but no shape, not in place, and by nothing but what it is given:
no counter, no random state. `num_valid` is counted anew behind it, and `objective.masked_tokens` are masked behind it.

Shapes: B rows, T places of one.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from configs.errors import UserError
from configs.functions import load_function
from configs.schema import RunConfig
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer import end_of_text_id, entry_id, load_tokenizer
from pretrain.data.batches import MicroBatch, Objective
from pretrain.data.remote import described_in
from pretrain.data.samples import IGNORED_LABEL


def open_objective(config: RunConfig) -> Objective | None:
    """The objective of a run, with token texts as ids of the dataset's tokenizer; None: the next token everywhere.

    Raises UserError for an entry that the tokenizer lacks, and for a function that is not there or does not take the settings.
    """
    section = config.objective
    steps: list[Objective] = []
    if ":" in section.kind:
        steps.append(_load_own(section.kind, section.settings))
    if section.separator is not None or section.masked_tokens:
        end_of_text = config.data.tokenizer.end_of_text
        tokenizer = load_tokenizer(described_in(config.data) / TOKENIZER, end_of_text)
        if section.separator is not None:
            separator = entry_id(tokenizer, section.separator, "objective.separator")
            ids = {"separator": separator, "end_of_text": end_of_text_id(tokenizer, end_of_text)}
            steps.append(partial(learn_continuations, **ids, see_prefixes=section.kind == "prefix"))
        if section.masked_tokens:
            masked = [entry_id(tokenizer, token, "objective.masked_tokens") for token in section.masked_tokens]
            steps.append(partial(mask_labels, masked=masked))
    return partial(_in_turn, steps=tuple(steps)) if steps else None


def learn_continuations(batch: MicroBatch, *, separator: int, end_of_text: int, see_prefixes: bool) -> MicroBatch:
    """Of each segment, only what follows its first separator remains a target, the end of text that closes it included.

    The first target is the one that the separator predicts. A segment without a separator stays as it is. With `see_prefixes`, the
    places from a segment's end of text up to its separator are True in `prefix_BT` (Raffel et al. 2020, section 3.2.3).
    """
    tokens_BT, labels_BT = batch.tokens_BT, batch.labels_BT
    # As inputs or as targets: a segment that is cut right before its separator is all prefix, and shows it.
    is_separator_BT, predicts_separator_BT = tokens_BT == separator, labels_BT == separator
    begins_BT = tokens_BT == end_of_text
    begins_BT[:, 1:] |= labels_BT[:, :-1] == end_of_text  # a piece of a longer document, behind a document that was packed before it
    begins_BT[:, 0] = True
    places_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    start_BT = places_BT.where(begins_BT, 0).cummax(1).values
    count_BT = is_separator_BT.cumsum(1)
    within_BT = count_BT - (count_BT - is_separator_BT.long()).gather(1, start_BT)  # separators of the segment up to this place
    found_BT = (is_separator_BT | predicts_separator_BT).long()
    is_given_BT = torch.zeros_like(found_BT).scatter_add_(1, start_BT, found_BT).gather(1, start_BT) > 0
    labels_BT = labels_BT.masked_fill(is_given_BT & (within_BT == 0), IGNORED_LABEL)
    prefix_BT = is_given_BT & (within_BT - is_separator_BT.long() == 0) if see_prefixes else batch.prefix_BT
    return replace(batch, labels_BT=labels_BT, num_valid=_count_valid(labels_BT), prefix_BT=prefix_BT)


def mask_labels(batch: MicroBatch, *, masked: Sequence[int]) -> MicroBatch:
    """Nothing is learnt where the target is one of `masked`; as inputs they stay."""
    labels_BT = batch.labels_BT.masked_fill(torch.isin(batch.labels_BT, torch.tensor(masked)), IGNORED_LABEL)
    return replace(batch, labels_BT=labels_BT, num_valid=_count_valid(labels_BT))


def _count_valid(labels_BT: torch.Tensor) -> int:
    return int((labels_BT != IGNORED_LABEL).sum())


def _in_turn(batch: MicroBatch, steps: Sequence[Objective]) -> MicroBatch:
    for step in steps:
        batch = step(batch)
    return batch


def _load_own(path: str, settings: dict[str, Any]) -> Objective:
    """A function of the user's own, whose results are looked at."""
    function, _ = load_function(path)
    try:
        inspect.signature(function).bind(None, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"objective.kind {path} cannot be called with a micro-batch and the settings {sorted(settings) or 'none'} ({error}); correct "
            "objective.settings, or its signature."
        ) from None

    def objective(batch: MicroBatch) -> MicroBatch:
        found: Any = function(batch, **settings)
        if not isinstance(found, MicroBatch):
            raise UserError(f"objective.kind {path} returned {type(found).__name__}; it has to return a MicroBatch.")
        for name in ("tokens_BT", "labels_BT", "documents_BT", "positions_BT", "prefix_BT"):
            tensor = getattr(found, name)
            if tensor is not None and tensor.shape != batch.tokens_BT.shape:
                raise UserError(
                    f"objective.kind {path} returned {name} of the shape {tuple(tensor.shape)}, and was given rows of "
                    f"{tuple(batch.tokens_BT.shape)}; it must not change shapes."
                )
        return replace(found, num_valid=_count_valid(found.labels_BT))

    return objective
