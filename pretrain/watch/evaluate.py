"""Held-out loss and bits per byte, of all held-out text and of each source's.

In: the engine (or any model with its forward) and held-out batches. Out: nats per token and bits per byte, over every
held-out token exactly once, from one pass. Bits per byte compares models of different tokenizers, and compressors:
total nats / (ln 2 x bytes of the held-out text).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from pretrain.data.batches import MicroBatch
from pretrain.data.corpus import HeldOutSource


@dataclass(frozen=True)
class HeldOut:
    """What the model makes of text it was not trained on."""

    nats_per_token: float
    bits_per_byte: float | None
    """None where only a part of the text was a target."""
    num_tokens: int
    sources: "dict[str, HeldOut]" = field(default_factory=dict)
    """Of each source by itself, by name."""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[MicroBatch],
    num_bytes: int | None,
    sum_over_data_ranks: Callable[[float], float] = float,
    sources: Sequence[HeldOutSource] = (),
) -> HeldOut:
    """Evaluate over all data ranks; each must bring the same number of batches (under ZeRO-3 a forward is a collective).

    num_bytes: of the text whose every token is a target; None: some are not. sources: those that `MicroBatch.source` counts.
    """
    was_training = model.training
    model.eval()
    nats, num_tokens = 0.0, 0
    of_source = [(0.0, 0)] * len(sources)
    for batch in batches:
        sight = {"documents_BT": batch.documents_BT, "positions_BT": batch.positions_BT, "prefix_BT": batch.prefix_BT}
        more = float(model(batch.tokens_BT, batch.labels_BT, **sight).item())
        nats, num_tokens = nats + more, num_tokens + batch.num_valid
        if sources:
            before = of_source[batch.source]
            of_source[batch.source] = (before[0] + more, before[1] + batch.num_valid)
    model.train(was_training)

    def over_all_ranks(nats: float, num_tokens: int, num_bytes: int | None) -> HeldOut:
        nats, num_tokens = sum_over_data_ranks(nats), int(sum_over_data_ranks(num_tokens))
        bits_per_byte = None if num_bytes is None else nats / math.log(2) / max(1, num_bytes)
        return HeldOut(nats / max(1, num_tokens), bits_per_byte, num_tokens)

    found = over_all_ranks(nats, num_tokens, num_bytes)
    by_name = {
        source.name: over_all_ranks(*of_one, None if num_bytes is None else source.num_bytes)
        for source, of_one in zip(sources, of_source, strict=True)
    }
    return replace(found, sources=by_name)
