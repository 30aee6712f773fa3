"""Before the first step: every stage comes back as it was saved, and what would not is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.checkpoint.test_fragments import STAGES
from tests.tiny import write_tiny_dataset


@pytest.mark.long
def test_every_stage_passes_and_what_is_broken_does_not(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    dataset = tmp_path / "data"
    write_tiny_dataset(dataset)
    cases = STAGES | {"fp16-2": {"parallel__zero_stage": "2", "precision": "fp16"}}
    here = {"dataset": str(dataset), "runs": str(tmp_path / "runs"), "cases": cases}
    for rank in run_on_ranks("tests.pretrain.checkpoint.self_tests:self_tests", 2, here):
        assert rank.keys() == cases.keys()
        for name, case in rank.items():
            assert case["unchanged"], f"{name}: the state is another one after the test"
            assert case["left"] == [], name
            assert case["round robin"] == (None if name == "fp32-0" else "RuntimeError"), name
            assert case["a slice that is not written"] == "RuntimeError", name
            assert case["no folder"] == "UserError", name


@pytest.mark.long
def test_frozen_tied_and_buffered_state_comes_back(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """A model of the user's own with a frozen matrix, a tied head and buffers of numbers and of counts, at every stage and from one
    number of ranks to another."""
    cases = {name: case for name, case in STAGES.items() if not name.endswith("small")}
    written = run_on_ranks("tests.pretrain.checkpoint.self_tests:write_odd_models", 2, {"folder": str(tmp_path), "cases": cases})[0]
    assert written.keys() == cases.keys()
    for ranks in (2, 1):
        for read in run_on_ranks("tests.pretrain.checkpoint.self_tests:read_odd_models", ranks, {"folder": str(tmp_path), "cases": cases}):
            assert read == {f"{wrote} -> {name}": [] for wrote in cases for name in cases}, ranks
