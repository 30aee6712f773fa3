"""Held-out loss and bits per byte.

In: the engine (or any model with its forward) and held-out batches. Out: nats per token and bits per byte, over every
held-out token exactly once. Bits per byte compares models of different tokenizers, and compressors:
total nats / (ln 2 x bytes of the held-out text).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from pretrain.data.batches import MicroBatch


@dataclass(frozen=True)
class HeldOut:
    """What the model makes of text it was not trained on."""

    nats_per_token: float
    bits_per_byte: float | None
    """None where only a part of the text was a target."""
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, batches: Iterable[MicroBatch], num_bytes: int | None, sum_over_data_ranks: Callable[[float], float] = float
) -> HeldOut:
    """Evaluate over all data ranks; each must bring the same number of batches (under ZeRO-3 a forward is a collective).

    num_bytes: of the text whose every token is a target; None: some are not.
    """
    was_training = model.training
    model.eval()
    nats, num_tokens = 0.0, 0
    for batch in batches:
        sight = {"documents_BT": batch.documents_BT, "positions_BT": batch.positions_BT, "prefix_BT": batch.prefix_BT}
        nats += float(model(batch.tokens_BT, batch.labels_BT, **sight).item())
        num_tokens += batch.num_valid
    model.train(was_training)
    nats, num_tokens = sum_over_data_ranks(nats), int(sum_over_data_ranks(num_tokens))
    bits_per_byte = None if num_bytes is None else nats / math.log(2) / max(1, num_bytes)
    return HeldOut(nats / max(1, num_tokens), bits_per_byte, num_tokens)
