"""Slices by name: written at one stage and world size, read at any other, to the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.blocks import DamageError
from pretrain.checkpoint.image import Image
from pretrain.checkpoint.index import FragmentIndex, state_hash
from pretrain.checkpoint.verify import Commit
from pretrain.state import TrainState
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


@pytest.mark.long
def test_weights_begin_alike_at_every_stage_and_world_size(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """By hash, per precision; at stage 3 a rank never holds more than its part (zero.Init)."""
    dataset = tmp_path / "data"
    write_tiny_dataset(dataset)
    hashes: dict[str, set[str]] = {"bf16": set(), "fp32": set()}
    for ranks in (1, 2):
        here = {"dataset": str(dataset), "runs": str(tmp_path), "copies": str(tmp_path / f"copies-{ranks}"), "cases": STAGES}
        for name, case in run_on_ranks("tests.training:first_weights_of", ranks, here)[0].items():
            hashes[name.partition("-")[0]].add(case["hash"])
            assert case["largest"] == 320 * 48 // (ranks if "-3" in name else 1), name
    assert all(len(found) == 1 for found in hashes.values())


def test_the_scale_of_an_fp16_loss_goes_through_a_commit(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    dataset, commit = tmp_path / "data", tmp_path / "commit"
    write_tiny_dataset(dataset)
    commit.mkdir()
    here = {"dataset": str(dataset), "runs": str(tmp_path), "commit": str(commit)}
    for found in run_on_ranks("tests.training:loss_scale_through_a_commit", 2, here):
        assert found == {"cur_scale": 2.0**11, "cur_iter": 37, "last_overflow_iter": 12, "cur_hysteresis": 1}


def test_a_gap_or_an_overlap_is_found(tmp_path: Path) -> None:
    import torch

    def write(starts: list[tuple[int, int]]) -> Commit:
        tensors = {f"weight|w|{start}": torch.arange(start, start + count).float() for start, count in starts}
        about = {"parameters": {"w": {"shape": [2, 5], "scalars": {"step": 1.0}}}, "buffers": {}, "groups": [], "loss_scale": {}}
        return Commit(tmp_path, TrainState(), Image(0, tensors, about).write(tmp_path), {}, {}, 1, 1, 1.5, 0)

    commit = write([(0, 4), (4, 6)])
    assert FragmentIndex(commit).weights()["w"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert FragmentIndex(commit).read("weight", "w", 3, 4).tolist() == [3, 4, 5, 6]
    whole = state_hash(commit)
    assert state_hash(write([(0, 1), (1, 8), (9, 1)])) == whole
    wrong = (
        ([(0, 4), (5, 5)], "has a gap at element 4"),
        ([(0, 4), (5, 6)], "has a gap at element 4"),  # as many elements as there should be
        ([(0, 5), (4, 6)], "has an overlap at element 5"),
        ([(0, 5), (4, 5)], "has an overlap at element 5"),
        ([(0, 9)], "ends at element 9"),
    )
    for broken, words in wrong:
        with pytest.raises(DamageError, match=words):
            FragmentIndex(write(broken))
