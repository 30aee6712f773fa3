"""What is learnt: counted token by token, for any ranks, cut and packed rows, held-out text, and functions of the user's own."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from configs.errors import UserError
from configs.objective_section import ObjectiveSection
from configs.schema import MixtureSection, RunConfig, StageSection, TrainingSection
from data_pipeline.tokenizer import train_tokenizer
from pretrain.data.batches import Batches, MicroBatch, Objective, held_out_batches
from pretrain.data.objective import learn_continuations, mask_labels, open_objective
from pretrain.data.order import DataOrder
from pretrain.data.samples import IGNORED_LABEL
from pretrain.data.tokens import TokenFiles, TokenStream
from tests.tiny import END_OF_TEXT, write_corpus, write_shard

CPU = torch.device("cpu")
END, SEPARATOR, T, GLOBAL = 0, 1, 16, 12
TRAINING = TrainingSection(sequence_length=T, global_batch_samples=GLOBAL, micro_batch_samples=4, total_tokens=T * GLOBAL)


def objective_of(kind: str) -> Objective:
    return partial(learn_continuations, separator=SEPARATOR, end_of_text=END, see_prefixes=kind == "prefix")


def draw_tokens(chosen: random.Random, num_tokens: int) -> np.ndarray:
    """Documents of 1 to 24 tokens with none to three separators anywhere, each closed by an end of text."""
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        text = [chosen.randrange(2, 50) for _ in range(chosen.randrange(24))]
        for _ in range(chosen.choice([0, 0, 1, 1, 1, 2, 3])):
            if text:
                text[chosen.randrange(len(text))] = SEPARATOR
        tokens += [*text, END]
    return np.array([*tokens[: num_tokens - 1], END])


def judge(inputs: list[int], labels: list[int]) -> tuple[list[int], list[bool]]:
    """Naively, segment by segment: the labels that stay, and which places are prefix."""
    begins = [place for place in range(len(inputs)) if place == 0 or inputs[place] == END or labels[place - 1] == END]
    kept, prefix = list(labels), [False] * len(inputs)
    for begin, end in zip(begins, [*begins[1:], len(inputs)], strict=True):
        # All tokens of the segment in a row: what it is predicted from first, then its targets.
        whole = [inputs[begin], *labels[begin:end]]
        if SEPARATOR not in whole:
            continue
        for place in range(begin, end):
            behind = SEPARATOR in whole[: place - begin + 1]
            kept[place] = labels[place] if behind else IGNORED_LABEL
            prefix[place] = SEPARATOR not in whole[: place - begin]
    return kept, prefix


def assert_judged(found: MicroBatch, plain: MicroBatch, kind: str) -> None:
    judged = [judge(*row) for row in zip(plain.tokens_BT.tolist(), plain.labels_BT.tolist(), strict=True)]
    assert found.labels_BT.tolist() == [labels for labels, _ in judged]
    assert found.num_valid == sum(label != IGNORED_LABEL for labels, _ in judged for label in labels)
    if kind == "prefix":
        assert found.prefix_BT is not None and found.prefix_BT.dtype == torch.bool
        assert found.prefix_BT.tolist() == [prefix for _, prefix in judged]
    else:
        assert found.prefix_BT is None
    assert found.labels_BT.dtype == plain.labels_BT.dtype and found.labels_BT.is_contiguous()
    for name in ("tokens_BT", "documents_BT", "positions_BT"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name


# --- by hand ------------------------------------------------------------------------------------------------


def batch_of(inputs: list[int], labels: list[int]) -> MicroBatch:
    return MicroBatch(
        torch.tensor([inputs], dtype=torch.int32),
        torch.tensor([labels], dtype=torch.int32),
        sum(label != IGNORED_LABEL for label in labels),
    )


@pytest.mark.parametrize(
    ("case", "inputs", "labels", "kept", "prefix"),
    [
        ("a pair", [END, 5, 6, 1, 7, 8], [5, 6, 1, 7, 8, END], [-100, -100, -100, 7, 8, END], [1, 1, 1, 1, 0, 0]),
        ("no separator", [END, 5, 6], [5, 6, END], [5, 6, END], [0, 0, 0]),
        ("two separators: the first counts", [END, 5, 1, 6, 1, 7], [5, 1, 6, 1, 7, END], [-100, -100, 6, 1, 7, END], [1, 1, 1, 0, 0, 0]),
        ("nothing is given", [END, 1, 7], [1, 7, END], [-100, 7, END], [1, 1, 0]),
        ("nothing follows", [END, 5, 1], [5, 1, END], [-100, -100, END], [1, 1, 1]),
        ("two documents", [END, 5, 1, 7, END, 6], [5, 1, 7, END, 6, END], [-100, -100, 7, END, 6, END], [1, 1, 1, 0, 0, 0]),
        ("cut behind the separator: all continuation", [7, 8, END, 5], [8, END, 5, 6], [8, END, 5, 6], [0, 0, 0, 0]),
        ("cut at the separator", [1, 7, 8], [7, 8, END], [7, 8, END], [1, 0, 0]),
        ("cut before the separator: not known", [END, 5, 6], [5, 6, 9], [5, 6, 9], [0, 0, 0]),
        ("the separator is the last target: known", [END, 5, 6], [5, 6, 1], [-100, -100, -100], [1, 1, 1]),
        # Packed: a document, then the rest of a longer one (its first input is the token before it), then padding.
        ("packed", [END, 5, 1, 7, 9, 1, 8, END, END], [5, 1, 7, END, 1, 8, END, -100, -100],
         [-100, -100, 7, END, -100, 8, END, -100, -100], [1, 1, 1, 0, 1, 1, 0, 0, 0]),
    ],
)  # fmt: skip
def test_what_is_learnt_of_a_row(case: str, inputs: list[int], labels: list[int], kept: list[int], prefix: list[int]) -> None:
    plain = batch_of(inputs, labels)
    found = objective_of("prefix")(plain)
    assert found.labels_BT[0].tolist() == kept, case
    assert found.prefix_BT is not None and found.prefix_BT[0].int().tolist() == prefix, case
    assert found.num_valid == sum(label != IGNORED_LABEL for label in kept)
    continued = objective_of("continuation")(plain)
    assert torch.equal(continued.labels_BT, found.labels_BT) and continued.prefix_BT is None
    assert plain.labels_BT[0].tolist() == labels, "what is given stays as it is"
    assert (kept, [bool(place) for place in prefix]) == judge(inputs, labels) or case == "packed"


def test_masked_tokens_are_never_targets_and_stay_inputs() -> None:
    plain = batch_of([END, 5, 6, 7, 6], [5, 6, 7, 6, END])
    found = mask_labels(plain, masked=[6, END, 99])
    assert found.labels_BT[0].tolist() == [5, -100, 7, -100, -100] and found.num_valid == 2
    assert torch.equal(found.tokens_BT, plain.tokens_BT)


# --- through the batches ------------------------------------------------------------------------------------


def order_of(corpus: Any, stages: tuple[dict[str, Any], ...] = ({},)) -> DataOrder:
    return DataOrder(corpus.sources, MixtureSection(stages=tuple(StageSection(**stage) for stage in stages)), TRAINING, 3)


@pytest.mark.parametrize("kind", ["continuation", "prefix"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("sequence_length", [T, 4])
def test_every_segment_is_judged_by_itself(tmp_path: Path, seed: int, kind: str, separate: bool, sequence_length: int) -> None:
    corpus = write_corpus(tmp_path, {"web": [draw_tokens(random.Random(seed), 2000)]}, T, END)
    training = TRAINING.model_copy(update={"separate_documents": separate})
    order = order_of(corpus, ({"sequence_length": sequence_length},))
    plain, judged = (Batches(corpus, order, training, 0, 1, CPU, objective=one) for one in (None, objective_of(kind)))
    for _ in range(12):
        for one, found in zip(plain.next_step(), judged.next_step(), strict=True):
            assert one.tokens_BT.shape == found.labels_BT.shape == (4 * T // sequence_length, sequence_length)
            assert (one.documents_BT is not None) == separate
            if separate:
                assert_judged(found, one, kind)
            else:
                bare = {"documents_BT": torch.ones(1), "positions_BT": torch.ones(1)}
                assert_judged(MicroBatch(**{**vars(found), **bare}), MicroBatch(**{**vars(one), **bare}), kind)
    plain.close()
    judged.close()


def test_the_same_for_any_ranks_micro_batches_and_resumes(tmp_path: Path, seed: int) -> None:
    corpus = write_corpus(tmp_path, {"web": [draw_tokens(random.Random(seed), 3000)]}, T, END)

    def fed(num_ranks: int, micro: int, start: int, num_steps: int) -> list[Any]:
        training = TRAINING.model_copy(update={"micro_batch_samples": micro})
        ranks = [
            Batches(corpus, order_of(corpus), training, rank, num_ranks, CPU, start, objective=objective_of("prefix"))
            for rank in range(num_ranks)
        ]
        rows: list[Any] = []
        for _ in range(num_steps):
            for micro_step in zip(*(one.next_step() for one in ranks), strict=True):
                for batch in micro_step:
                    assert batch.prefix_BT is not None
                    rows += zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), batch.prefix_BT.tolist(), strict=True)
        for one in ranks:
            one.close()
        return rows

    whole = fed(1, 12, 0, 10)
    assert len(whole) == 10 * GLOBAL
    for num_ranks, micro, step in ((1, 1, 0), (2, 3, 4), (3, 2, 7), (4, 3, 1)):
        assert fed(num_ranks, micro, step * GLOBAL, 10 - step) == whole[step * GLOBAL :]


def test_a_batch_takes_its_prefix_along() -> None:
    ones = torch.ones(2, 3, dtype=torch.int32)
    batch = MicroBatch(ones, ones, 6, prefix_BT=ones.bool()).to(torch.device("meta"))
    assert batch.prefix_BT is not None and batch.prefix_BT.device.type == "meta" and batch.documents_BT is None


# --- held out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_held_out_windows_hold_whole_documents(tmp_path: Path, seed: int, num_ranks: int) -> None:
    """Every token stands in one window; a document is cut only where it is longer than one; labels are the objective's."""
    files = [draw_tokens(random.Random(seed + number), size) for number, size in enumerate((130, 7, 300))]
    records = [write_shard(tmp_path, f"held-out-{number}", "web", [part], "int32") for number, part in enumerate(files)]
    stream = TokenStream(TokenFiles(tmp_path, records, "int32", END), 0, [len(part) for part in files])
    seen: list[MicroBatch] = []

    def record(batch: MicroBatch) -> MicroBatch:
        seen.append(batch)
        return objective_of("prefix")(batch)

    of_ranks = [list(held_out_batches(stream, TRAINING, 2, rank, num_ranks, CPU, record)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in of_ranks}) == 1
    for found, plain in zip((batch for batches in of_ranks for batch in batches), seen, strict=True):
        assert_judged(found, plain, "prefix")
    num_batches = len(of_ranks[0])
    windows: list[list[int]] = []
    for number in range(num_batches):
        for rank in range(num_ranks):
            plain = seen[rank * num_batches + number]
            windows += [[label for label in row if label != IGNORED_LABEL] for row in plain.labels_BT.tolist()]
    windows = [window for window in windows if window]
    tokens = np.concatenate(files).tolist()
    assert [token for window in windows for token in window] == tokens
    at = 0
    for window in windows:
        at += len(window)
        if window[-1] != END:
            assert len(window) == T and END not in window, "only a document longer than a window is cut"
        elif at < len(tokens):
            following = tokens[at:].index(END) + 1
            assert len(window) + following > T, "the next document would have fitted"


# --- from a run file ----------------------------------------------------------------------------------------

OWN = """
from dataclasses import replace

def first_half(batch, share=0.5):
    labels_BT = batch.labels_BT.clone()
    labels_BT[:, int(labels_BT.shape[1] * share):] = -100
    return replace(batch, labels_BT=labels_BT, num_valid=-1)

def shorter(batch):
    return replace(batch, labels_BT=batch.labels_BT[:, :-1])

def nothing(batch):
    return None
"""


@pytest.fixture(name="config_of")
def _config_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose dataset is no more than a tokenizer."""
    tokenizer = train_tokenizer(["hello world"], 300, END_OF_TEXT, ["<|sep|>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "own_objectives.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**objective: Any) -> RunConfig:
        return RunConfig.model_validate({"data": {"root": str(tmp_path)}, "objective": objective})

    return make


def test_texts_become_ids_of_the_datasets_tokenizer(config_of: Any, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["hello world"], 300, END_OF_TEXT, ["<|sep|>"])
    separator, letter = tokenizer.token_to_id("<|sep|>"), tokenizer.token_to_id("h")
    plain = batch_of([END, 5, separator, 7, letter], [5, separator, 7, letter, END])
    assert open_objective(config_of()) is None, "the next token is learnt without a further call"
    continuation = open_objective(config_of(kind="continuation", separator="<|sep|>", masked_tokens=("h",)))
    assert continuation is not None
    assert continuation(plain).labels_BT[0].tolist() == [-100, -100, 7, -100, END] and continuation(plain).prefix_BT is None
    prefix = open_objective(config_of(kind="prefix", separator="<|sep|>"))
    assert prefix is not None
    found = prefix(plain)
    assert found.prefix_BT is not None and found.prefix_BT[0].tolist() == [True, True, True, False, False] and found.num_valid == 3
    masked = open_objective(config_of(masked_tokens=("h", "<|sep|>")))
    assert masked is not None and masked(plain).labels_BT[0].tolist() == [5, -100, 7, -100, END]


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ({"kind": "prefix", "separator": "<|other|>"}, "objective.separator"),
        ({"masked_tokens": ("h", "<|other|>")}, "objective.masked_tokens"),
    ],
)
def test_an_entry_that_the_tokenizer_lacks_is_named(config_of: Any, objective: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: .* no entry '<\|other\|>' .*<\|sep\|>.*data.tokenizer.added_tokens"):
        open_objective(config_of(**objective))


def test_a_function_of_ones_own(config_of: Any) -> None:
    plain = batch_of([END, 5, 6, 7], [5, 6, 7, END])
    half = open_objective(config_of(kind="own_objectives:first_half", masked_tokens=("h",)))
    assert half is not None
    assert half(plain).labels_BT[0].tolist() == [5, 6, -100, -100] and half(plain).num_valid == 2, "counted behind it"
    most = open_objective(config_of(kind="own_objectives:first_half", settings={"share": 0.75}))
    assert most is not None and most(plain).num_valid == 3
    with pytest.raises(UserError, match=r"first_half cannot be called with a micro-batch and the settings \['part'\]"):
        open_objective(config_of(kind="own_objectives:first_half", settings={"part": 1}))
    with pytest.raises(UserError, match="has no function 'missing'; it has: first_half"):
        open_objective(config_of(kind="own_objectives:missing"))
    for name, problem in {"shorter": r"labels_BT of the shape \(1, 3\).*\(1, 4\).*must not change shapes", "nothing": "NoneType"}.items():
        wrong = open_objective(config_of(kind=f"own_objectives:{name}"))
        assert wrong is not None
        with pytest.raises(UserError, match=problem):
            wrong(plain)


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ({"kind": "prefix"}, "needs the separator"),
        ({"separator": "x"}, "no use for a separator"),
        ({"kind": "a:b", "separator": "x"}, "a separator is for our kinds"),
        ({"kind": "continuation", "separator": "x", "settings": {"a": 1}}, "arguments of a function of your own"),
    ],
)
def test_what_goes_together(objective: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ObjectiveSection.model_validate(objective)
