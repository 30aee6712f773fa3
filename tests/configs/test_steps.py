"""Which samples each step learns from: the arithmetic against a plain loop, and what a ramp may not be."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.schema import RunConfig, TrainingSection
from configs.steps import Steps

Ramp = list[tuple[int, int]]


@st.composite
def ramps(draw: st.DrawFn, most_tokens: int = 3000, most_samples: int = 40) -> Ramp:
    """Until how many tokens, ascending, steps have how many samples; also sections so near to each other that they get no step."""
    untils = sorted(draw(st.sets(st.integers(1, most_tokens), max_size=4)))
    return [(until_tokens, draw(st.integers(1, most_samples))) for until_tokens in untils]


def count(total_tokens: int, length: int, ramp: Ramp, batch: int) -> list[int]:
    """The samples of each step, one step after the other."""
    sizes: list[int] = []
    while sum(sizes) * length < total_tokens:
        sizes.append(next((size for until_tokens, size in ramp if sum(sizes) * length < until_tokens), batch))
    return sizes


def training_of(ramp: Ramp, batch: int, **changes: Any) -> TrainingSection:
    sections = tuple({"until_tokens": until_tokens, "global_batch_samples": size} for until_tokens, size in ramp)
    return TrainingSection.model_validate({"batch_ramp": sections, "global_batch_samples": batch, **changes})


# --- the arithmetic ----------------------------------------------------------------------------------------


@given(st.integers(1, 4000), st.integers(1, 90), ramps(), st.integers(1, 60))
def test_steps_are_those_of_a_plain_loop(total: int, length: int, ramp: Ramp, batch: int) -> None:
    """Also a few steps behind the run's end, and a ramp that the run does not come to the end of."""
    steps = Steps(total, length, ramp, batch)
    sizes = count(total, length, ramp, batch)
    assert (steps.total_steps, steps.total_samples, steps.total_tokens) == (len(sizes), sum(sizes), sum(sizes) * length)
    sizes = count(max(total, *(until for until, _ in ramp), 1) + 3 * batch * length, length, ramp, batch)
    seen = 0
    for step, size in enumerate(sizes):
        assert steps.samples_before(step) == seen
        assert steps.batch_at(seen) == size
        assert {steps.step_of(sample) for sample in (seen, seen + size // 2, seen + size - 1)} == {step}
        seen += size


@given(st.data(), st.integers(1, 90), ramps(), st.integers(1, 60))
def test_the_first_sample_is_the_nearest_whole_step(data: st.DataObject, length: int, ramp: Ramp, batch: int) -> None:
    tokens = data.draw(st.integers(0, 4000))
    assert Steps(1, length, ramp, batch).first_sample(tokens) == sum(count(tokens, length, ramp, batch))


@given(st.integers(1, 10**18), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**18))
def test_without_a_ramp_steps_are_what_they_were(total: int, length: int, batch: int, tokens: int) -> None:
    """The formulas of the versions that knew no ramp; also of the training section that hands them on."""
    training = TrainingSection(total_tokens=total, sequence_length=length, global_batch_samples=batch)
    steps = training.steps
    assert training.total_steps == steps.total_steps == -(-total // (batch * length))
    assert steps.total_samples == training.total_steps * batch
    assert steps.total_tokens == training.total_steps * training.tokens_per_step
    assert training.first_sample(tokens) == steps.first_sample(tokens) == -(-tokens // (batch * length)) * batch
    assert (steps.samples_before(tokens), steps.step_of(tokens), steps.batch_at(tokens)) == (tokens * batch, tokens // batch, batch)
    assert steps.spell_sizes() == f"{batch:,}"


@given(st.integers(1, 10**6), ramps(10**18, 10**6), st.integers(1, 10**6), st.integers(0, 10**18), st.integers(0, 10**18))
def test_the_way_back_is_the_way_forth_however_long_the_run(length: int, ramp: Ramp, batch: int, sample: int, step: int) -> None:
    steps = Steps(10**18, length, ramp, batch)
    assert steps.step_of(steps.samples_before(step)) == step
    assert steps.samples_before(step + 1) == steps.samples_before(step) + steps.batch_at(steps.samples_before(step))
    begin, end = (steps.samples_before(steps.step_of(sample) + more) for more in (0, 1))
    assert begin <= sample < end == begin + steps.batch_at(sample)
    assert steps.batch_at(begin) == steps.batch_at(sample)
    assert (steps.total_samples - steps.batch_at(steps.total_samples - 1)) * length < 10**18 <= steps.total_tokens


def test_the_example_by_hand() -> None:
    """A billion tokens in steps of 64 x 2048, five in steps of 128, the rest in steps of 256."""
    training = training_of([(10**9, 64), (5 * 10**9, 128)], 256, total_tokens=20 * 10**9, sequence_length=2048)
    steps = training.steps
    first, second = math.ceil(10**9 / (64 * 2048)), math.ceil((5 * 10**9 - 7630 * 64 * 2048) / (128 * 2048))
    assert (first, second) == (7630, 15259)
    assert [tuple(phase) for phase in steps.phases] == [(0, 0, 64), (7630, 7630 * 64, 128), (22889, 7630 * 64 + 15259 * 128, 256)]
    assert steps.total_steps == 22889 + math.ceil((20 * 10**9 - steps.phases[-1].first_sample * 2048) / (256 * 2048))
    assert steps.spell_sizes() == "64 to 256"


# --- what a ramp may be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ramp", "batch", "words"),
    [
        ([(512, 8)], 8, r"give steps of \[8, 8\] samples.*wanted each size above the one before it"),
        ([(512, 9), (1024, 4)], 16, r"give steps of \[9, 4, 16\] samples"),
        ([(512, 4), (512, 8)], 16, r"at until_tokens \[512, 512\] of total_tokens 4096; wanted each behind the one before it"),
        ([(1024, 4), (512, 8)], 16, r"at until_tokens \[1024, 512\] of total_tokens 4096"),
        ([(512, 4), (4096, 8)], 16, r"at until_tokens \[512, 4096\] of total_tokens 4096; .* or raise total_tokens"),
        ([(512, 4), (513, 8)], 16, None),
        (
            [(500, 4), (510, 8)],
            16,
            r"steps of \[4, 8, 16\] samples begin at samples \[0, 16, 16\] of 128 .* move until_tokens, or remove a",
        ),
        ([(500, 4), (4090, 7)], 16, r"begin at samples \[0, 16, 128\] of 128"),
    ],
)
def test_a_ramp_that_goes_nowhere_is_refused(ramp: Ramp, batch: int, words: str | None) -> None:
    """Of a run of 128 samples of 32 tokens."""
    if words is None:
        assert [phase.first_sample for phase in training_of(ramp, batch, total_tokens=4096, sequence_length=32).steps.phases] == [0, 16, 24]
        return
    with pytest.raises(ValidationError, match=words):
        training_of(ramp, batch, total_tokens=4096, sequence_length=32)


@given(st.integers(1, 4000), st.integers(1, 20), ramps(), st.integers(1, 60), st.booleans())
def test_a_ramp_is_taken_exactly_if_it_grows_and_each_size_has_a_step(total: int, length: int, ramp: Ramp, batch: int, put: bool) -> None:
    sizes = [*(size for _, size in ramp), batch]
    if put:  # in order: drawn sizes seldom are
        *smaller, batch = sizes = sorted(sizes)
        ramp = [(until_tokens, size) for (until_tokens, _), size in zip(ramp, smaller, strict=True)]
    grows = all(one < other for one, other in pairwise(sizes)) and (not ramp or ramp[-1][0] < total)
    sees_all = sorted(set(count(total, length, ramp, batch))) == sorted(set(sizes))
    try:
        training = training_of(ramp, batch, total_tokens=total, sequence_length=length)
    except ValidationError as error:
        assert not (grows and sees_all), error
    else:
        assert grows and sees_all
        assert training.steps.total_steps == len(count(total, length, ramp, batch))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4, unique=True), st.integers(1, 20), st.integers(1, 20))
def test_every_size_of_a_step_has_to_divide_over_the_ranks(sizes: list[int], micro: int, ranks: int) -> None:
    *smaller, batch = sorted(sizes)
    ramp = [(10_000 * (number + 1), size) for number, size in enumerate(smaller)]
    training = training_of(ramp, batch, sequence_length=1, micro_batch_samples=micro)
    places = ["training", *(f"training.batch_ramp[{number}]" for number in range(len(smaller)))]
    wrong = {place: size for place, size in zip(places, [batch, *smaller], strict=True) if size % (micro * ranks)}
    try:
        accumulation = training.accumulation(ranks)
    except ValueError as error:
        place, size = next(iter(wrong.items()))
        assert f"a global batch of {size} samples does not divide by " in str(error)
        assert f"{place}.global_batch_samples=" in str(error)
        (advice,) = re.findall(r"training\.micro_batch_samples=(.*)$", str(error)) or [""]
        for better in map(int, filter(None, advice.split(" or "))):
            training_of(ramp, batch, sequence_length=1, micro_batch_samples=better).accumulation(ranks)
        assert bool(advice) == (math.gcd(*sizes) % ranks == 0)
    else:
        assert not wrong
        assert accumulation * micro * ranks == batch


def write(path: Path, *, ramp: str = "[{until_tokens: 256, global_batch_samples: 4}]", processes: int = 1) -> Path:
    training = f"{{total_tokens: 4096, sequence_length: 32, global_batch_samples: 8, micro_batch_samples: 2, batch_ramp: {ramp}}}"
    path.write_text(f"training: {training}\nschedule: {{decay_tokens: 0}}\nparallel: {{processes: {processes}}}\n")
    return path


def test_a_run_file_holds_a_ramp_and_gives_it_back(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "run.yaml"))
    assert [(section.until_tokens, section.global_batch_samples) for section in config.training.batch_ramp] == [(256, 4)]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml").training == config.training
    assert load_config(tmp_path / "run.yaml", ["training.batch_ramp=[]"]).training.batch_ramp == RunConfig().training.batch_ramp == ()


@pytest.mark.parametrize(
    ("ramp", "processes", "words"),
    [
        ("[{until_tokens: 256, global_batch_samples: 3}]", 1, "global batch of 3 samples does not divide by 1 rank x 2 samples"),
        (
            "[{until_tokens: 256, global_batch_samples: 6}]",
            2,
            r"training\.batch_ramp\[0\]\.global_batch_samples=4 or 8, or training\.micro",
        ),
        ("[{until_tokens: 256, global_batch_samples: 16}]", 1, r"training: batch_ramp and global_batch_samples give steps of \[16, 8\]"),
        ("[{until_tokens: 256}]", 1, r"training\.batch_ramp\.0\.global_batch_samples: found nothing, wanted a value"),
        ("[{until_token: 256, global_batch_samples: 4}]", 1, "The nearest is training.batch_ramp.until_tokens"),
        ("[{until_tokens: 0, global_batch_samples: 4}]", 1, r"training\.batch_ramp\.0\.until_tokens: found 0, wanted greater than 0"),
        ("[{until_tokens: 1.0e+3, global_batch_samples: 4}]", 1, "found 1000.0, wanted a whole number. Write 1_000"),
        ("4", 1, r"training\.batch_ramp: found 4, wanted a list"),
    ],
)
def test_a_wrong_ramp_is_refused_in_a_sentence_that_names_the_file(tmp_path: Path, ramp: str, processes: int, words: str) -> None:
    path = write(tmp_path / "run.yaml", ramp=ramp, processes=processes)
    with pytest.raises(UserError, match=words) as refusal:
        load_config(path)
    assert str(path) in str(refusal.value)


@given(ramps(), st.integers(1, 90), st.integers(0, 3000))
def test_a_stage_of_the_mixture_begins_with_a_step(ramp: Ramp, length: int, tokens: int) -> None:
    assume(all(one < other for one, other in pairwise([size for _, size in ramp])))
    steps = Steps(10_000, length, ramp, 50)
    first = steps.first_sample(tokens)
    assert steps.samples_before(steps.step_of(first)) == first
    assert first * length >= tokens > (first - steps.batch_at(first - 1)) * length if tokens else first == 0
