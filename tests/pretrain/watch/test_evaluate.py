"""Held-out loss and bits per byte against a direct computation, token by token."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import ModelSection
from data_pipeline.shards import Shard, ShardWriter
from pretrain.data.batches import TokenStream, held_out_batches
from pretrain.model.decoder import Decoder, initialize_weights
from pretrain.watch.evaluate import evaluate

CPU = torch.device("cpu")
V, END, T = 48, 47, 16


def make_model(seed: int, **changes: float) -> Decoder:
    model = Decoder(
        ModelSection(vocabulary_size=V, num_layers=1, width=16, num_heads=2, feed_forward_width=32, largest_context=32, **changes)
    )
    initialize_weights(model, seed)
    return model


@pytest.fixture
def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, 75)


@pytest.fixture
def stream(tmp_path: Path, tokens: np.ndarray) -> TokenStream:
    with ShardWriter(tmp_path / "shard", np.dtype(np.uint16)) as writer:
        writer.add_document(tokens)
    return TokenStream([Shard(tmp_path / "shard")])


@pytest.mark.parametrize("micro", [1, 2, 7])
def test_equals_a_direct_computation(stream: TokenStream, tokens: np.ndarray, seed: int, micro: int) -> None:
    """The probability of each token given those before it in its window, asked from the logits, in float64."""
    model = make_model(seed)
    nats = 0.0
    row = [END, *tokens.tolist()]
    with torch.no_grad():
        for start in range(0, len(tokens), T):
            context = row[start : start + T][: len(tokens) - start]
            logits = model(torch.tensor([context]))[0].double()
            chosen = torch.log_softmax(logits, dim=-1)[range(len(context)), tokens[start : start + len(context)].tolist()]
            nats -= float(chosen.sum())
    num_bytes = 333
    found = evaluate(model, held_out_batches(stream, END, T, micro, 0, 1, CPU), num_bytes)
    assert found.num_tokens == 75
    assert found.nats_per_token == pytest.approx(nats / 75, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert found.bits_per_byte * num_bytes * math.log(2) == pytest.approx(found.nats_per_token * 75, rel=1e-12)


def test_ranks_together_find_what_one_finds_alone(stream: TokenStream, seed: int) -> None:
    model = make_model(seed)
    alone = evaluate(model, held_out_batches(stream, END, T, 2, 0, 1, CPU), 100)
    for num_ranks in (2, 3):
        parts: list[float] = []
        for rank in range(num_ranks):
            evaluate(
                model,
                held_out_batches(stream, END, T, 1, rank, num_ranks, CPU),
                100,
                lambda value, parts=parts: parts.append(value) or value,
            )
        nats, num_tokens = sum(parts[::2]), sum(parts[1::2])
        assert num_tokens == alone.num_tokens
        assert nats / num_tokens == pytest.approx(alone.nats_per_token, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_rests_and_the_model_is_left_as_it_was(stream: TokenStream, seed: int, training: bool) -> None:
    dropping = make_model(seed, dropout=0.5).train(training)
    found = evaluate(dropping, held_out_batches(stream, END, T, 2, 0, 1, CPU), 100)
    assert found == evaluate(make_model(seed), held_out_batches(stream, END, T, 2, 0, 1, CPU), 100)
    assert dropping.training is training
    assert all(parameter.grad is None for parameter in dropping.parameters())


def test_nothing_held_out_is_zero_not_an_error(seed: int) -> None:
    assert evaluate(make_model(seed), [], 0).num_tokens == 0
