"""Norms by layer: at every ZeRO stage those of one model in one process."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.watch.norms import layer_of
from tests.pretrain.watch.on_norms import gradients_alone

CASES = {
    "fp32-0": {"precision": "fp32", "parallel__zero_stage": "0"},
    "fp32-1": {"precision": "fp32", "parallel__zero_stage": "1"},
    "bf16-1": {"parallel__zero_stage": "1"},
    "bf16-2": {"parallel__zero_stage": "2"},
    "bf16-3": {"parallel__zero_stage": "3"},
    "fp16-2": {"precision": "fp16", "parallel__zero_stage": "2"},
}


def test_a_parameter_belongs_to_its_layer() -> None:
    assert layer_of("blocks.3.attention.query.weight") == "blocks.3"
    assert layer_of("model.layers.11.mlp.weight") == "model.layers.11"
    assert layer_of("final_norm.weight") == "final_norm"
    assert layer_of("token_table") == "token_table"


@pytest.mark.long
def test_norms_are_those_of_one_model_in_one_process(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Two ranks, two micro-steps; gradients before clipping, without fp16's scale; weights behind the step."""
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "cases": CASES}
    first, second = run_on_ranks("tests.pretrain.watch.on_norms:measure", 2, arguments)
    expected = gradients_alone(str(tmp_path / "data"), str(tmp_path / "runs"), 2)
    assert set(expected) == {"token_table", "blocks.0", "blocks.1", "final_norm"}
    for name, found in first.items():
        norms = found["norms"]
        assert second[name]["norms"] == norms, f"{name}: not the same on all ranks"
        exact = 1e-5 if name.startswith("fp32") else 2e-2
        gradients = {key.removeprefix("norm/gradients/"): value for key, value in norms.items() if key.startswith("norm/gradients/")}
        weights = {key.removeprefix("norm/weights/"): value for key, value in norms.items() if key.startswith("norm/weights/")}
        assert found["num_owned"] + second[name]["num_owned"] == found["num_parameters"], f"{name}: not each element once"
        assert (found["loss_scale"] is None) == (not name.startswith("fp16")), name
        assert gradients == pytest.approx(expected, rel=exact), name
        assert weights == pytest.approx(found["weights"], rel=1e-6 if name.startswith("fp32") else 4e-3), name
        assert norms["parameter_norm"] == pytest.approx(math.hypot(*weights.values()), rel=1e-12), name
        assert found["without"] == sorted(f"norm/gradients/{layer}" for layer in expected), name
        if found["told"] is not None:
            assert math.hypot(*gradients.values()) == pytest.approx(found["told"], rel=1e-4), name
