"""What is read under another layout is proved to be the commit's, and what becomes of each layout is told by the rules that hold."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from pretrain.checkpoint.layouts import StateLayout, all_pairs, judge, tell_resharding
from pretrain.checkpoint.reshard import PIECE_ELEMENTS, position_sum
from pretrain.run.folder import RunFolder
from tests.pretrain.verbs import call
from tests.tiny import write_tiny_dataset
from tests.training import tiny_config

LAYOUT = StateLayout(1, "bf16", "adamw", 2, 2)


def test_the_sum_depends_on_every_bit_and_place_and_on_no_split(seed: int) -> None:
    chosen = random.Random(seed)
    values = torch.randn(PIECE_ELEMENTS + 1000, generator=torch.Generator().manual_seed(seed))
    whole = position_sum(values, 7)
    cuts = sorted(chosen.sample(range(1, len(values)), 5))
    parts = [position_sum(values[low:high], 7 + low) for low, high in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    assert sum(parts) % 2**64 == whole
    short = values[:64]
    sums = {position_sum(short, 7)}
    for element in range(64):
        for bit in range(32):
            other = short.clone()
            other.view(torch.int32)[element] ^= -(2**31) if bit == 31 else 1 << bit
            sums.add(position_sum(other, 7))
    assert len(sums) == 1 + 64 * 32
    swaps = {position_sum(torch.cat([short[:k], short[k + 1 : k + 2], short[k : k + 1], short[k + 2 :]]), 7) for k in range(63)}
    assert len(swaps - sums) == 63
    assert position_sum(torch.zeros(8), 0) != position_sum(-torch.zeros(8), 0) != position_sum(-torch.zeros(8), 1)


@pytest.mark.long
def test_a_difference_is_a_defect_on_every_rank_that_names_the_parameter(
    run_on_ranks: Callable[..., list[Any]], tmp_path: Path, seed: int
) -> None:
    """Written by two ranks of stage 1 in bf16; read at every stage, on two ranks."""
    dataset, runs = tmp_path / "data", tmp_path / "runs"
    write_tiny_dataset(dataset, seed=seed % 1000)
    here = {"dataset": str(dataset), "runs": str(runs)}
    run_on_ranks("tests.training:train_runs", 2, {**here, "cases": {"moved": {}}, "stop_at": 3})
    cases = {
        "bf16-1": {"parallel__zero_stage": "1"},
        "bf16-2": {"parallel__zero_stage": "2"},
        "bf16-3": {"parallel__zero_stage": "3"},
        "fp32-0": {"parallel__zero_stage": "0", "precision": "fp32"},
    }
    commit = str(runs / "moved" / "checkpoints" / "step-00000003")
    ranks = run_on_ranks("tests.pretrain.checkpoint.reshard_on_ranks:verify_and_spoil", 2, {**here, "commit": commit, "cases": cases})
    for rank in ranks:
        for name, found in rank.items():
            good = {key: found[key] for key in ("read", "put back", "weights alone", "a bit of what is not looked at")}
            assert all(line.endswith("of 24 parameters are the commit's, bit for bit") for line in good.values()), (name, good)
            assert found["before"].startswith("what was read of"), name
            for key in ("two swapped", "a bit"):
                assert found[key].endswith("not what the engine holds: exp_avg of final_norm.weight"), (name, key)
            assert "step of " in found["a step"] and "is 4.0 instead of 3.0" in found["a step"].replace("tensor(4.)", "4.0"), name


def test_a_change_is_announced_in_one_line() -> None:
    assert tell_resharding(None, LAYOUT, 12) is None
    assert tell_resharding(LAYOUT, LAYOUT, 12) is None
    assert tell_resharding(LAYOUT, StateLayout(3, "fp32", "adamw", 4, 1), 12) == (
        "resharding: 2 ranks at stage 1, bf16, micro-batches of 2 -> 1 rank at stage 3, fp32, micro-batches of 4: weights, moments, steps "
        "and settings are exact; the model goes on in fp32"
    )


@pytest.mark.long
def test_the_matrix_is_what_the_run_file_and_the_run_folder_are_checked_by(tmp_path: Path) -> None:
    """Each pair of stage, precision and optimizer: refused where loading the run file or preparing the folder refuses, and only there."""

    def accepted(layout: StateLayout) -> Any:
        try:
            return tiny_config(
                tmp_path,
                tmp_path,
                run__name="one",
                precision=layout.precision,
                parallel__zero_stage=str(layout.zero_stage),
                optimizer__kind=layout.optimizer,
            )
        except UserError:
            return None

    layouts = [StateLayout(**row["to"]) for row in all_pairs((2,), 2, 12) if row["from"] == all_pairs((2,), 2, 12)[0]["from"]]
    configs = {layout: accepted(layout) for layout in layouts}
    for one in layouts:
        run = RunFolder(tmp_path / "one")
        if configs[one] is not None:
            run.prepare(configs[one])
            run.write_description(configs[one], tmp_path)
            (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
        for other in layouts:
            goes = configs[one] is not None and configs[other] is not None
            if goes:
                try:
                    run.prepare(configs[other])
                except UserError:
                    goes = False
            judgement = judge(one, other, 12)
            assert (judgement.outcome != "refused") == goes, (one, other)
            assert bool(judgement.reason) != goes
            assert not goes or (judgement.tolerance == 0) == (one == other)
        (run.path / "metrics.jsonl").unlink(missing_ok=True)


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    judgement = judge(LAYOUT, StateLayout(1, "bf16", "adamw", 2, 5), 12)
    assert judgement.outcome == "refused" and "a global batch of 12 samples does not divide by 5 ranks x 2 samples" in judgement.reason


def test_the_verb_prints_it() -> None:
    done = call("checkpoints", "matrix")
    assert (
        "adamw: written under (left)" in done.out and "c converted" in done.out and "precision bf16 with parallel.zero_stage 0" in done.out
    )
    with pytest.raises(UserError):
        call("checkpoints", "export", "nothing", "out", "--deepspeed")
