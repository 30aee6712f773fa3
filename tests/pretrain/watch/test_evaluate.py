"""Held-out loss and bits per byte against a direct computation, token by token."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.model_section import ModelSection
from configs.schema import TrainingSection
from pretrain.data.batches import IGNORED_LABEL, held_out_batches
from pretrain.data.corpus import HeldOutSource
from pretrain.data.tokens import TokenFiles, TokenStream
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from pretrain.watch.evaluate import evaluate
from tests.tiny import write_shard

CPU = torch.device("cpu")
V, END, T = 48, 47, 16
TRAINING = TrainingSection(sequence_length=T)


def make_model(seed: int, **changes: float) -> Decoder:
    model = Decoder(
        ModelSection(vocabulary_size=V, num_layers=1, width=16, num_heads=2, feed_forward_width=32, largest_context=32, **changes)
    )
    initialize_weights(model, model.section, seed)
    return model


@pytest.fixture
def tokens(seed: int) -> np.ndarray:
    """Several documents, so that windows hold more than one: every ninth token or so ends one, and the last one does."""
    random = np.random.default_rng(seed)
    tokens = np.where(random.random(75) < 1 / 9, END, random.integers(0, END, 75))
    tokens[[3, 4, -1]] = END
    return tokens


@pytest.fixture
def stream(tmp_path: Path, tokens: np.ndarray) -> TokenStream:
    return TokenStream(TokenFiles(tmp_path, [write_shard(tmp_path, "shard", "web", [tokens])], "uint16", END), 0, [tokens.size])


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "together"])
@pytest.mark.parametrize("micro", [1, 2, 7])
def test_equals_a_direct_computation(stream: TokenStream, tokens: np.ndarray, seed: int, micro: int, separate: bool) -> None:
    """The probability of each token given those before it in its document and window, asked from the logits, in float64."""
    model = make_model(seed)
    nats = 0.0
    row = [END, *tokens.tolist()]
    with torch.no_grad():
        for start in range(0, len(tokens), T):
            end = min(start + T, len(tokens))
            begins = [start, *(place for place in range(start + 1, end) if separate and row[place] == END)]
            for begin, behind in zip(begins, [*begins[1:], end], strict=True):  # each document as if nothing else were there
                logits = model(torch.tensor([row[begin:behind]]))[0].double()
                chosen = torch.log_softmax(logits, dim=-1)[range(behind - begin), row[begin + 1 : behind + 1]]
                nats -= float(chosen.sum())
    num_bytes = 333
    training = TrainingSection(sequence_length=T, separate_documents=separate, restart_positions=separate)
    found = evaluate(model, held_out_batches(stream, training, micro, 0, 1, CPU), num_bytes)
    assert found.num_tokens == 75
    assert found.nats_per_token == pytest.approx(nats / 75, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert found.bits_per_byte * num_bytes * math.log(2) == pytest.approx(found.nats_per_token * 75, rel=1e-12)


def test_ranks_together_find_what_one_finds_alone(stream: TokenStream, seed: int) -> None:
    model = make_model(seed)
    alone = evaluate(model, held_out_batches(stream, TRAINING, 2, 0, 1, CPU), 100)
    for num_ranks in (2, 3):
        parts: list[float] = []
        for rank in range(num_ranks):
            evaluate(
                model,
                held_out_batches(stream, TRAINING, 1, rank, num_ranks, CPU),
                100,
                lambda value, parts=parts: parts.append(value) or value,
            )
        nats, num_tokens = sum(parts[::2]), sum(parts[1::2])
        assert num_tokens == alone.num_tokens
        assert nats / num_tokens == pytest.approx(alone.nats_per_token, rel=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("sizes", [[75], [40, 35], [16, 32, 27], [1, 2, 3, 69], [5] * 15], ids=str)
def test_sources_apart_are_together_what_one_source_is(stream: TokenStream, seed: int, sizes: list[int], num_ranks: int) -> None:
    """Sources that end inside of a window, several in one: all tokens in the same windows, each once, in its source."""
    model = make_model(seed)
    whole = evaluate(model, held_out_batches(stream, TRAINING, 2, 0, 1, CPU), 300)
    sources = [HeldOutSource(f"s{number}", size, 4 * size) for number, size in enumerate(sizes)]
    batches = [list(held_out_batches(stream, TRAINING, 2, rank, num_ranks, CPU, None, sizes)) for rank in range(num_ranks)]
    assert len({len(of_rank) for of_rank in batches}) == 1, "every rank the same number of forwards"
    # One pass: no more micro-batches than without sources, but for one that is not full of each source.
    assert sum(batch.num_valid > 0 for of_rank in batches for batch in of_rank) <= math.ceil(75 / T / 2) + len(sizes)
    found = evaluate(model, [batch for of_rank in batches for batch in of_rank], 300, sources=sources)
    assert found.num_tokens == whole.num_tokens == 75
    assert found.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-6)
    assert [one.num_tokens for one in found.sources.values()] == sizes
    nats = [one.nats_per_token * one.num_tokens for one in found.sources.values()]
    assert sum(nats) == pytest.approx(found.nats_per_token * 75, rel=1e-12)
    for one, of_one, source in zip(found.sources.values(), nats, sources, strict=True):
        assert one.bits_per_byte == pytest.approx(of_one / math.log(2) / source.num_bytes, rel=1e-12)
    # And of each source: what the whole stream's windows lose where their targets are its own.
    nats_of_place = []
    with torch.no_grad():
        for batch in held_out_batches(stream, TRAINING, 1, 0, 1, CPU):
            for place in range(batch.num_valid):
                labels_BT = torch.full_like(batch.labels_BT, IGNORED_LABEL)
                labels_BT[0, place] = batch.labels_BT[0, place]
                sight = {"documents_BT": batch.documents_BT, "positions_BT": batch.positions_BT}
                nats_of_place.append(float(model.eval()(batch.tokens_BT, labels_BT, **sight)))
    first = 0
    for of_one, size in zip(nats, sizes, strict=True):
        assert of_one == pytest.approx(sum(nats_of_place[first : first + size]), rel=1e-5)
        first += size


def test_one_source_is_evaluated_to_the_bit_as_without_sources(stream: TokenStream, seed: int) -> None:
    model = make_model(seed)
    without = evaluate(model, held_out_batches(stream, TRAINING, 2, 0, 1, CPU), 100)
    one = evaluate(model, held_out_batches(stream, TRAINING, 2, 0, 1, CPU, None, [75]), 100, sources=[HeldOutSource("web", 75, 100)])
    assert (one.nats_per_token, one.bits_per_byte, one.num_tokens) == (without.nats_per_token, without.bits_per_byte, without.num_tokens)
    assert one.sources == {"web": without}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_rests_and_the_model_is_left_as_it_was(stream: TokenStream, seed: int, training: bool) -> None:
    dropping = make_model(seed, dropout=0.5).train(training)
    found = evaluate(dropping, held_out_batches(stream, TRAINING, 2, 0, 1, CPU), 100)
    assert found == evaluate(make_model(seed), held_out_batches(stream, TRAINING, 2, 0, 1, CPU), 100)
    assert dropping.training is training
    assert all(parameter.grad is None for parameter in dropping.parameters())


def test_nothing_held_out_is_zero_not_an_error(seed: int) -> None:
    assert evaluate(make_model(seed), [], 0).num_tokens == 0
