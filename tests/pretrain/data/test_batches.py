"""Micro-batches: one global order for every number of ranks, every token of every source where it belongs, and once per epoch."""

import concurrent.futures
import hashlib
import math
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import BatchSection, MixtureSection, StageSection, TrainingSection
from pretrain.data import batches as batches_module
from pretrain.data.batches import IGNORED_LABEL, Batches, MicroBatch, held_out_batches
from pretrain.data.corpus import Corpus
from pretrain.data.order import DataOrder
from pretrain.data.samples import Rows
from pretrain.data.tokens import TokenFiles, TokenStream
from tests.tiny import write_corpus, write_shard

CPU = torch.device("cpu")
END, T, GLOBAL = 0, 8, 24
STEP = T * GLOBAL
STAGES: tuple[dict[str, Any], ...] = (
    {"weights": {"web": 3.0, "code": 1.0}},
    {"from_tokens": 8 * STEP, "weights": {"web": 1.0, "code": 2.0, "books": 0.5}, "sequence_length": 4},
    {"from_tokens": 15 * STEP, "weights": {"code": 1.0, "books": 1.0}},
    {"from_tokens": 22 * STEP, "sequence_length": 2},
)
Sources = dict[str, list[np.ndarray]]


def draw_documents(chosen: random.Random, first: int, num_tokens: int) -> np.ndarray:
    """Documents of 1 to 20 tokens, each closed by an end of text; all other tokens count on, so that each place is known."""
    tokens = np.arange(first, first + num_tokens)
    place = -1
    while place < num_tokens - 1:
        place = min(num_tokens - 1, place + chosen.randint(2, 20))
        tokens[place] = END
    return tokens


def draw_sources(seed: int, **lengths: list[int]) -> Sources:
    """Sources of files of the given lengths."""
    chosen = random.Random(seed)
    return {
        name: [draw_documents(chosen, 10**6 * (number + 1) + 10**5 * file, length) for file, length in enumerate(files)]
        for number, (name, files) in enumerate(lengths.items())
    }


def draw_three(seed: int) -> Sources:
    """Of 87, 40 and 15 samples, the last tokens of the first too few for one more."""
    return draw_sources(seed, web=[301, 402], code=[3, 150, 9, 158], books=[120])


def training_of(micro: int, **changes: Any) -> TrainingSection:
    return TrainingSection(**{"sequence_length": T, "global_batch_samples": GLOBAL, "micro_batch_samples": micro} | changes)


def order_of(corpus: Corpus, seed: int, training: TrainingSection, stages: tuple[dict[str, Any], ...] = STAGES) -> DataOrder:
    return DataOrder(corpus.sources, MixtureSection(stages=tuple(StageSection(**stage) for stage in stages)), training, seed)


def read_steps(
    corpus: Corpus, order: DataOrder, training: TrainingSection, num_ranks: int, start: int, num_steps: int
) -> list[dict[str, np.ndarray]]:
    """Per step what all ranks are fed, in the global order: micro-step by micro-step, rank by rank. Documents count from a row's first."""
    ranks = [Batches(corpus, order, training, rank, num_ranks, CPU, start) for rank in range(num_ranks)]
    steps, seen = [], start
    for _ in range(num_steps):
        of_ranks = [one.next_step() for one in ranks]
        num_samples = training.steps.batch_at(seen)
        assert {len(batches) for batches in of_ranks} == {num_samples // (training.micro_batch_samples * num_ranks)}
        seen += num_samples
        fed = [batch for micro_step in zip(*of_ranks, strict=True) for batch in micro_step]
        found = {
            name: torch.cat([getattr(batch, name) for batch in fed]).numpy()
            for name in ("tokens_BT", "labels_BT", "documents_BT", "positions_BT")
        }
        found["documents_BT"] -= found["documents_BT"][:, :1]
        steps.append(found)
    for one in ranks:
        one.close()
    return steps


def assert_equal_steps(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in one.keys() | other.keys():
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def naive_rows(sources: Sources, name: str, sample: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of a sample, from the source's tokens laid end to end."""
    row = [END, *np.concatenate(sources[name]).tolist()]
    return row[sample * T : (sample + 1) * T], row[sample * T + 1 : (sample + 1) * T + 1]


def naive_documents(inputs: list[int]) -> tuple[list[int], list[int]]:
    """Token by token: which document of the row each place belongs to, and where in it."""
    documents, positions = [], []
    for token in inputs:
        begins = not documents or token == END
        documents.append((documents[-1] + 1 if documents else 0) if begins else documents[-1])
        positions.append(0 if begins else positions[-1] + 1)
    return documents, positions


def assert_documents(batch: MicroBatch, training: TrainingSection) -> None:
    """They are those of the naive count; numbers never fall along a row."""
    for row, inputs in enumerate(batch.tokens_BT.tolist()):
        documents, positions = naive_documents(inputs)
        if training.separate_documents:
            assert batch.documents_BT is not None
            found = batch.documents_BT[row].tolist()
            assert found == sorted(found)
            assert [sorted(set(found)).index(number) for number in found] == documents
        if training.restart_positions:
            assert batch.positions_BT is not None
            assert batch.positions_BT[row].tolist() == positions
    assert (batch.documents_BT is None) == (not training.separate_documents)
    assert (batch.positions_BT is None) == (not training.restart_positions)


# --- the same for all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_global_order_is_the_same_for_every_number_of_ranks_and_every_split(tmp_path: Path, seed: int, num_ranks: int) -> None:
    """Over three stages and several epochs: what is fed is what the order says, read naively."""
    sources = draw_three(seed)
    corpus = write_corpus(tmp_path, sources, T, END)
    order = order_of(corpus, seed, training_of(1))
    places = order.places(np.arange(17 * GLOBAL))
    rows = [naive_rows(sources, corpus.sources[source].name, sample) for source, _, sample in np.stack(places, axis=1).tolist()]
    expected = []
    for step in range(17):
        length = order.mixture.stage_at(step * GLOBAL).sequence_length
        inputs, labels = (np.array(part).reshape(-1, length) for part in zip(*rows[step * GLOBAL : (step + 1) * GLOBAL], strict=True))
        documents, positions = (np.array(part) for part in zip(*map(naive_documents, inputs.tolist()), strict=True))
        first_places = np.array([np.flatnonzero(np.array(row) == number)[0] for row in documents for number in row]).reshape(inputs.shape)
        expected.append({"tokens_BT": inputs, "labels_BT": labels, "documents_BT": first_places, "positions_BT": positions})
    splits = [micro for micro in range(1, GLOBAL + 1) if GLOBAL % (micro * num_ranks) == 0]
    assert len(splits) == {1: 8, 2: 6, 3: 4, 4: 4}[num_ranks]
    for micro in splits:
        assert_equal_steps(read_steps(corpus, order, training_of(micro), num_ranks, 0, 17), expected)


def test_starting_anywhere_gives_the_tail(tmp_path: Path, seed: int) -> None:
    """At another number of ranks and another split, with everything opened anew, also in the middle of a step's samples."""
    sources = draw_three(seed)
    corpus = write_corpus(tmp_path, sources, T, END)
    whole = read_steps(corpus, order_of(corpus, seed, training_of(4)), training_of(4), 1, 0, 24)
    for step, micro, num_ranks in ((0, 2, 1), (1, 6, 2), (7, 8, 3), (8, 3, 4), (15, 2, 3), (23, 12, 2)):
        corpus = write_corpus(tmp_path / str(step), sources, T, END)
        tail = read_steps(corpus, order_of(corpus, seed, training_of(1)), training_of(micro), num_ranks, step * GLOBAL, 24 - step)
        assert_equal_steps(tail, whole[step:])
    shifted = read_steps(corpus, order_of(corpus, seed, training_of(1)), training_of(4), 1, 5, 2)
    first, second = whole[0]["labels_BT"], whole[1]["labels_BT"]
    np.testing.assert_array_equal(shifted[0]["labels_BT"], np.concatenate([first[5:], second[:5]]))


def test_skipped_samples_are_never_fed_and_all_others_are(tmp_path: Path, seed: int) -> None:
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    training = training_of(4)
    order = order_of(corpus, seed, training, STAGES[:1])
    plain = np.concatenate([step["labels_BT"] for step in read_steps(corpus, order, training, 1, 0, 8)])
    left_out = ((0, 1), (30, 30 + GLOBAL), (100, 105))
    kept = np.array([number for number in range(8 * GLOBAL) if not any(first <= number < end for first, end in left_out)])
    steps = read_steps(corpus, order.skipping(left_out), training, 2, 0, 6)
    np.testing.assert_array_equal(np.concatenate([step["labels_BT"] for step in steps]), plain[kept][: 6 * GLOBAL])


@pytest.mark.parametrize(("micro", "num_ranks"), [(5, 1), (24, 2), (4, 5)])
def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, micro: int, num_ranks: int) -> None:
    corpus = write_corpus(tmp_path, draw_three(1), T, END)
    with pytest.raises(ValueError, match="does not divide"):
        Batches(corpus, order_of(corpus, 1, training_of(1)), training_of(micro), 0, num_ranks, CPU)


# --- a ramp -------------------------------------------------------------------------------------------------

RAMP = (BatchSection(until_tokens=5 * 4 * T, global_batch_samples=4), BatchSection(until_tokens=64 * T, global_batch_samples=12))
SIZES = [4] * 5 + [12] * 4 + [GLOBAL] * 22
"""Of the steps of a ramp: 64 tokens are not a whole step of 12 behind 20 samples."""


def test_a_ramp_cuts_the_same_order_into_other_steps(tmp_path: Path, seed: int) -> None:
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    training = training_of(2, batch_ramp=RAMP)
    steps = read_steps(corpus, order_of(corpus, seed, training, STAGES[:1]), training, 1, 0, len(SIZES))
    assert [len(step["labels_BT"]) for step in steps] == SIZES
    plain = read_steps(corpus, order_of(corpus, seed, training_of(4), STAGES[:1]), training_of(4), 1, 0, sum(SIZES) // GLOBAL + 1)
    for name in steps[0]:
        found, expected = (np.concatenate([step[name] for step in each]) for each in (steps, plain))
        np.testing.assert_array_equal(found, expected[: sum(SIZES)])


@pytest.mark.parametrize("places_at_once", [1, 40, 4096])
def test_a_ramp_is_the_same_on_every_number_of_ranks_and_resumed_anywhere(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, places_at_once: int
) -> None:
    """Every step of the ramp and some behind it; stages of other mixtures and lengths begin with a step."""
    monkeypatch.setattr(batches_module, "PLACES_AT_ONCE", places_at_once)
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    training = training_of(4, batch_ramp=RAMP)
    order = order_of(corpus, seed, training)
    for stage in order.mixture.stages:
        assert training.steps.samples_before(training.steps.step_of(stage.first_sample)) == stage.first_sample
    whole = read_steps(corpus, order, training, 1, 0, len(SIZES))
    places = [order.places(np.array([number])) for number in range(sum(SIZES))]
    rows = [naive_rows(draw_three(seed), corpus.sources[int(source[0])].name, int(sample[0]))[1] for source, _, sample in places]
    assert np.concatenate([step["labels_BT"].reshape(-1, T) for step in whole]).tolist() == rows
    lengths = [step["labels_BT"].shape[1] for step in whole]
    assert lengths == [order.mixture.stage_at(training.steps.samples_before(step)).sequence_length for step in range(len(SIZES))]
    assert len(set(lengths)) == 3
    for step in (*range(11), 21, 28):
        for micro, num_ranks in ((1, 1), (4, 1), (2, 2)):
            resumed = training_of(micro, batch_ramp=RAMP)
            tail = read_steps(corpus, order, resumed, num_ranks, resumed.steps.samples_before(step), min(4, len(SIZES) - step))
            assert_equal_steps(tail, whole[step : step + 4])


@pytest.mark.parametrize(("micro", "num_ranks"), [(8, 1), (4, 2), (2, 4)])
def test_a_size_of_the_ramp_that_does_not_divide_is_refused(tmp_path: Path, micro: int, num_ranks: int) -> None:
    corpus = write_corpus(tmp_path, draw_three(1), T, END)
    training = training_of(micro, batch_ramp=RAMP)
    with pytest.raises(ValueError, match=r"batch of 4 samples does not divide .* training\.batch_ramp\[0\]\.global_batch_samples=8"):
        Batches(corpus, order_of(corpus, 1, training), training, 0, num_ranks, CPU)


# --- the ledger ---------------------------------------------------------------------------------------------


def hash_rows(rows_nT: np.ndarray) -> list[str]:
    return [hashlib.sha256(row.astype("<i4").tobytes()).hexdigest() for row in rows_nT]


def test_every_sample_is_delivered_once_per_epoch_over_five_resumes_on_other_ranks(tmp_path: Path, seed: int) -> None:
    """The ledger: known by the hash of what was fed. Resumes inside a stage, at a stage's beginning and in the middle of epochs."""
    sources = draw_three(seed)
    expected: dict[str, tuple[str, int]] = {}
    for name, files in sources.items():
        tokens = np.concatenate(files)
        num_samples = tokens.size // T
        expected |= {digest: (name, number) for number, digest in enumerate(hash_rows(tokens[: num_samples * T].reshape(-1, T)))}
    assert len(expected) == 87 + 40 + 15, "each sample is known by its hash"
    ledger: list[tuple[str, int]] = []
    attempts = [(1, 4, 5), (2, 6, 4), (3, 2, 6), (4, 3, 1), (2, 1, 9), (3, 8, 7)]  # ranks, samples of a micro-batch, steps
    for number, (num_ranks, micro, num_steps) in enumerate(attempts):
        corpus = write_corpus(tmp_path / str(number), sources, T, END)
        training = training_of(micro)
        order = order_of(corpus, seed, training)
        for step in read_steps(corpus, order, training, num_ranks, len(ledger), num_steps):
            ledger += [expected[digest] for digest in hash_rows(step["labels_BT"].reshape(GLOBAL, T))]
    assert len(ledger) == 32 * GLOBAL
    assert {name: sum(one == name for one, _ in ledger) for name in sources} == order.mixture.cursors(32 * GLOBAL)
    for name, size in {"web": 87, "code": 40, "books": 15}.items():
        samples = [sample for one, sample in ledger if one == name]
        assert len(samples) > 2 * size
        for first in range(0, len(samples) - size + 1, size):
            assert sorted(samples[first : first + size]) == list(range(size)), f"epoch {first // size} of {name}"
        rest = samples[len(samples) // size * size :]
        assert len(set(rest)) == len(rest)


# --- what a micro-batch holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_labels_are_the_next_tokens_and_every_token_is_one(tmp_path: Path, seed: int, dtype: str) -> None:
    """Over an epoch of one source: each token of the source once, after the token that stands before it."""
    chosen = random.Random(seed)
    sources = {"web": [draw_documents(chosen, 10, 57), draw_documents(chosen, 100, 90), draw_documents(chosen, 300, 45)]}
    tokens = np.concatenate(sources["web"])
    assert tokens.size == GLOBAL * T
    corpus = write_corpus(tmp_path, sources, T, END, dtype)
    reader = Batches(corpus, order_of(corpus, seed, training_of(GLOBAL), ({},)), training_of(GLOBAL), 0, 1, CPU)
    (batch,) = reader.next_step()
    reader.close()
    assert batch.num_valid == GLOBAL * T
    for tensor in (batch.tokens_BT, batch.labels_BT, batch.documents_BT, batch.positions_BT):
        assert tensor is not None and tensor.shape == (GLOBAL, T) and tensor.dtype == torch.int32
        assert tensor.is_contiguous(), "what does not lie in one piece is copied to the device in another way, and waited for"
    starts = {batch.tokens_BT.data_ptr(), batch.labels_BT.data_ptr()}
    assert max(starts) - min(starts) >= GLOBAL * T * 4, "inputs and labels share no memory"
    pairs = sorted(zip(batch.tokens_BT.flatten().tolist(), batch.labels_BT.flatten().tolist(), strict=True))
    assert pairs == sorted(zip([END, *tokens[:-1].tolist()], tokens.tolist(), strict=True))
    (first,) = (row for row, labels in enumerate(batch.labels_BT.tolist()) if labels == tokens[:T].tolist())
    assert batch.tokens_BT[first].tolist() == [END, *tokens[: T - 1]], "the first input of a source is an end of text"


def test_each_source_begins_with_an_end_of_text_whatever_stands_before_it(tmp_path: Path, seed: int) -> None:
    """The token before a source's first file is that of another source; it is not seen."""
    sources = draw_sources(seed, web=[8], code=[16], books=[24])
    corpus = write_corpus(tmp_path, sources, T, END)
    training = training_of(6, global_batch_samples=6)
    reader = Batches(corpus, order_of(corpus, seed, training, ({},)), training, 0, 1, CPU)
    (batch,) = reader.next_step()
    reader.close()
    found = sorted(zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True))
    assert found == sorted(
        naive_rows(sources, name, sample) for name, size in (("web", 1), ("code", 2), ("books", 3)) for sample in range(size)
    )
    for files in sources.values():
        assert [END, *files[0][: T - 1].tolist()] in batch.tokens_BT.tolist()


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "together"])
@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "counted on"])
def test_documents_and_positions_are_those_counted_token_by_token(tmp_path: Path, seed: int, separate: bool, restart: bool) -> None:
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    training = training_of(4, separate_documents=separate, restart_positions=restart)
    reader = Batches(corpus, order_of(corpus, seed, training), training, 1, 2, CPU)
    plain = Batches(corpus, order_of(corpus, seed, training), training_of(4), 1, 2, CPU)
    for _ in range(17):
        for batch, other in zip(reader.next_step(), plain.next_step(), strict=True):
            assert_documents(batch, training)
            assert torch.equal(batch.tokens_BT, other.tokens_BT) and torch.equal(batch.labels_BT, other.labels_BT)
    reader.close()
    plain.close()


@pytest.mark.parametrize("sequence_length", [1, 2, 4])
def test_shorter_sequences_cut_the_same_tokens(tmp_path: Path, seed: int, sequence_length: int) -> None:
    """No token is repeated or lost: the same samples, each in equal parts, one behind the other."""
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    training = training_of(3)
    whole = Batches(corpus, order_of(corpus, seed, training, ({},)), training, 0, 2, CPU)
    cut = Batches(corpus, order_of(corpus, seed, training, ({"sequence_length": sequence_length},)), training, 0, 2, CPU)
    for _ in range(8):
        for long, short in zip(whole.next_step(), cut.next_step(), strict=True):
            assert short.tokens_BT.shape == short.labels_BT.shape == (3 * T // sequence_length, sequence_length)
            assert torch.equal(short.tokens_BT.reshape(3, T), long.tokens_BT)
            assert torch.equal(short.labels_BT.reshape(3, T), long.labels_BT)
            assert short.num_valid == long.num_valid == 3 * T
            assert short.tokens_BT.is_contiguous() and short.labels_BT.is_contiguous()
            assert_documents(short, training)
    whole.close()
    cut.close()


def test_a_batch_is_changed_in_all_its_tensors() -> None:
    ones = torch.ones(2, 3, dtype=torch.int32)
    whole = MicroBatch(ones, ones * 2, 6, ones * 3, ones * 4).map(lambda tensor: tensor + 10)
    assert [int(tensor[0, 0]) for tensor in (whole.tokens_BT, whole.labels_BT, whole.documents_BT, whole.positions_BT)] == [11, 12, 13, 14]
    bare = MicroBatch(ones, ones, 6).to(torch.device("meta"))
    assert (bare.num_valid, bare.documents_BT, bare.positions_BT, bare.tokens_BT.device.type) == (6, None, None, "meta")


# --- the thread ---------------------------------------------------------------------------------------------


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_in_the_thread_reaches_the_step_that_needs_it(tmp_path: Path, seed: int) -> None:
    """A file that is gone is noticed while the step before is learnt from, and told in its own place."""
    sources = draw_three(seed)
    corpus = write_corpus(tmp_path, sources, T, END)
    stages = ({"weights": {"web": 1.0}}, {"from_tokens": 3 * STEP, "weights": {"books": 1.0}})
    (tmp_path / "books-0.bin").unlink()
    reader = Batches(corpus, order_of(corpus, seed, training_of(4), stages), training_of(4), 0, 1, CPU)
    for _ in range(3):
        reader.next_step()
    with pytest.raises(UserError, match=r"books-0\.bin: no such file"):
        reader.next_step()
    reader.close()
    assert threads() == []


def test_a_flipped_bit_reaches_the_step(tmp_path: Path, seed: int) -> None:
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    path = tmp_path / "code-1.bin"
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 4
    path.write_bytes(content)
    reader = Batches(corpus, order_of(corpus, seed, training_of(4), ({"weights": {"code": 1.0}},)), training_of(4), 0, 1, CPU)
    with pytest.raises(UserError, match=r"code-1\.bin: bytes 0 to 599 are not those that were built"):
        for _ in range(2):
            reader.next_step()
    reader.close()


def test_closing_ends_the_thread_at_any_time(tmp_path: Path, seed: int) -> None:
    """Before the first step, between two, twice; nothing can be read afterwards."""
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    for num_steps in (0, 1, 5):
        reader = Batches(corpus, order_of(corpus, seed, training_of(4)), training_of(4), 0, 1, CPU)
        assert threads() == []
        for _ in range(num_steps):
            reader.next_step()
        assert len(threads()) == min(1, num_steps)
        reader.close()
        assert threads() == []
        reader.close()
        with pytest.raises(RuntimeError, match="after shutdown"):
            for _ in range(2):
                reader.next_step()


def test_the_next_step_is_read_while_one_is_learnt_from_and_only_waiting_counts(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path, draw_three(seed), T, END)
    read, go_on = threading.Semaphore(0), threading.Semaphore(0)
    plain = batches_module.read_samples

    def slowly(*arguments: Any) -> Rows:
        assert go_on.acquire(timeout=60)
        found = plain(*arguments)
        read.release()
        return found

    monkeypatch.setattr(batches_module, "read_samples", slowly)
    training = training_of(GLOBAL)
    reader = Batches(corpus, order_of(corpus, seed, training), training, 0, 1, CPU)
    threading.Timer(0.2, go_on.release).start()
    reader.next_step()
    assert 0.15 < reader.seconds_waited < 60
    assert read.acquire(timeout=60)
    go_on.release()
    assert read.acquire(timeout=60), "the second step is read although nobody has asked for it"
    go_on.release()
    assert read.acquire(timeout=60), "and the one after it"
    concurrent.futures.wait(reader._ahead, timeout=60)
    before = reader.seconds_waited
    reader.next_step()
    assert reader.seconds_waited - before < 0.15, "nothing was waited for"
    for _ in range(10):
        go_on.release()
    reader.close()


# --- held out -----------------------------------------------------------------------------------------------


def make_stream(folder: Path, lengths: list[int]) -> tuple[TokenStream, np.ndarray]:
    """Files of the given lengths, closed by an end of text; all other tokens are their place in the stream + 1."""
    parts = [np.arange(sum(lengths[:number]), sum(lengths[: number + 1])) + 1 for number in range(len(lengths))]
    for part in parts:
        part[-1] = END
    records = [write_shard(folder, f"held-out-{number}", "web", [part], "int32") for number, part in enumerate(parts)]
    return TokenStream(TokenFiles(folder, records, "int32", END), 0, lengths), np.concatenate([np.empty(0, np.int64), *parts])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[1], [7], [8], [9], [16, 16], [50, 3, 1, 120]], ids=str)
@pytest.mark.parametrize("micro", [1, 3])
def test_every_held_out_token_is_a_target_exactly_once(tmp_path: Path, lengths: list[int], num_ranks: int, micro: int) -> None:
    stream, tokens = make_stream(tmp_path, lengths)
    of_ranks = [list(held_out_batches(stream, training_of(1), micro, rank, num_ranks, CPU)) for rank in range(num_ranks)]
    num_batches = math.ceil(math.ceil(len(tokens) / T) / (micro * num_ranks))
    assert [len(batches) for batches in of_ranks] == [num_batches] * num_ranks
    pairs = []
    for batch in (batch for batches in of_ranks for batch in batches):
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (micro, T)
        valid = batch.labels_BT != IGNORED_LABEL
        assert batch.num_valid == int(valid.sum())
        assert (batch.tokens_BT >= 0).all(), "padding must be a token that the model knows"
        assert_documents(batch, training_of(1))
        pairs += list(zip(batch.tokens_BT[valid].tolist(), batch.labels_BT[valid].tolist(), strict=True))
        for row, valid_row in zip(batch.labels_BT, valid, strict=True):  # padding stands behind, never between
            assert torch.equal(valid_row, torch.arange(T) < int(valid_row.sum())), row
    assert sorted(pairs) == sorted(zip([END, *tokens[:-1].tolist()], tokens.tolist(), strict=True))


def test_held_out_windows_are_in_order_on_one_rank(tmp_path: Path) -> None:
    stream, tokens = make_stream(tmp_path, [20])
    (batch,) = held_out_batches(stream, training_of(1), 4, 0, 1, CPU)
    assert batch.tokens_BT.tolist()[:2] == [[END, *range(1, 8)], list(range(8, 16))]
    assert batch.labels_BT[2].tolist() == [17, 18, 19, END] + [IGNORED_LABEL] * 4
    assert batch.labels_BT[3].eq(IGNORED_LABEL).all()
    assert batch.num_valid == len(tokens)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_held_out_documents_are_kept_apart_as_in_training(tmp_path: Path, separate: bool, restart: bool) -> None:
    stream, _ = make_stream(tmp_path, [20, 3, 2, 30])
    training = training_of(1, separate_documents=separate, restart_positions=restart)
    for batch in held_out_batches(stream, training, 3, 0, 1, CPU):
        assert_documents(batch, training)


def test_nothing_held_out_gives_no_batches(tmp_path: Path) -> None:
    stream, _ = make_stream(tmp_path, [])
    assert list(held_out_batches(stream, training_of(1), 2, 0, 1, CPU)) == []
