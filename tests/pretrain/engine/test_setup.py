"""What DeepSpeed is given: ours from the run file, the user's word for word, nothing twice."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.deepspeed_keys import OWNED_KEYS
from configs.errors import UserError
from configs.loader import load_config
from configs.schema import RunConfig
from pretrain.engine.setup import deepspeed_config

NUM_PARAMETERS = 12_345
BUCKETS = {"reduce_bucket_size": NUM_PARAMETERS, "allgather_bucket_size": NUM_PARAMETERS}


def config(**sections: Any) -> RunConfig:
    training = {"global_batch_samples": 24, "micro_batch_samples": 2, "sequence_length": 64}
    return RunConfig.model_validate({"training": training, **sections})


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), *((stage, kind) for stage in (1, 2, 3) for kind in ("bf16", "fp32"))])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_whole_of_it(stage: int, precision: str, deterministic: bool) -> None:
    run = config(precision=precision, parallel={"zero_stage": stage}, run={"deterministic": deterministic}, optimizer={"clip_norm": 0.7})
    expected: dict[str, Any] = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.7,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **BUCKETS} | ({"overlap_comm": False} if deterministic else {}),
    }
    if precision == "bf16":
        expected |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    assert deepspeed_config(run, 3, NUM_PARAMETERS) == expected


def test_the_users_keys_pass_word_for_word() -> None:
    section = {
        "zero_optimization": {
            "reduce_bucket_size": 5e8,
            "allgather_bucket_size": 7,
            "contiguous_gradients": False,
            "offload_optimizer": {"device": "cpu"},
        },
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "zero_allow_untested_optimizer": False,
        "a key nobody knows": [1, "two", None, {"three": 3.5}],
    }
    run = config(deepspeed=copy.deepcopy(section))
    found = deepspeed_config(run, 1, NUM_PARAMETERS)
    assert found["zero_optimization"].pop("stage") == 1
    assert {key: found[key] for key in section} == section
    assert run.deepspeed == section, "the run's own section was changed"
    found["a key nobody knows"][3]["three"] = 4
    assert run.deepspeed == section, "what DeepSpeed changes must not reach the run file"


def test_an_empty_section_is_a_section() -> None:
    """`zero_optimization:` with nothing behind it is null in YAML."""
    assert deepspeed_config(config(deepspeed={"zero_optimization": None}), 1, NUM_PARAMETERS)["zero_optimization"] == {
        "stage": 1,
        **BUCKETS,
    }


@pytest.mark.parametrize(("num_parameters", "elements"), [(30_000, 30_000), (500_000_000, 500_000_000), (70_000_000_000, 500_000_000)])
def test_buckets_are_no_larger_than_the_model(num_parameters: int, elements: int) -> None:
    """DeepSpeed allocates them whole."""
    found = deepspeed_config(config(), 1, num_parameters)["zero_optimization"]
    assert found["reduce_bucket_size"] == found["allgather_bucket_size"] == elements


def test_no_clipping_is_zero_for_deepspeed() -> None:
    assert deepspeed_config(config(optimizer={"clip_norm": None}), 1, NUM_PARAMETERS)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("num_ranks", "steps"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_accumulation_fills_the_global_batch(num_ranks: int, steps: int) -> None:
    found = deepspeed_config(config(), num_ranks, NUM_PARAMETERS)
    assert found["gradient_accumulation_steps"] == steps
    assert found["train_batch_size"] == found["train_micro_batch_size_per_gpu"] * steps * num_ranks


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide by 5 ranks x 2 samples"):
        deepspeed_config(config(), 5, NUM_PARAMETERS)


@pytest.mark.parametrize("dotted", OWNED_KEYS)
def test_an_owned_key_in_a_run_file_is_refused_with_the_key_to_use(tmp_path: Path, dotted: str) -> None:
    content: Any = {"enabled": True}
    for part in reversed(dotted.split(".")):
        content = {part: content}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"deepspeed": content}))
    with pytest.raises(UserError) as refusal:
        load_config(path)
    assert str(path) in str(refusal.value)
    assert f"deepspeed.{dotted} is not set here; use {OWNED_KEYS[dotted]}" in str(refusal.value)
    with pytest.raises(UserError, match="is not set here; use"):
        load_config(Path(__file__).parents[3] / "configs/runs/demo.yaml", [f"deepspeed.{dotted}=1"])


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_key_we_set_is_refused_from_the_user(stage: int, precision: str) -> None:
    """What we write over must not be taken silently: each is owned, or the user's value wins."""
    run = config(precision=precision, parallel={"zero_stage": stage})
    for key in deepspeed_config(run, 1, NUM_PARAMETERS).keys() - {"zero_optimization", "zero_allow_untested_optimizer"}:
        assert key in OWNED_KEYS, key


def test_deepspeed_itself_accepts_it() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for precision in ("bf16", "fp32"):
        parsed = DeepSpeedConfig(deepspeed_config(config(precision=precision, parallel={"zero_stage": 2}), 1, NUM_PARAMETERS))
        assert (parsed.train_batch_size, parsed.gradient_accumulation_steps, parsed.zero_optimization_stage) == (24, 12, 2)
        assert parsed.bfloat16_config.enabled == (precision == "bf16")
        assert parsed.scheduler_name is None
        assert parsed.optimizer_name is None
