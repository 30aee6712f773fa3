"""Micro-batches: one global order for every number of ranks, every token where it belongs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import TrainingSection
from data_pipeline.shards import Shard, ShardWriter
from pretrain.data.batches import IGNORED_LABEL, Batches, TokenStream, held_out_batches
from pretrain.data.order import DataOrder

CPU = torch.device("cpu")
T, GLOBAL = 8, 24


def make_stream(folder: Path, lengths: list[int]) -> tuple[TokenStream, np.ndarray]:
    """Shards of the given lengths (0: an empty one). Token number i of the stream is i, so that each place is known."""
    position, shards = 0, []
    for number, length in enumerate(lengths):
        prefix = folder / f"shard-{number}"
        with ShardWriter(prefix, np.dtype(np.uint16 if number % 2 else np.int32)) as writer:
            if length:
                writer.add_document(np.arange(position, position + length))
        shards.append(Shard(prefix))
        position += length
    return TokenStream(shards), np.arange(position)


def training(micro: int, total: int = GLOBAL) -> TrainingSection:
    return TrainingSection(sequence_length=T, global_batch_samples=total, micro_batch_samples=micro)


def read_steps(stream: TokenStream, seed: int, micro: int, num_ranks: int, start: int, num_steps: int) -> list[np.ndarray]:
    """Per step, the first token of each sample in the global order: micro-step by micro-step, rank by rank."""
    order = DataOrder(len(stream), T, seed)
    ranks = [Batches(stream, order, training(micro), rank, num_ranks, CPU, start) for rank in range(num_ranks)]
    steps = []
    for _ in range(num_steps):
        of_ranks = [one.next_step() for one in ranks]
        assert {len(batches) for batches in of_ranks} == {GLOBAL // (micro * num_ranks)}
        rows = [batch.tokens_BT for micro_step in zip(*of_ranks, strict=True) for batch in micro_step]
        assert all(row.shape == (micro, T) for row in rows)
        steps.append(torch.cat(rows).numpy())
    return steps


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_global_order_is_the_same_for_every_number_of_ranks_and_every_split(tmp_path: Path, seed: int, num_ranks: int) -> None:
    stream, tokens = make_stream(tmp_path, [301, 0, 402])
    order = DataOrder(len(stream), T, seed)
    windows = order.windows(0, 8 * GLOBAL).reshape(8, GLOBAL)  # more than two epochs of 87 windows
    expected = tokens[windows[:, :, None] * T + np.arange(T)]
    splits = [micro for micro in range(1, GLOBAL + 1) if GLOBAL % (micro * num_ranks) == 0]
    assert len(splits) == {1: 8, 2: 6, 4: 4}[num_ranks]
    for micro in splits:
        np.testing.assert_array_equal(read_steps(stream, seed, micro, num_ranks, 0, 8), expected)


def test_starting_anywhere_gives_the_tail(tmp_path: Path, seed: int) -> None:
    """At another number of ranks and another split: what a killed run read before and a resumed one after is the whole."""
    stream, _ = make_stream(tmp_path, [300, 400])
    whole = read_steps(stream, seed, 4, 1, 0, 9)
    for step, micro, num_ranks in ((0, 2, 1), (1, 6, 2), (4, 3, 4), (8, 12, 2)):
        np.testing.assert_array_equal(read_steps(stream, seed, micro, num_ranks, step * GLOBAL, 9 - step), whole[step:])


@pytest.mark.parametrize(("micro", "num_ranks"), [(5, 1), (24, 2), (4, 5)])
def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, micro: int, num_ranks: int) -> None:
    stream, _ = make_stream(tmp_path, [100])
    with pytest.raises(ValueError, match="does not divide"):
        Batches(stream, DataOrder(100, T, 1), training(micro), 0, num_ranks, CPU)


def test_labels_are_the_tokens_one_further(tmp_path: Path, seed: int) -> None:
    """Against the stream itself, over an epoch: every window's tokens and the one behind them, as int64."""
    stream, tokens = make_stream(tmp_path, [57, 1, 0, 90, 45])  # 193 = 24 x 8 + 1: the last window ends with the last token
    (batch,) = Batches(stream, DataOrder(len(stream), T, seed), training(GLOBAL), 0, 1, CPU).next_step()
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.tokens_BT.is_contiguous()
    assert batch.labels_BT.is_contiguous()
    assert batch.num_valid == GLOBAL * T
    starts = batch.tokens_BT[:, 0].numpy()
    np.testing.assert_array_equal(np.sort(starts), np.arange(0, 192, T))
    np.testing.assert_array_equal(batch.tokens_BT.numpy(), tokens[starts[:, None] + np.arange(T)])
    np.testing.assert_array_equal(batch.labels_BT.numpy(), tokens[starts[:, None] + np.arange(1, T + 1)])
    assert int(batch.labels_BT.max()) == 192


@pytest.mark.parametrize("lengths", [[10], [1, 1, 1], [0, 5, 0, 0, 7, 0], [3, 0, 9, 1, 0, 0, 2]], ids=str)
def test_the_stream_is_one_row_across_shards(tmp_path: Path, lengths: list[int]) -> None:
    stream, tokens = make_stream(tmp_path, lengths)
    assert len(stream) == sum(lengths)
    for start in range(len(stream) + 1):
        for length in range(len(stream) - start + 1):
            found = stream.read(start, length)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, tokens[start : start + length])


@pytest.mark.parametrize("lengths", [[], [0], [4, 0, 3]], ids=str)
def test_reading_beyond_the_end_is_refused(tmp_path: Path, lengths: list[int]) -> None:
    stream, _ = make_stream(tmp_path, lengths)
    for start, length in ((-1, 1), (len(stream), 1), (0, len(stream) + 1), (len(stream) + 1, 0)):
        with pytest.raises(IndexError, match=f"of a stream of {len(stream)}"):
            stream.read(start, length)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[1], [7], [8], [9], [16, 0, 16], [50, 3, 0, 120]], ids=str)
@pytest.mark.parametrize("micro", [1, 3])
def test_every_held_out_token_is_a_target_exactly_once(tmp_path: Path, lengths: list[int], num_ranks: int, micro: int) -> None:
    stream, tokens = make_stream(tmp_path, lengths)
    end_of_text = 60_000
    of_ranks = [list(held_out_batches(stream, end_of_text, T, micro, rank, num_ranks, CPU)) for rank in range(num_ranks)]
    num_batches = math.ceil(math.ceil(len(tokens) / T) / (micro * num_ranks))
    assert [len(batches) for batches in of_ranks] == [num_batches] * num_ranks
    inputs, targets = [], []
    for batch in (batch for batches in of_ranks for batch in batches):
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (micro, T)
        valid = batch.labels_BT != IGNORED_LABEL
        assert batch.num_valid == int(valid.sum())
        assert (batch.tokens_BT >= 0).all(), "padding must be a token that the model knows"
        inputs += batch.tokens_BT[valid].tolist()
        targets += batch.labels_BT[valid].tolist()
        for row, valid_row in zip(batch.labels_BT, valid, strict=True):  # padding stands behind, never between
            assert torch.equal(valid_row, torch.arange(T) < int(valid_row.sum())), row
    assert sorted(targets) == tokens.tolist()
    context_of = dict(zip(targets, inputs, strict=True))
    assert context_of == {token: token - 1 if token else end_of_text for token in tokens.tolist()}


def test_held_out_windows_are_in_order_on_one_rank(tmp_path: Path) -> None:
    stream, tokens = make_stream(tmp_path, [20])
    (batch,) = held_out_batches(stream, 999, T, 4, 0, 1, CPU)
    assert batch.tokens_BT[0].tolist() == [999, *range(7)]
    assert batch.labels_BT[2].tolist() == [16, 17, 18, 19] + [IGNORED_LABEL] * 4
    assert batch.labels_BT[3].eq(IGNORED_LABEL).all()
    assert batch.num_valid == len(tokens)


def test_nothing_held_out_gives_no_batches(tmp_path: Path) -> None:
    stream, _ = make_stream(tmp_path, [0])
    assert list(held_out_batches(stream, 0, T, 2, 0, 1, CPU)) == []
