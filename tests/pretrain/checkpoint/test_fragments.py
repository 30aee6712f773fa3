"""Slices by name: written at one stage and world size, read at any other, to the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.fragments import FragmentIndex, state_hash
from tests.tiny import write_tiny_dataset

STAGES = {
    "bf16-1": {"parallel__zero_stage": "1"},
    "bf16-2": {"parallel__zero_stage": "2"},
    "bf16-3": {"parallel__zero_stage": "3"},
    "fp32-0": {"parallel__zero_stage": "0", "precision": "fp32"},
    "fp32-1": {"parallel__zero_stage": "1", "precision": "fp32"},
    "bf16-3-small": {
        "parallel__zero_stage": "3",
        "deepspeed": "{zero_optimization: {sub_group_size: 1500, stage3_param_persistence_threshold: 0}}",
    },
}


def test_a_commit_is_read_at_every_stage_and_world_size_and_training_goes_on(
    run_on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """ZeRO-1 on two ranks -> every stage on two and on one rank -> written again: the same hash of weights, moments, steps.

    And the way 1 (two ranks) -> 3 (one rank) -> 1 (two ranks) is bit for bit a run that was never moved.
    """
    dataset, runs = tmp_path / "data", tmp_path / "runs"
    write_tiny_dataset(dataset)
    here = {"dataset": str(dataset), "runs": str(runs)}
    stopped = run_on_ranks("tests.training:train_runs", 2, {**here, "cases": {"moved": STAGES["bf16-1"]}, "stop_at": 5})[0]["moved"]
    commit = runs / "moved" / "checkpoints" / "step-00000005"
    assert (stopped["outcome"], stopped["commit"]) == ("stopped", "step-00000005")

    rewritten = {}
    for ranks in (2, 1):
        copies = tmp_path / f"copies-{ranks}"
        rewritten[ranks] = run_on_ranks(
            "tests.training:rewrite", ranks, {**here, "commit": str(commit), "copies": str(copies), "cases": STAGES}
        )
        for name, case in rewritten[ranks][0].items():
            assert case["hash"] == stopped["hash"], (ranks, name)
        for rank in rewritten[ranks]:
            assert all(case["stale"] == [] for case in rank.values()), rank
    assert rewritten[2][0]["bf16-1"]["optimizer"] == "BF16_Optimizer"

    through_stage_3 = str(tmp_path / "copies-1" / "bf16-3")
    back = run_on_ranks(
        "tests.training:rewrite",
        2,
        {**here, "commit": through_stage_3, "copies": str(tmp_path / "back"), "cases": {"bf16-1": STAGES["bf16-1"]}},
    )[0]["bf16-1"]
    assert back["hash"] == stopped["hash"]


def test_every_private_attribute_says_what_we_take_it_for(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """At each stage, each owned slice holds exactly its elements of the parameter, and all slices cover all parameters."""
    dataset = tmp_path / "data"
    write_tiny_dataset(dataset)
    for rank in run_on_ranks("tests.training:private_attributes", 2, {"dataset": str(dataset), "runs": str(tmp_path), "cases": STAGES}):
        for name, case in rank.items():
            assert case == {"wrong": [], "covered": True, "optimizer": "AdamW"}, name


def test_a_gap_or_an_overlap_is_found(tmp_path: Path) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    def write(starts: list[tuple[int, int]]) -> None:
        save_file(
            {f"weight|w|{start}": torch.arange(start, start + count).float() for start, count in starts},
            tmp_path / "rank_00000.safetensors",
        )
        (tmp_path / "rank_00000.json").write_text(
            json.dumps({"world_size": 1, "parameters": {"w": {"shape": [2, 5], "scalars": {"step": 1.0}}}})
        )

    write([(0, 4), (4, 6)])
    assert FragmentIndex(tmp_path).weights()["w"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert FragmentIndex(tmp_path).read("weight", "w", 3, 4).tolist() == [3, 4, 5, 6]
    whole = state_hash(tmp_path)
    write([(0, 1), (1, 8), (9, 1)])
    assert state_hash(tmp_path) == whole
    for broken, word in (([(0, 4), (5, 5)], "gap"), ([(0, 5), (4, 6)], "overlap"), ([(0, 9)], "ends at element 9")):
        write(broken)
        with pytest.raises(ValueError, match=word):
            FragmentIndex(tmp_path)
