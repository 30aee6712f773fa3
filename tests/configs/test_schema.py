"""The schema: what is refused, in which words, and what may change when a run goes on."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from configs.schema import CHANGEABLE, RunConfig, StageSection, TrainingSection, differing_keys

ROOT = Path(__file__).parent.parent.parent

# What may differ when a run folder is started again. Written out here, so that a new mark is a decision.
CHANGEABLE_KEYS = {
    "run.name",
    "run.root",
    "run.readable_by",
    "training.micro_batch_samples",
    "parallel.zero_stage",
    "parallel.processes",
    "parallel.cpu_processes",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "evaluate.every_steps",
    "evaluate.micro_batch_samples",
    "watch.log_every_steps",
    "watch.wandb",
    "watch.wandb_project",
    "watch.wandb_entity",
    "deepspeed",
}
# Sections of which any key may differ: a checkpoint holds what was seen of the data by its hash.
CHANGEABLE_SECTIONS = {"data", "mixture"}
# Of these, what may differ when a dataset is built again in the same folder.
CHANGEABLE_DATA_KEYS = {
    "data.root",
    "data.cache",
    "data.cache_bytes",
    "data.quarantine_limit",
    "data.workers",
    "data.tokenizer.engine",
    "data.tokenizer.checked_fraction",
    "data.verify_before_training",
}


def build(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


STEP = 4 * 64


def staged(*stages: dict[str, Any]) -> dict[str, Any]:
    """A run of ten steps of `STEP` tokens with these stages."""
    return {
        "training": {"total_tokens": 10 * STEP, "sequence_length": 64, "global_batch_samples": 4, "micro_batch_samples": 1},
        "mixture": {"stages": stages},
    }


# --- impossible combinations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"width": 770}}, "width 770 does not divide by num_heads 12; choose a width of 768 or 780, or set head_width"),
        ({"model": {"width": 5}}, "choose a width of 12, or set"),
        ({"model": {"num_kv_heads": 5}}, "num_kv_heads 5 does not divide num_heads 12; choose one of [1, 2, 3, 4, 6, 12]"),
        ({"model": {"num_kv_heads": 24}}, "num_kv_heads 24 does not divide num_heads 12"),
        ({"model": {"width": 36, "num_heads": 12}}, "rotary positions need an even head width, found 3"),
        ({"model": {"head_width": 63}}, "rotary positions need an even head width, found 63"),
        ({"model": {"width": 7, "num_heads": 1, "positions": "sinusoidal"}}, "sinusoidal positions need an even width, found 7"),
        ({"training": {"sequence_length": 8193}}, "sequence_length 8193 is longer than model.largest_context 8192"),
        ({"data": {"tokenizer": {"vocabulary_size": 40000}}}, "40000 does not fit into model.vocabulary_size 32768"),
        (
            {"training": {"total_tokens": 524288}, "schedule": {"warmup_tokens": 400_000, "decay_tokens": 200_000}},
            "is more than the run's 524288 tokens",
        ),
        ({"schedule": {"kind": "cosine", "decay_tokens": 5}}, "schedule.decay_tokens is for kind warmup_stable_decay"),
        (
            {"run": {"deterministic": True}, "deepspeed": {"zero_optimization": {"overlap_comm": True}}},
            "run.deterministic needs deepspeed.zero_optimization.overlap_comm to be false",
        ),
        ({"training": {"global_batch_samples": 6, "micro_batch_samples": 4}}, "does not divide by 1 rank x 4 samples"),
        ({"parallel": {"processes": 3}}, "a global batch of 256 samples does not divide by 3 ranks x 8 samples"),
        ({"data": {"sources": ({"name": "a", "path": "x"}, {"name": "a", "path": "y"})}}, "two sources have the same name: ['a', 'a']"),
        (staged({"weights": {"a": 1.0}, "epochs": {"a": 1.0}}), "a stage has either weights or epochs, found both; remove one"),
        (staged({"weights": {}, "epochs": {}}), "a stage has either weights or epochs, found both; remove one"),
        (staged({"weights": {}}), "a stage without any source has nothing to learn from"),
        (staged({"epochs": {}}), "a stage without any source has nothing to learn from"),
        (staged(), "the first stage begins at from_tokens 0, found no stage"),
        (staged({"from_tokens": 1}), "the first stage begins at from_tokens 0, found 1"),
        (staged({"from_tokens": STEP}, {}), f"the first stage begins at from_tokens 0, found {STEP}"),
        (
            staged({}, {"from_tokens": 3 * STEP}, {"from_tokens": 2 * STEP}),
            f"stages begin one after the other, found from_tokens [0, {3 * STEP}, {2 * STEP}]; put them in ascending order, each once",
        ),
        (staged({}, {}), "stages begin one after the other, found from_tokens [0, 0]"),
        (
            staged({}, {"from_tokens": STEP + 1}, {"from_tokens": 2 * STEP}),
            "mixture.stages begin at samples [0, 8, 8] of 40 (whole steps of 4)",
        ),
        (staged({}, {"from_tokens": 9 * STEP + 1}), "mixture.stages begin at samples [0, 40] of 40 (whole steps of 4)"),
        (staged({}, {"from_tokens": 10**9}), "each needs a step of its own before the run's end: move from_tokens, or remove a stage"),
        (staged({"sequence_length": 3}), "a stage's sequence_length 3 does not divide training.sequence_length 64"),
        (staged({}, {"from_tokens": STEP, "sequence_length": 128}), "a stage's sequence_length 128 does not divide"),
    ],
)
def test_impossible_combinations_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        build(**sections)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"width": 770, "head_width": 64}},
        {"model": {"width": 36, "num_heads": 12, "positions": "learned"}},
        {"data": {"tokenizer": {"vocabulary_size": 40000, "path": "tokenizer.json"}}},
        {"run": {"deterministic": True}, "deepspeed": {"zero_optimization": None}},
        {"run": {"deterministic": True}, "deepspeed": {"zero_optimization": {"overlap_comm": False}}},
        {"training": {"total_tokens": 524288}, "schedule": {"warmup_tokens": 400_000, "decay_tokens": 124_288}},
        staged({"weights": {"a": 1.0}}, {"from_tokens": 1, "epochs": {"a": 3, "b": 0.1}}, {"from_tokens": STEP + 1, "weights": None}),
        staged({}, {"from_tokens": 9 * STEP}),
        staged({"sequence_length": 1}, {"from_tokens": STEP, "sequence_length": 64}, {"from_tokens": 2 * STEP, "sequence_length": 32}),
    ],
)
def test_what_is_beside_an_impossible_combination_is_accepted(sections: dict[str, Any]) -> None:
    assert isinstance(build(**sections), RunConfig)


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "a\n", "-x", "x" * 65, "über"])
def test_names_that_cannot_be_folders_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="letters, digits"):
        build(run={"name": name})
    with pytest.raises(ValidationError, match="letters, digits"):
        build(data={"sources": ({"name": name, "path": "x"},)})


# --- sizes of a batch --------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.integers(1, 40), st.integers(1, 40))
def test_the_sizes_named_for_a_batch_that_does_not_divide_do_divide(batch: int, micro: int, ranks: int) -> None:
    training = TrainingSection(global_batch_samples=batch, micro_batch_samples=micro)
    try:
        accumulation = training.accumulation(ranks)
    except ValueError as error:
        advice = str(error).partition("the nearest that do: ")[2]
    else:
        assert accumulation * micro * ranks == batch
        return
    assert batch % (micro * ranks), "refused although it divides"
    named = {key.strip().removeprefix("training."): sizes.split(" or ") for key, sizes in (p.split("=") for p in split_advice(advice))}
    portion = micro * ranks
    nearest = {size for size in (batch // portion * portion, (batch // portion + 1) * portion) if size}
    assert {int(size) for size in named["global_batch_samples"]} == nearest
    for size in nearest:
        assert TrainingSection(global_batch_samples=size, micro_batch_samples=micro).accumulation(ranks) * portion == size
    for size in map(int, named.get("micro_batch_samples", [])):
        assert TrainingSection(global_batch_samples=batch, micro_batch_samples=size).accumulation(ranks) * size * ranks == batch
    assert ("micro_batch_samples" in named) == (batch % ranks == 0), "a smaller portion is named exactly when there is one"


def split_advice(advice: str) -> list[str]:
    return [part.removeprefix("or ").strip() for part in advice.split(", ")]


@given(st.integers(1, 10**12), st.integers(1, 8192), st.integers(1, 4096))
def test_a_run_is_rounded_up_to_whole_steps(total: int, length: int, batch: int) -> None:
    training = TrainingSection(total_tokens=total, sequence_length=length, global_batch_samples=batch)
    assert (training.total_steps - 1) * training.tokens_per_step < total <= training.total_steps * training.tokens_per_step


# --- every key: frozen, strict, documented, changeable or reported ----------------------------------------


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and pydantic field of every value of the schema."""
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{key}.")
        else:
            yield prefix + key, field


LEAVES = dict(leaves())


def value_at(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = getattr(config, key)
    return config


def with_value(config: Any, dotted: str, value: Any) -> Any:
    """A copy with one value changed, unchecked: a mutation need not be sensible, only different."""
    key, _, rest = dotted.partition(".")
    return config.model_copy(update={key: with_value(getattr(config, key), rest, value) if rest else value})


def another(value: Any, annotation: Any) -> Any:
    """A value of the annotated type that is not `value`."""
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {"some_key": 1}
    if isinstance(value, tuple):
        return (*value, "one more")
    assert value is None, f"write a mutation for {annotation}"
    kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    return "text" if str in kinds else 7


@pytest.mark.parametrize("dotted", LEAVES)
def test_every_key_is_changeable_or_reported(dotted: str) -> None:
    before = RunConfig()
    now = with_value(before, dotted, another(value_at(before, dotted), LEAVES[dotted].annotation))
    assert now != before
    found = differing_keys(before, now)
    if dotted in CHANGEABLE_KEYS or dotted.partition(".")[0] in CHANGEABLE_SECTIONS:
        assert (LEAVES[dotted].json_schema_extra == CHANGEABLE) == (dotted in CHANGEABLE_KEYS | CHANGEABLE_DATA_KEYS)
        assert found == {}
    else:
        assert found == {dotted: (value_at(before, dotted), value_at(now, dotted))}


def test_the_changeable_keys_exist_and_few_sections_carry_the_mark() -> None:
    assert set(LEAVES) >= CHANGEABLE_KEYS | CHANGEABLE_DATA_KEYS
    marked = {key for key, field in RunConfig.model_fields.items() if field.json_schema_extra == CHANGEABLE and key != "deepspeed"}
    assert marked == CHANGEABLE_SECTIONS


def test_data_and_mixture_may_change_and_what_is_learnt_from_them_may_not() -> None:
    """How documents become samples is no matter of the data: it is held by the run folder itself."""
    now = build(
        data={"root": "elsewhere", "sources": ({"name": "a", "path": "x"},), "seed": 5}, mixture={"stages": ({"weights": {"a": 1.0}},)}
    )
    assert differing_keys(RunConfig(), now) == {}
    now = build(training={"packing": "best_fit", "separate_documents": False, "restart_positions": False})
    assert differing_keys(RunConfig(), now) == {
        "training.packing": ("chop", "best_fit"),
        "training.separate_documents": (True, False),
        "training.restart_positions": (True, False),
    }


@pytest.mark.parametrize(
    "stage",
    [
        {"weights": {"a": 0}},
        {"weights": {"a": -1.0}},
        {"weights": {"a": float("nan")}},
        {"epochs": {"a": float("inf")}},
        {"weights": {"a": "1"}},
        {"weights": {"a": True}},
        {"weights": {"a": None}},
        {"weights": {1: 1.0}},
        {"weights": ["a"]},
        {"epochs": 3.0},
        {"from_tokens": -1},
        {"from_tokens": 0.0},
        {"from_tokens": None},
        {"sequence_length": 0},
        {"sequence_length": "64"},
        {"weight": {"a": 1.0}},
    ],
    ids=str,
)
def test_a_stage_takes_only_what_it_says(stage: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StageSection.model_validate(stage)
    with pytest.raises(ValidationError):
        build(mixture={"stages": (stage,)})


def test_a_stage_may_name_its_weights_in_whole_numbers() -> None:
    assert StageSection(weights={"a": 3}) == StageSection(weights={"a": 3.0})


@given(st.integers(0, 10**13), st.integers(1, 8192), st.integers(1, 4096))
def test_a_stage_begins_with_the_first_step_at_its_tokens_or_behind(tokens: int, length: int, batch: int) -> None:
    training = TrainingSection(sequence_length=length, global_batch_samples=batch)
    step, rest = divmod(training.first_sample(tokens), batch)
    assert rest == 0
    assert (step - 1) * training.tokens_per_step < tokens <= step * training.tokens_per_step


def test_no_difference_is_no_difference() -> None:
    assert differing_keys(RunConfig(), RunConfig()) == {}


def test_several_differences_are_all_reported() -> None:
    now = build(model={"num_layers": 13}, optimizer={"peak_lr": 1.0}, watch={"log_every_steps": 3})
    assert differing_keys(RunConfig(), now) == {"model.num_layers": (12, 13), "optimizer.peak_lr": (3e-4, 1.0)}


def allowed_types(annotation: Any) -> set[type]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*(allowed_types(inner) for inner in get_args(annotation)))
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if hasattr(annotation, "__metadata__"):
        return allowed_types(annotation.__origin__)
    return {origin or annotation}


SAMPLES: list[Any] = [True, 2, 0.25, "0.25", "3", "true", None, ("a",), {"a": 1}]


@pytest.mark.parametrize("dotted", LEAVES)
def test_no_value_is_converted(dotted: str) -> None:
    """A value of another type is refused, never turned into the wanted one (an int may stand where a float is wanted)."""
    allowed = allowed_types(LEAVES[dotted].annotation)
    for sample in SAMPLES:
        if type(sample) in allowed or (float in allowed and type(sample) is int):
            continue
        *sections, last = dotted.split(".")
        content: Any = {last: sample}
        for section in reversed(sections):
            content = {section: content}
        with pytest.raises(ValidationError):
            RunConfig.model_validate(content)


def test_numbers_out_of_range_are_refused() -> None:
    for dotted, field in LEAVES.items():
        kinds = allowed_types(field.annotation)
        bad = [float("nan"), float("inf"), -1.0] if float in kinds else [-1, -(2**70)] if int in kinds else []
        for value in bad:
            *sections, last = dotted.split(".")
            content: Any = {last: value}
            for section in reversed(sections):
                content = {section: content}
            with pytest.raises(ValidationError):
                RunConfig.model_validate(content)


def test_a_configuration_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.precision = "fp32"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.model.width = 1  # type: ignore[misc]


def test_the_defaults_are_a_valid_configuration() -> None:
    assert RunConfig().training.accumulation(1) == 32


# --- cheap -------------------------------------------------------------------------------------------------


def test_loading_imports_no_heavy_library_and_takes_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {num_layers: 2}\n")
    code = (
        "import sys, time; start = time.process_time(); from pathlib import Path; from configs.loader import load_config, dump_config; "
        "dump_config(load_config(Path('run.yaml'))); seconds = time.process_time() - start; "
        "print(seconds, sorted({'torch', 'ray', 'deepspeed', 'numpy', 'pyarrow', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def once() -> tuple[float, str]:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        seconds, modules = done.stdout.split(maxsplit=1)
        return float(seconds), modules.strip()

    seconds, modules = once()
    assert modules == "[]"
    # Seconds of the processor, not of the clock: other work on the machine does not count. The first start may compile.
    assert min(seconds, once()[0]) < 0.5
