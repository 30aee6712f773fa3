"""The schema: what is refused, and in which words."""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.model_section import RopeScalingSection
from configs.schema import RunConfig, StageSection, TrainingSection
from tests.configs.keys import LEAVES

ROOT = Path(__file__).parent.parent.parent


def build(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


STEP = 4 * 64


def staged(*stages: dict[str, Any]) -> dict[str, Any]:
    """A run of ten steps of `STEP` tokens with these stages."""
    return {
        "training": {"total_tokens": 10 * STEP, "sequence_length": 64, "global_batch_samples": 4, "micro_batch_samples": 1},
        "mixture": {"stages": stages},
    }


STRETCHED = {"kind": "yarn", "factor": 4.0, "original_context": 2048}

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
        *(
            (
                {"model": {"positions": positions, "rope_scaling": STRETCHED}},
                f"stretches rotary positions, found positions: {positions}; remove",
            )
            for positions in ("learned", "sinusoidal", "none")
        ),
        (
            {"model": {"rope_scaling": STRETCHED | {"kind": "llama3", "low_frequency_factor": 4.0}}},
            "low_frequency_factor 4.0 must be below high_frequency_factor 4.0",
        ),
        ({"model": {"rope_scaling": STRETCHED | {"beta_fast": 0.5}}}, "beta_slow 1.0 must be below beta_fast 0.5"),
        (
            {"model": {"implementation": "own:Model", "block": "own:Block"}},
            "a block of your own stands in the Decoder, which implementation replaces; remove one of the two",
        ),
        *(
            (
                {"model": {"implementation": "own:Model"}, "objective": wrong},
                "model.implementation computes its loss itself; objective.loss and",
            )
            for wrong in ({"loss": "own:loss"}, {"z_loss": 1e-4})
        ),
        *(
            ({"objective": {"kind": kind}}, f"kind {kind} needs the separator that ends the given part of a document")
            for kind in ("continuation", "prefix")
        ),
        (
            {"objective": {"separator": "<|sep|>"}},
            "kind next_token has no use for a separator; remove it, or set kind: continuation or prefix",
        ),
        ({"objective": {"loss": "own:loss", "z_loss": 1e-4}}, "z_loss is part of our loss; a loss of your own adds its own terms"),
        (
            {"objective": {"kind": "prefix", "separator": "<|sep|>"}, "training": {"separate_documents": False}},
            "objective.kind prefix needs training.separate_documents: true; a prefix is that of one document",
        ),
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
        ({"model": {"settings": {"a": 1}}}, "settings are for a class of your own, and neither implementation nor block names one"),
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
        {"model": {"width": 35, "num_heads": 7, "positions": "none"}},
        {"model": {"rope_scaling": STRETCHED | {"low_frequency_factor": 4.0}}},
        {"model": {"rope_scaling": STRETCHED | {"kind": "llama3", "beta_fast": 0.5}}},
        {"model": {"rope_scaling": STRETCHED | {"kind": "linear", "factor": 1}}},
        {"model": {"implementation": "own:Model", "settings": {"anything": (1, None)}}},
        {"model": {"block": "own.deep:Block"}, "objective": {"loss": "own:loss"}},
        {"objective": {"kind": "own:goal", "settings": {"a": 1}, "z_loss": 0}},
        {"objective": {"kind": "continuation", "separator": "<|sep|>"}, "training": {"separate_documents": False}},
        {"objective": {"kind": "prefix", "separator": "<|sep|>", "z_loss": 1}, "model": {"sliding_window": 8}},
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


# --- the forms of a model ----------------------------------------------------------------------------------


def test_the_default_model_is_llamas_form_with_nothing_added() -> None:
    model, objective = RunConfig().model, RunConfig().objective
    assert (model.norm, model.norm_placement, model.feed_forward, model.positions) == ("rmsnorm", "before", "swiglu", "rope")
    off = (model.implementation, model.block, model.initial_weights, model.rope_scaling, model.sliding_window, model.qk_norm)
    assert {*off, model.attention_softcap, model.logit_softcap, objective.loss, objective.separator} == {None}
    assert (model.biases, model.tied_head, model.dropout, model.settings) == (False, False, 0.0, {})
    assert (objective.kind, objective.z_loss, objective.masked_tokens, objective.settings) == ("next_token", 0.0, (), {})
    assert (model.initial_deviation, model.depth_scaled_initialization) == (0.02, True)
    assert RunConfig().training.fill_in_the_middle is None


def test_the_defaults_of_a_stretched_rotation_are_the_published_ones() -> None:
    scaling = RopeScalingSection(kind="llama3", factor=8, original_context=8192)
    assert (scaling.low_frequency_factor, scaling.high_frequency_factor) == (1.0, 4.0)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.attention_factor) == (32.0, 1.0, None)
    assert hash(scaling) == hash(scaling.model_copy()), "tables are kept by it"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "ntk"},
        {"kind": None},
        {"factor": 0.99},
        {"factor": float("inf")},
        {"factor": float("nan")},
        {"factor": "4"},
        {"factor": None},
        {"original_context": 0},
        {"original_context": 2048.0},
        {"low_frequency_factor": 0},
        {"high_frequency_factor": -1.0},
        {"beta_fast": 0},
        {"beta_slow": float("inf")},
        {"attention_factor": 0.0},
        {"truncate": True},
    ],
    ids=str,
)
def test_a_stretched_rotation_takes_only_what_it_says(wrong: dict[str, Any]) -> None:
    build(model={"rope_scaling": STRETCHED})
    with pytest.raises(ValidationError):
        build(model={"rope_scaling": STRETCHED | wrong})


@pytest.mark.parametrize("key", ["kind", "factor", "original_context"])
def test_a_stretched_rotation_says_from_where_and_how_far(key: str) -> None:
    with pytest.raises(ValidationError, match="Field required"):
        build(model={"rope_scaling": {name: value for name, value in STRETCHED.items() if name != key}})


PLACES: list[Callable[[str], dict[str, Any]]] = [
    lambda path: {"model": {"implementation": path}},
    lambda path: {"model": {"block": path}},
    lambda path: {"objective": {"loss": path}},
    lambda path: {"objective": {"kind": path}},
]


@pytest.mark.parametrize("place", PLACES, ids=["implementation", "block", "loss", "kind"])
def test_what_is_of_ones_own_is_named_by_an_import_path(place: Callable[[str], dict[str, Any]]) -> None:
    for right in ("parts:Model", "package.parts:Model", "_a.b1._c:_D2"):
        assert build(**place(right)).model_dump() != RunConfig().model_dump()
    nowhere = ["", "parts", "parts.Model", ":Model", "parts:", "parts:Model.inner"]
    for wrong in (*nowhere, "parts:a:b", "pa rts:Model", "1a:b", "a:1b", "a/b:c", "a:b\n"):
        with pytest.raises(ValidationError, match="wanted package.module:name, of a class or function of your own"):
            build(**place(wrong))


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


# --- stages, and every key: frozen, strict, documented ----------------------------------------------------


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


@pytest.mark.parametrize("store", ["s3://bucket", "s3://bucket/runs/of-2026", "gs://bucket/runs/", "az://container/runs"])
def test_a_url_of_an_object_store_is_taken(store: str) -> None:
    assert build(checkpoint={"store": store}).checkpoint.store == store


@pytest.mark.parametrize("store", ["runs", "/runs", "s3:/bucket", "s3://", "file:///runs", "local:///runs", "s3://me:password@bucket/runs"])
def test_what_is_no_url_of_an_object_store_is_refused(store: str) -> None:
    with pytest.raises(ValidationError, match="such as s3://bucket/runs, without credentials"):
        build(checkpoint={"store": store})
