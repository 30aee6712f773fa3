"""One changed bit of one rank's weights is found, and its rank named, at every stage at which all ranks hold them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine import replicas
from pretrain.engine.replicas import sum_of_bits
from tests.tiny import write_tiny_dataset

CASES = {
    "bf16-1": {"precision": "bf16", "parallel__zero_stage": "1"},
    "bf16-2": {"precision": "bf16", "parallel__zero_stage": "2"},
    "fp32-1": {"precision": "fp32", "parallel__zero_stage": "1"},
    "fp32-0": {"precision": "fp32", "parallel__zero_stage": "0"},
}


def test_a_flipped_bit_is_found_and_its_rank_named(run_on_ranks: Callable[..., list[Any]], tmp_path: Path, seed: int) -> None:
    """Two ranks: the fp32 slices say which one is wrong, whoever holds them. Equal before, and after the bit is put back."""
    write_tiny_dataset(tmp_path / "data")
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "cases": CASES, "seed": seed, "flips": 6}
    ranks = run_on_ranks("tests.faults.bad_numbers:compare_after_flips", 2, arguments)
    assert ranks[0] == ranks[1], "every rank says the same"
    for name in CASES:
        for flip in ranks[0][name]:
            wrong = f"rank {flip['rank']} on {flip['host']} ({flip['parameter']})"
            assert flip["before"] == flip["after"] == "equal", (name, flip)
            if name == "fp32-0":
                assert flip["parameter"] in flip["found"] and "or the other one: two ranks of stage 0 cannot tell" in flip["found"]
            else:
                assert f": {wrong}. Memory" in flip["found"], (name, flip)


def test_a_run_ends_at_a_changed_bit_and_commits_nothing_of_it(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """A mantissa bit of rank 1 in step 4, where a comparison and a save are due; the save of step 2 stands."""
    write_tiny_dataset(tmp_path / "data")
    overrides = {"checkpoint__every_steps": "2", "checkpoint__self_test": "false", "guard__compare_replicas_every_steps": "4"}
    case = {"overrides": overrides, "rank": 1, "steps": [4], "micro_step": 1, "place": "weight"}
    arguments = {"dataset": str(tmp_path / "data"), "runs": str(tmp_path / "runs"), "cases": {"flipped": case}}
    for rank in run_on_ranks("tests.faults.bad_numbers:train_with_bad_numbers", 2, arguments):
        found = rank["flipped"]
        assert found["ended"].startswith("CorruptReplicaError: weights differ between ranks") and ": rank 1 on " in found["ended"]
        assert list(found["commits"]) == ["step-00000002"] and len(found["applied"]) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_bit_and_any_swap_changes_the_sum(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    plain = torch.randn(300).to(dtype)
    whole = sum_of_bits(plain, 0)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    sums = {int(whole)}
    for place in (0, 1, 150, 299):
        for bit in range(8 * plain.element_size()):
            changed = plain.clone()
            changed.view(integers)[place] ^= torch.tensor(1 << bit).to(integers)
            sums.add(int(sum_of_bits(changed, 0)))
    assert len(sums) == 1 + 4 * 8 * plain.element_size()
    swapped = plain.clone()
    swapped[3], swapped[8] = plain[8], plain[3]
    assert sum_of_bits(swapped, 0) != whole


def test_the_sum_of_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    torch.manual_seed(seed)
    plain = torch.randn(1000).bfloat16()
    whole = sum_of_bits(plain, 0)
    assert sum_of_bits(plain[:317], 0) + sum_of_bits(plain[317:], 317) == whole
    monkeypatch.setattr(replicas, "ELEMENTS_AT_ONCE", 64)
    assert sum_of_bits(plain, 0) == whole
