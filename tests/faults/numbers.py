"""The fault campaign of bad numbers: what is not finite changes nothing on any rank and is never committed; a changed bit is found.

    python -m tests.faults.numbers [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

Out: for each kind of fault a line (or an object of JSON) with how many were tried, how many ended as promised, and the seed. Exit status 1
if anything did not. A case is one start of two ranks, which try several faults one after the other.
"""

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_on_ranks
from tests.faults.bad_numbers import VALUES
from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.tiny import write_tiny_dataset

ENGINES = [*(("fp32", stage) for stage in range(4)), *(("bf16", stage) for stage in (1, 2, 3)), *(("fp16", stage) for stage in (1, 2, 3))]
STEPS = 8
FAULTS_PER_CASE = 10
LIMIT_SECONDS = 400


def prepare(folder: Path, chosen: random.Random) -> Path:
    """A tiny dataset."""
    write_tiny_dataset(folder / "data", seed=chosen.randrange(2**31))
    return folder / "data"


def check_bad_numbers(case: Case) -> Outcome:
    """A number goes bad in one step, or in as many in a row as the run bears."""
    trainings = {f"fault-{number}": choose_training(case.chosen, in_a_row=number % 4 == 3) for number in range(FAULTS_PER_CASE)}
    arguments = {"dataset": str(case.prepared), "runs": str(case.folder / "runs"), "cases": trainings}
    try:
        ranks = run_on_ranks("tests.faults.bad_numbers:train_with_bad_numbers", 2, arguments, LIMIT_SECONDS, case.folder)
    except pytest.fail.Exception as failure:
        return Outcome(FAULTS_PER_CASE, [str(failure)], passed=0)
    problems = {name: judge(one, [rank[name] for rank in ranks]) for name, one in trainings.items()}
    told = [f"{name}: {'; '.join(found)} ({trainings[name]})" for name, found in problems.items() if found]
    return Outcome(len(problems), told, passed=len(problems) - len(told))


def choose_training(chosen: random.Random, in_a_row: bool) -> dict[str, Any]:
    """A run, and what goes bad in it."""
    precision, stage = chosen.choice(ENGINES)
    place = "loss" if in_a_row and precision == "fp16" else chosen.choice(("loss", "gradient"))  # a gradient alone is its scale's search
    borne = chosen.randrange(2, 5)
    first = chosen.randrange(1, STEPS - borne)
    overrides = {
        "training__total_tokens": str(STEPS * 256),
        "precision": precision,
        "parallel__zero_stage": str(stage),
        "optimizer__clip_norm": chosen.choice(("1.0", "null")),
        "checkpoint__every_steps": "2",
        "checkpoint__keep": "9",
        "checkpoint__self_test": "false",
        "evaluate__every_steps": "null",
        "guard__skips_in_a_row": str(borne),
        "guard__compare_replicas_every_steps": "1",
    }
    return {
        "overrides": overrides,
        "rank": chosen.randrange(2),
        "steps": list(range(first, first + borne)) if in_a_row else [first],
        "micro_step": chosen.randrange(2),
        "place": place,
        "value": chosen.choice(sorted(VALUES)),
    }


def judge(tried: dict[str, Any], ranks: list[dict[str, Any]]) -> list[str]:
    """What is not as promised."""
    first, problems = ranks[0], []
    steps, borne = tried["steps"], int(tried["overrides"]["guard__skips_in_a_row"])
    skipped = [step for step, applied in enumerate(first["applied"], start=1) if not applied]
    if ranks[0]["applied"] != ranks[1]["applied"] or ranks[0]["ended"] != ranks[1]["ended"]:
        problems.append(f"the ranks differ: {[(rank['ended'], rank['applied']) for rank in ranks]}")
    if any(rank["changed"] or rank["not_finite"] for rank in ranks):
        problems.append(f"bits changed: {[rank['changed'][:3] + rank['not_finite'][:3] for rank in ranks]}")
    if not set(steps) <= set(skipped) or (tried["overrides"]["precision"] != "fp16" and skipped != steps):
        problems.append(f"skipped {skipped}, wanted {steps}")
    told = [row["skip/step"] for row in first["rows"] if "skip/step" in row]
    if len(steps) < borne:
        if first["ended"] != "done" or told != skipped:
            problems.append(f"ended {first['ended']}, told of {told}, skipped {skipped}")
    elif f"step {steps[-1]} was skipped, the last of {borne} in a row" not in first["ended"] or "UserError" not in first["ended"]:
        problems.append(f"ended {first['ended']}")
    if first["committed_not_finite"]:
        problems.append(f"committed: {first['committed_not_finite'][:3]}")
    for name, commit in first["commits"].items():
        counted = len([step for step in skipped if step <= commit["state"]["step"]])
        if not math.isfinite(float.fromhex(commit["loss"])) or commit["state"]["skipped_steps"] != counted:
            problems.append(f"{name} has loss {commit['loss']} and {commit['state']['skipped_steps']} skipped steps, wanted {counted}")
    return problems


def check_flipped_bits(case: Case) -> Outcome:
    """A bit of a live weight of one rank is changed, at a stage where the ranks can tell whose it is."""
    precision, stage = case.chosen.choice([engine for engine in ENGINES if engine[1] in (1, 2)])
    cases = {"flips": {"precision": precision, "parallel__zero_stage": str(stage)}}
    arguments = {"dataset": str(case.prepared), "runs": str(case.folder / "runs"), "cases": cases, "seed": case.chosen.randrange(2**31)}
    try:
        ranks = run_on_ranks(
            "tests.faults.bad_numbers:compare_after_flips", 2, {**arguments, "flips": FAULTS_PER_CASE}, LIMIT_SECONDS, case.folder
        )
    except pytest.fail.Exception as failure:
        return Outcome(FAULTS_PER_CASE, [str(failure)], passed=0)
    wrong = []
    for flip, other in zip(ranks[0]["flips"], ranks[1]["flips"], strict=True):
        named = f": rank {flip['rank']} on {flip['host']} ({flip['parameter']}). Memory"
        if flip != other or named not in flip["found"] or flip["before"] != "equal" or flip["after"] != "equal":
            wrong.append(f"{precision} stage {stage}: {flip}, {other}")
    return Outcome(FAULTS_PER_CASE, wrong, passed=FAULTS_PER_CASE - len(wrong))


KINDS = {
    kind.name: kind
    for kind in (
        Kind("bad_numbers", 5, FAULTS_PER_CASE, prepare, check_bad_numbers),
        Kind("flipped_weights", 5, FAULTS_PER_CASE, prepare, check_flipped_bits),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("numbers", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
