"""What a sample is made of: packed as the slow way has it, each token of a source once a target, and nothing learnt from padding."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.data_section import DataSection, SourceSection, TokenizerSection
from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.model_section import ModelSection
from configs.schema import RunConfig
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here
from data_pipeline.manifest import load_manifest, write_manifest
from data_pipeline.packing import pack_documents, packs_name, write_packs
from data_pipeline.records import FileRecord, PackingRecord, ShardRecord
from pretrain.data.batches import Batches, MicroBatch
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.order import DataOrder, Places
from pretrain.data.pool import Pool
from pretrain.data.samples import IGNORED_LABEL, Rows, locate_samples, read_samples
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from tests.tiny import tiny_texts, write_shard, write_tiny_dataset

CPU = torch.device("cpu")
END, T, GLOBAL, VOCABULARY = 0, 8, 12, 100_000
LENGTHS = (T, 12)
Row = tuple[list[int], list[int], list[bool]]
"""Inputs, targets, and where a piece of a document begins."""


@pytest.fixture(name="dataset")
def _dataset(tmp_path: Path, seed: int) -> Path:
    """Three sources in six packed shards; but for the ends of text each token of it is another."""
    chosen = random.Random(seed)
    folder = tmp_path / "dataset"
    manifest = write_tiny_dataset(folder, num_documents=30)
    shards: list[ShardRecord] = []
    next_token = 1
    for number, (source, num_documents) in enumerate((("web", 40), ("code", 1), ("web", 17), ("books", 9), ("code", 12), ("books", 1))):
        lengths = [chosen.choice([1, 2, T - 1, T, T + 1, 2 * T, chosen.randint(1, 5 * T)]) for _ in range(num_documents)]
        lengths = lengths if num_documents > 1 else [T + 1]  # so that there is padding, whatever is drawn
        documents = []
        for length in lengths:
            documents.append(np.array([*range(next_token, next_token + length - 1), END]))
            next_token += length - 1
        shards.append(pack(folder, write_shard(folder, f"more/{number}", source, documents, "int32"), lengths))
    facts = {"dtype": "int32", "vocabulary_size": VOCABULARY, "end_of_text_id": END}
    write_manifest(folder, manifest.model_copy(update={**facts, "splits": {**manifest.splits, "train": tuple(shards)}}))
    return folder


def pack(folder: Path, record: ShardRecord, document_lengths: list[int]) -> ShardRecord:
    """The record of a shard with packs beside it."""
    files, packings = dict(record.files), {}
    for length in LENGTHS:
        packs, name = pack_documents(np.cumsum([0, *document_lengths]), length), packs_name(record.name, length)
        write_packs(folder / name, packs)
        files[name] = FileRecord(bytes=(folder / name).stat().st_size, sha256=sha256_of_file(folder / name))
        packings[str(length)] = PackingRecord(num_packs=packs.num_packs, documents_cut=0, padding_tokens=0, documents_cut_when_chopped=0)
    return record.model_copy(update={"files": files, "packings": packings})


def config_of(folder: Path, stages: tuple[dict[str, Any], ...] = ({},), **training: Any) -> RunConfig:
    wanted = {"sequence_length": T, "packing": "best_fit", "global_batch_samples": GLOBAL, "micro_batch_samples": 1, **training}
    return RunConfig.model_validate(
        {
            "data": {"root": str(folder), "tokenizer": {"path": "unused"}},
            "model": {"vocabulary_size": VOCABULARY},
            "mixture": {"stages": stages},
            "training": wanted,
        }
    )


def order_of(corpus: Corpus, config: RunConfig) -> DataOrder:
    return DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)


def naive_rows(folder: Path, length: int = T) -> dict[str, list[Row]]:
    """By source its packed samples, of the files as numpy reads them, token by token."""
    manifest = load_manifest(folder)
    rows: dict[str, list[Row]] = {}
    for shard in manifest.shards("train"):
        before = [manifest.end_of_text_id, *np.fromfile(folder / f"{shard.name}.bin", manifest.dtype).tolist()]  # [token]: what precedes it
        _, num_packs, *rest = np.load(packs_name(folder / shard.name, length)).tolist()
        pieces = list(zip(*np.array(rest[num_packs + 1 :]).reshape(2, -1).tolist(), strict=True))
        (source,) = shard.sources
        for first, end in pairwise(rest[: num_packs + 1]):
            inputs, labels, starts = list[int](), list[int](), list[bool]()
            for token, count in pieces[first:end]:
                for place in range(token, token + count):
                    inputs.append(before[place])
                    labels.append(before[place + 1])
                    starts.append(place == token)
            padding = length - len(inputs)
            starts += [place == 0 for place in range(padding)]
            row = (inputs + [manifest.end_of_text_id] * padding, labels + [IGNORED_LABEL] * padding, starts)
            rows.setdefault(source, []).append(row)
    return rows


def number_documents(starts: list[bool]) -> tuple[list[int], list[int]]:
    """Token by token: which document of the row each place belongs to, and where in it. A row always begins one."""
    documents, positions = list[int](), list[int]()
    for place, begins in enumerate(starts):
        begins = begins or place == 0
        documents.append((documents[-1] if documents else -1) + begins)
        positions.append(0 if begins else positions[-1] + 1)
    return documents, positions


def all_places(corpus: Corpus) -> list[tuple[int, int]]:
    return [(source, sample) for source, size in enumerate(corpus.sources) for sample in range(size.num_samples)]


def read_all(corpus: Corpus, wanted: list[tuple[int, int]], length: int = T) -> list[Row]:
    source_n, sample_n = np.array(wanted).T
    spans = locate_samples(corpus, Places(source_n, np.zeros_like(sample_n), sample_n), length)
    rows = Rows.empty(len(wanted), length, Pool())
    assert read_samples(corpus, spans, rows, Pool()) == np.count_nonzero(rows.labels_nT != IGNORED_LABEL)
    return list(zip(*(column.tolist() for column in rows), strict=True))


# --- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_packed_samples_are_those_of_a_naive_construction(dataset: Path, seed: int, length: int) -> None:
    """All of every source, in any order, also many times over."""
    corpus, expected = open_corpus(config_of(dataset, sequence_length=length)), naive_rows(dataset, length)
    assert {one.name: one.num_samples for one in corpus.sources} == {name: len(rows) for name, rows in expected.items()}
    chosen = random.Random(seed)
    for wanted in (all_places(corpus), chosen.choices(all_places(corpus), k=300), chosen.sample(all_places(corpus), 1)):
        assert read_all(corpus, wanted, length) == [expected[corpus.sources[source].name][sample] for source, sample in wanted]


def test_a_piece_is_of_one_document_and_only_a_longer_one_is_cut(dataset: Path) -> None:
    """Every token is a target once, behind the one before it, and padding behind all; told by the tokens alone."""
    corpus = open_corpus(config_of(dataset))
    shards = load_manifest(dataset).shards("train")
    tokens = np.concatenate([np.fromfile(dataset / f"{shard.name}.bin", "int32") for shard in shards]).tolist()
    seen = Counter[int]()
    num_padded = num_cut = 0
    for inputs, labels, starts in read_all(corpus, all_places(corpus)):
        num_valid = sum(label != IGNORED_LABEL for label in labels)
        assert num_valid >= 1 and labels[num_valid:] == [IGNORED_LABEL] * (T - num_valid) and inputs[num_valid:] == [END] * (T - num_valid)
        begins = [place for place in range(T) if starts[place]]
        assert begins[0] == 0 and (num_valid == T or num_valid in begins) and max(begins) <= num_valid
        num_padded += num_valid < T
        for first, end in pairwise([*(place for place in begins if place < num_valid), num_valid]):
            piece = labels[first:end]
            seen.update(piece)
            assert END not in piece[:-1] and inputs[first + 1 : end] == piece[:-1]
            assert piece[:-1] == list(range(piece[0], piece[0] + len(piece) - 1))
            goes_on = inputs[first] != END
            assert not goes_on or piece[0] in (inputs[first] + 1, END)
            is_cut = goes_on or piece[-1] != END
            num_cut += is_cut
            assert not goes_on or len(piece) == T or piece[-1] == END, "a rest ends its document"
            assert piece[-1] == END or len(piece) == T, "a document is cut in pieces of T only"
    assert seen == Counter(tokens) and num_padded > 0 and num_cut > 0


def test_chopped_samples_are_cut_every_t_tokens(dataset: Path, seed: int) -> None:
    """Of the same dataset: what is packed is a matter of the run."""
    corpus = open_corpus(config_of(dataset, packing="chop"))
    rows: dict[str, list[int]] = {}
    for shard in load_manifest(dataset).shards("train"):
        rows.setdefault(*shard.sources, [END]).extend(np.fromfile(dataset / f"{shard.name}.bin", "int32").tolist())
    wanted = random.Random(seed).choices(all_places(corpus), k=200)
    expected = []
    for source, sample in wanted:
        row = rows[corpus.sources[source].name][sample * T : (sample + 1) * T + 1]
        expected.append((row[:-1], row[1:], [token == END for token in row[:-1]]))
    assert read_all(corpus, wanted) == expected
    assert [one.num_samples for one in corpus.sources] == [(len(rows[one.name]) - 1) // T for one in corpus.sources]


# --- what is fed --------------------------------------------------------------------------------------------


def feed(corpus: Corpus, config: RunConfig, num_ranks: int, num_steps: int) -> list[list[MicroBatch]]:
    """Per step the micro-batches of all ranks, in the global order."""
    ranks = [Batches(corpus, order_of(corpus, config), config.training, rank, num_ranks, CPU) for rank in range(num_ranks)]
    steps = [[batch for micro in zip(*(one.next_step() for one in ranks), strict=True) for batch in micro] for _ in range(num_steps)]
    for one in ranks:
        one.close()
    return steps


def check_batch(batch: MicroBatch, rows: list[Row]) -> None:
    """Documents and positions are counted token by token; documents of a row differ, so that none sees another."""
    assert batch.tokens_BT.tolist() == [row[0] for row in rows]
    assert batch.labels_BT.tolist() == [row[1] for row in rows]
    assert batch.documents_BT is not None and batch.positions_BT is not None
    for row, documents, positions in zip(rows, batch.documents_BT.tolist(), batch.positions_BT.tolist(), strict=True):
        assert ([sorted(set(documents)).index(number) for number in documents], positions) == number_documents(row[2])
        assert documents == sorted(documents)
    assert batch.num_valid == sum(label != IGNORED_LABEL for row in rows for label in row[1]) > 0


@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 1), (1, GLOBAL), (2, 3), (3, 2), (4, 1)])
def test_what_ranks_are_fed_is_the_naive_construction_in_the_global_order(dataset: Path, num_ranks: int, micro: int) -> None:
    """And in every epoch of a source each of its tokens is a target exactly once."""
    config = config_of(dataset, micro_batch_samples=micro)
    corpus, expected = open_corpus(config), naive_rows(dataset)
    largest = max(one.num_samples for one in corpus.sources)
    num_steps = math.ceil(2.5 * sum(one.num_samples for one in corpus.sources) / GLOBAL)
    places = order_of(corpus, config).places(np.arange(num_steps * GLOBAL))
    samples = list(zip(*(column.tolist() for column in places), strict=True))
    targets: dict[tuple[str, int], list[int]] = {}
    for step, batches in enumerate(feed(corpus, config, num_ranks, num_steps)):
        assert len(batches) == GLOBAL // micro
        for number, batch in enumerate(batches):
            here = samples[step * GLOBAL + number * micro :][:micro]
            check_batch(batch, [expected[corpus.sources[source].name][sample] for source, _, sample in here])
            for (source, epoch, _), labels in zip(here, batch.labels_BT.tolist(), strict=True):
                targets.setdefault((corpus.sources[source].name, epoch), []).extend(label for label in labels if label != IGNORED_LABEL)
    tokens: dict[str, list[int]] = {}
    for shard in load_manifest(dataset).shards("train"):
        tokens.setdefault(*shard.sources, []).extend(np.fromfile(dataset / f"{shard.name}.bin", "int32").tolist())
    assert largest > GLOBAL
    for name, found in tokens.items():
        assert [sorted(targets[name, epoch]) for epoch in (0, 1)] == [sorted(found)] * 2


@pytest.mark.parametrize("sequence_length", [1, 2, 4])
def test_a_stage_of_shorter_sequences_cuts_the_same_samples(dataset: Path, sequence_length: int) -> None:
    """No target is repeated or lost; there are sequences of padding alone, of which nothing is learnt."""
    whole, cut = (
        config_of(dataset, micro_batch_samples=3),
        config_of(dataset, ({"sequence_length": sequence_length},), micro_batch_samples=3),
    )
    corpus = open_corpus(whole)
    num_steps = 2 * math.ceil(sum(one.num_samples for one in corpus.sources) / GLOBAL)
    num_empty = 0
    for long, short in zip(feed(corpus, whole, 2, num_steps), feed(corpus, cut, 2, num_steps), strict=True):
        for one, other in zip(long, short, strict=True):
            assert other.num_valid == one.num_valid > 0
            assert other.tokens_BT.shape == (3 * T // sequence_length, sequence_length)
            starts = (one.positions_BT == 0).reshape(-1, sequence_length).tolist()  # type: ignore[union-attr]
            inputs, labels = (column.reshape(-1, sequence_length).tolist() for column in (one.tokens_BT, one.labels_BT))
            check_batch(other, list(zip(inputs, labels, starts, strict=True)))
            num_empty += int((other.labels_BT == IGNORED_LABEL).all(dim=1).sum())
    assert num_empty > 0


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_the_loss_is_finite_where_a_sequence_is_all_padding_and_is_that_of_the_others(dataset: Path, separate: bool, restart: bool) -> None:
    """So are its gradients: padding is neither learnt from nor seen."""
    config = config_of(
        dataset, ({"sequence_length": 2},), micro_batch_samples=GLOBAL, separate_documents=separate, restart_positions=restart
    )
    model = Decoder(ModelSection(vocabulary_size=VOCABULARY, num_layers=2, width=16, num_heads=2, feed_forward_width=24))
    initialize_weights(model, model.section, 5)
    corpus = open_corpus(config)
    for (batch,) in feed(corpus, config, 1, math.ceil(sum(one.num_samples for one in corpus.sources) / GLOBAL)):
        is_empty_B = (batch.labels_BT == IGNORED_LABEL).all(dim=1)
        if not is_empty_B.any():
            continue
        found = []
        for chosen_B in (torch.ones_like(is_empty_B), ~is_empty_B):
            rest = batch.map(lambda tensor, chosen_B=chosen_B: tensor[chosen_B])
            model.zero_grad()
            loss = model(rest.tokens_BT, rest.labels_BT, documents_BT=rest.documents_BT, positions_BT=rest.positions_BT)
            loss.backward()
            found.append((loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters()}))
        (loss, gradients), (expected, expected_gradients) = found
        assert torch.isfinite(loss) and all(bool(torch.isfinite(one).all()) for one in gradients.values())
        torch.testing.assert_close(loss, expected)
        for name, one in gradients.items():
            torch.testing.assert_close(one, expected_gradients[name], rtol=1e-4, atol=1e-5)
        return
    pytest.fail("no sequence was all padding")


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_length_that_was_not_packed_is_refused_when_the_data_is_opened(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"more/0 has no packs of 16 tokens, .* add 16 to data\.packed_lengths .* or set training\.packing"):
        open_corpus(config_of(dataset, sequence_length=16))
    assert open_corpus(config_of(dataset, sequence_length=16, packing="chop")).packs is None


def test_a_changed_index_reaches_the_step_that_needs_it(dataset: Path, seed: int) -> None:
    """One flipped bit in where a piece begins, or how long it is; wherever it leads, nothing is learnt from it."""
    chosen = random.Random(seed)
    path = Path(packs_name(dataset / "more/0", T))
    whole = path.read_bytes()
    for _ in range(10):
        flipped = bytearray(whole)
        flipped[chosen.randrange(128, len(whole))] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        config = config_of(dataset, ({"weights": {"web": 1.0}},))
        corpus = open_corpus(config)
        reader = Batches(corpus, order_of(corpus, config), config.training, 0, 1, CPU)
        with pytest.raises(UserError, match=r"more/0\.packed-8\.npy: "):
            for _ in range(math.ceil(corpus.sources[0].num_samples / GLOBAL)):
                reader.next_step()
        reader.close()


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_on_packed_samples_learns_with_the_exact_loss(run_on_ranks: Callable[..., list[Any]], tmp_path: Path, seed: int) -> None:
    """Text, build, ten steps of the real loop on one rank; the first step's loss is the model's own over naive samples."""
    from tests.training import tiny_config

    (tmp_path / "text").mkdir()
    texts = [text[: 20 + 40 * (number % 5)] for number, text in enumerate(tiny_texts(150, seed))]
    (tmp_path / "text" / "sums.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataSection(
        root=str(tmp_path / "dataset"),
        sources=(SourceSection(name="sums", path=str(tmp_path / "text")),),
        tokenizer=TokenizerSection(vocabulary_size=300),
        held_out_fraction=0.1,
        work_unit_bytes=4_000,
        packed_lengths=(32,),
    )
    build_dataset(data, lambda progress: None, open_here)
    overrides = {"training__packing": "best_fit", "parallel__cpu_processes": "1", "precision": "fp32", "model__dropout": "0.0"}
    samples = naive_rows(Path(data.folder()), 32)["sums"]
    for number in range(100):  # an order that has padding in its first step
        config = tiny_config(data.folder(), tmp_path / "runs", **overrides, run__seed=str(number))
        corpus = open_corpus(config)
        rows = [samples[sample] for sample in order_of(corpus, config).places(np.arange(8)).sample_n.tolist()]
        if any(IGNORED_LABEL in row[1] for row in rows):
            break
    overrides |= {"run__seed": str(number)}
    here = {"dataset": data.folder(), "runs": str(tmp_path / "runs"), "cases": {"packed": overrides}}
    (result,) = run_on_ranks("tests.training:train_runs", 1, here)
    losses = [float.fromhex(loss) for _, loss, _, _ in result["packed"]["losses"]]
    assert (result["packed"]["outcome"], len(losses)) == ("done", 10)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5, losses

    assert len(load_manifest(Path(data.folder())).shards("train")) > 2
    counted = [number_documents(row[2]) for row in rows]
    inputs, labels = (torch.tensor([row[column] for row in rows]) for column in (0, 1))
    documents, positions = (torch.tensor([row[column] for row in counted]) for column in (0, 1))
    model = Decoder(config.model)
    initialize_weights(model, model.section, config.run.seed)
    num_valid = int((labels != IGNORED_LABEL).sum())
    assert 0 < num_valid < labels.numel(), "there is padding in the first step"
    expected = model(inputs, labels, documents_BT=documents, positions_BT=positions).item() / num_valid
    assert losses[0] == pytest.approx(expected, rel=1e-5)
