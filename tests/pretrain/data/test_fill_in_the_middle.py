"""Rearranged documents: every token is still there, they can be put back, and the same ones are drawn wherever a sample is read."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.objective_section import FillInTheMiddleSection
from configs.schema import MixtureSection, RunConfig, StageSection, TrainingSection
from data_pipeline.tokenizer import train_tokenizer
from pretrain.data.batches import Batches
from pretrain.data.fill_in_the_middle import NUM_MARKS, SHORTEST_TEXT, FillInTheMiddle, Marks, open_fill_in_the_middle, rearrange
from pretrain.data.order import DataOrder
from pretrain.data.samples import IGNORED_LABEL, Rows
from tests.tiny import END_OF_TEXT, write_corpus

CPU = torch.device("cpu")
END, T, GLOBAL = 0, 64, 12
MARKS = Marks(prefix=1, middle=2, suffix=3, end_of_text=END)
TRAINING = TrainingSection(sequence_length=T, global_batch_samples=GLOBAL, micro_batch_samples=4, total_tokens=T * GLOBAL)


def put_back(rearranged: list[int]) -> list[int]:
    """The text without its marks, in its order. SPM is read as the PSM it looks like: one without a prefix."""
    assert [rearranged.count(mark) for mark in (1, 2, 3)] == [1, 1, 1] and rearranged[0] == MARKS.prefix
    suffix, middle = rearranged.index(MARKS.suffix), rearranged.index(MARKS.middle)
    return rearranged[1:suffix] + rearranged[middle + 1 :] + rearranged[suffix + 1 : middle]


def draw_rows(chosen: random.Random, num_samples: int, length: int = T) -> Rows:
    """Chopped samples of documents of 1 to 60 tokens; texts count on, so that each token's place is known. The last row is padded."""
    tokens = np.arange(10, 10 + num_samples * length + 1)
    place = 0
    tokens[0] = END
    while (place := place + chosen.randint(1, 60)) < tokens.size:
        tokens[place] = END
    inputs, labels = (tokens[part].reshape(num_samples, length).astype(np.int32) for part in (slice(-1), slice(1, None)))
    is_start = inputs == END
    padding = chosen.randrange(length)
    if padding:
        labels[-1, -padding:], inputs[-1, -padding:], is_start[-1, -padding:] = IGNORED_LABEL, END, False
        is_start[-1, -padding] = True
    return Rows(inputs, labels, is_start)


def copy(rows: Rows) -> Rows:
    return Rows(*(column.copy() for column in rows))


def segments_of(rows: Rows, row: int, sequence_length: int) -> list[tuple[int, int]]:
    starts = [place for place in range(T) if rows.is_start_nT[row, place] or place % sequence_length == 0]
    return list(zip(starts, [*starts[1:], T], strict=True))


@given(lengths=st.tuples(*[st.integers(0, 20)] * 3), suffix_first=st.booleans())
def test_parts_can_be_put_back(lengths: tuple[int, int, int], suffix_first: bool) -> None:
    text = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    prefix, middle, suffix = np.split(text, np.cumsum(lengths)[:2])
    found = rearrange(prefix, middle, suffix, MARKS, suffix_first=suffix_first)
    assert found.dtype == np.int32 and found.size == text.size + NUM_MARKS
    assert put_back(found.tolist()) == text.tolist()
    if suffix_first:
        assert found.tolist() == [1, 3, *suffix.tolist(), 2, *prefix.tolist(), *middle.tolist()]
    else:
        assert found.tolist() == [1, *prefix.tolist(), 3, *suffix.tolist(), 2, *middle.tolist()]


@given(
    seed=st.integers(0, 2**32), share=st.floats(0.01, 1), suffix_first_share=st.floats(0, 1), sequence_length=st.sampled_from([T, 32, 16])
)
def test_every_segment_stays_or_is_rearranged_in_its_place(
    seed: int, share: float, suffix_first_share: float, sequence_length: int
) -> None:
    chosen = random.Random(seed)
    before = draw_rows(chosen, 5)
    after = copy(before)
    section = FillInTheMiddleSection(share=share, suffix_first_share=suffix_first_share)
    FillInTheMiddle(section, MARKS, seed)(after, np.array([7, 2**40, 9, 0, 11]), sequence_length)
    assert np.array_equal(after.is_start_nT, before.is_start_nT)
    for row in range(5):
        for start, end in segments_of(before, row, sequence_length):
            old, new = before.labels_nT[row, start:end].tolist(), after.labels_nT[row, start:end].tolist()
            old_inputs, inputs = before.inputs_nT[row, start:end].tolist(), after.inputs_nT[row, start:end].tolist()
            assert inputs[0] == old_inputs[0], "what a document is predicted from first stays"
            if new == old:
                assert inputs == old_inputs
                continue
            assert inputs[1:] == new[:-1], "each target is the next input"
            is_whole = old[-1] == END
            assert (new[-1] == END) == is_whole and END not in new[:-1]
            text, found = (old[:-1], new[:-1]) if is_whole else (old, new)
            assert len(text) >= SHORTEST_TEXT
            assert Counter(found) == Counter(text[:-NUM_MARKS]) + Counter([1, 2, 3])
            assert put_back(found) == text[:-NUM_MARKS]


def draw_many(seed: int, num: int, **shares: float) -> list[list[int]]:
    """The rearranged ones of documents of 30 tokens, of which 27 are kept; behind each its end of text and two places of padding."""
    labels = np.tile(np.arange(10, 43, dtype=np.int32), (num, 1))
    labels[:, 30], labels[:, 31:] = END, IGNORED_LABEL
    inputs = np.concatenate([np.full((num, 1), END, np.int32), labels[:, :-1]], axis=1)
    is_start = np.zeros(labels.shape, bool)
    is_start[:, [0, 31]] = True
    FillInTheMiddle(FillInTheMiddleSection(**shares), MARKS, seed)(Rows(inputs, labels, is_start), np.arange(num), 33)
    assert (labels[:, 30] == END).all() and (labels[:, 31:] == IGNORED_LABEL).all()
    return [row[:30] for row in labels.tolist() if MARKS.middle in row]


def test_shares_are_as_asked(seed: int) -> None:
    """Within five standard deviations."""
    changed = draw_many(seed, 4000, share=0.3, suffix_first_share=0.8)
    assert abs(len(changed) - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5
    # A PSM looks like an SPM where its prefix is empty: when the lower of two cuts among 28 is 0.
    looks_suffix_first = 0.8 + 0.2 * (1 - (27 / 28) ** 2)
    assert abs(sum(row[:2] == [1, 3] for row in changed) - looks_suffix_first * len(changed)) < 5 * (len(changed) * 0.16) ** 0.5


def test_cuts_are_uniform(seed: int) -> None:
    """Both cuts together: chi-squared of 28 equally likely places, beyond 80 once in a million seeds."""
    cuts: Counter[int] = Counter()
    for row in draw_many(seed, 3000, share=1.0, suffix_first_share=0.0):
        prefix, middle = row.index(MARKS.suffix) - 1, 29 - row.index(MARKS.middle)
        cuts.update([prefix, prefix + middle])
    assert set(cuts) == set(range(28))
    assert sum((cuts[place] - 6000 / 28) ** 2 / (6000 / 28) for place in range(28)) < 80


def batches_of(tmp_path: Path, seed: int, num_ranks: int, micro: int, start: int, num_steps: int, **stage: Any) -> list[Any]:
    chosen = random.Random(seed)
    tokens = draw_rows(chosen, 40).labels_nT.copy()
    tokens[tokens == IGNORED_LABEL] = END
    corpus = write_corpus(tmp_path / f"{num_ranks}-{micro}-{start}", {"web": [tokens.ravel()]}, T, END)
    training = TRAINING.model_copy(update={"micro_batch_samples": micro})
    order = DataOrder(corpus.sources, MixtureSection(stages=(StageSection(**stage),)), training, seed, ((5, 9),))
    draw = FillInTheMiddle(FillInTheMiddleSection(share=0.6), MARKS, seed)
    ranks = [Batches(corpus, order, training, rank, num_ranks, CPU, start, rearrange=draw) for rank in range(num_ranks)]
    rows: list[Any] = []
    for _ in range(num_steps):
        for micro_step in zip(*(one.next_step() for one in ranks), strict=True):
            for batch in micro_step:
                assert batch.documents_BT is not None and batch.positions_BT is not None
                first = batch.documents_BT[:, :1]
                tensors = (batch.tokens_BT, batch.labels_BT, batch.documents_BT - first, batch.positions_BT)
                rows += zip(*(tensor.tolist() for tensor in tensors), strict=True)
    for one in ranks:
        one.close()
    return rows


@pytest.mark.parametrize("stage", [{}, {"sequence_length": 32}], ids=["whole", "cut in two"])
def test_the_same_for_any_ranks_micro_batches_and_resumes(tmp_path: Path, seed: int, stage: dict[str, Any]) -> None:
    """Also with samples that are skipped on purpose, and over the end of an epoch, behind which other documents are drawn."""
    whole = batches_of(tmp_path, seed, 1, 12, 0, 8, **stage)
    per_step = GLOBAL * T // stage.get("sequence_length", T)
    assert len(whole) == 8 * per_step
    assert sum(2 in labels for _, labels, *_ in whole) > len(whole) / 5
    for num_ranks, micro, step in ((1, 1, 0), (2, 3, 3), (3, 2, 5), (4, 3, 1)):
        assert batches_of(tmp_path, seed, num_ranks, micro, step * GLOBAL, 8 - step, **stage) == whole[step * per_step :]
    texts = [frozenset(token for token in [*inputs, *labels] if token > 3) for inputs, labels, *_ in whole]
    again = [(one, other) for one in range(len(texts)) for other in range(one) if len(texts[one] & texts[other]) > 8]
    assert any(whole[one][1] != whole[other][1] for one, other in again), "another epoch, another draw"


def test_other_seeds_draw_other_documents(seed: int) -> None:
    before = draw_rows(random.Random(seed), 30)
    found = []
    for one in (seed, seed + 1):
        rows = copy(before)
        FillInTheMiddle(FillInTheMiddleSection(), MARKS, one)(rows, np.arange(30), T)
        found.append(rows.labels_nT)
    assert not np.array_equal(*found)


def test_the_draw_is_for_ever() -> None:
    """A run that is resumed in ten years draws the same: known values of two samples, a PSM and an SPM."""
    labels = np.array([[*range(10, 40), END]] * 2, dtype=np.int32)
    inputs = np.array([[END, *range(10, 40)]] * 2, dtype=np.int32)
    rows = Rows(inputs, labels, inputs == END)
    FillInTheMiddle(FillInTheMiddleSection(share=1.0), MARKS, 1234)(rows, np.array([8, 11]), 31)
    assert labels.tolist() == [
        [1, *range(10, 26), 3, *range(34, 37), 2, *range(26, 34), END],
        [1, 3, *range(26, 37), 2, *range(10, 26), END],
    ]


def config_of(folder: Path, **section: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"root": str(folder)}, "training": {"fill_in_the_middle": section}})


def test_marks_are_entries_of_the_datasets_tokenizer(tmp_path: Path) -> None:
    marks = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["text"], 300, END_OF_TEXT, marks).to_str())
    assert open_fill_in_the_middle(RunConfig.model_validate({"data": {"root": str(tmp_path)}})) is None
    opened = open_fill_in_the_middle(config_of(tmp_path))
    assert opened is not None
    with pytest.raises(UserError, match=r"fill_in_the_middle.middle_token: .* no entry '<M>'.*added_tokens"):
        open_fill_in_the_middle(config_of(tmp_path, middle_token="<M>"))
    with pytest.raises(UserError, match="four different tokens"):
        open_fill_in_the_middle(config_of(tmp_path, middle_token=marks[0]))
    with pytest.raises(UserError, match="four different tokens"):
        open_fill_in_the_middle(config_of(tmp_path, middle_token=END_OF_TEXT))
