"""What is not finite changes no bit, on no rank, at every stage and precision: DeepSpeed's doing, or ours."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.finite import spread_not_finite
from tests.tiny import write_tiny_dataset

LOSS, GRADIENT = ("loss", "nan", "1.0"), ("gradient", "inf", "null")
"""What goes bad, how, and `optimizer.clip_norm`. The fault campaign tries every engine with both."""
CASES = [
    *(("fp32", 0, LOSS), ("fp32", 0, GRADIENT), ("fp32", 1, GRADIENT), ("fp32", 2, LOSS), ("fp32", 3, GRADIENT)),
    *(("bf16", 1, LOSS), ("bf16", 2, GRADIENT), ("bf16", 3, LOSS), ("fp16", 1, GRADIENT), ("fp16", 3, LOSS)),
]
SETTINGS = {
    "training__total_tokens": "1536",
    "evaluate__every_steps": "null",
    "checkpoint__self_test": "false",
    "guard__compare_replicas_every_steps": "1",
}
"""Six steps. What every rank holds stays equal, too."""


@pytest.mark.long
def test_a_bad_number_of_one_rank_is_skipped_by_both_and_counted(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Step 3 of rank 1: its loss (whose own gradient is finite) or one element of one gradient. The run goes on and ends."""
    write_tiny_dataset(tmp_path / "data")
    cases = {
        f"{precision}-{stage}-{place}": {
            "overrides": {**SETTINGS, "precision": precision, "parallel__zero_stage": str(stage), "optimizer__clip_norm": clip},
            "rank": 1, "steps": [3], "micro_step": 1, "place": place, "value": value,
        }
        for precision, stage, (place, value, clip) in CASES
    }  # fmt: skip
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "cases": cases}
    ranks = run_on_ranks("tests.faults.bad_numbers:train_with_bad_numbers", 2, arguments)
    for name in cases:
        found = ranks[0][name]
        assert found["applied"] == ranks[1][name]["applied"], name
        assert [rank[name]["changed"] + rank[name]["not_finite"] for rank in ranks] == [[], []], name
        assert found["ended"] == ranks[1][name]["ended"] == "done", name
        skipped = [step for step, applied in enumerate(found["applied"], start=1) if not applied]
        assert 3 in skipped and len(found["applied"]) == 6, name
        if "fp16" not in name:  # which looks for its scale, too
            assert skipped == [3], name
        told = [row["skip/step"] for row in found["rows"] if "skip/step" in row]
        assert told == skipped, name
        assert [row["skipped_steps"] for row in found["rows"] if "learning_rate" in row][-1] == len(skipped), name
        (commit,) = found["commits"].values()
        assert (commit["state"]["step"], commit["state"]["skipped_steps"]) == (6, len(skipped)), name
        assert math.isfinite(float.fromhex(commit["loss"])), name


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_the_factor_is_nan_for_a_loss_that_is_not_finite(loss: float) -> None:
    assert spread_not_finite(torch.tensor(0.25), torch.tensor(loss)).isnan()


@pytest.mark.parametrize("loss", [0.0, -0.0, 3.0, -3.0, 3e38, 1e-45])
def test_the_factor_is_the_same_to_the_bit_otherwise(loss: float) -> None:
    scale = torch.tensor(1 / 3)
    assert spread_not_finite(scale, torch.tensor(loss)).view(torch.int32) == scale.view(torch.int32)
