"""The campaign of resharding: a run goes on under every other layout, and is the run that was never moved.

    python -m tests.faults.matrix [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

layouts: from each stage, precision and optimizer to each other one on two ranks, and to other micro-batches, at a step of chance.
ranks: a run on 2, 1, 2 and 3 ranks in turn, at stages of chance. All go over the end of an epoch. Each hand-over leaves weights, moments
and steps as they were, bit for bit; every sample is seen exactly once, at its step; losses stay within what `pretrain checkpoints matrix`
says. Out: for each kind a line (or an object of JSON). Exit status 1 if anything was otherwise.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.layouts import Judgement, StateLayout, judge
from tests.conftest import run_on_ranks
from tests.faults.campaign import Case, Kind, Outcome, run_campaign
from tests.tiny import write_tiny_dataset

STEPS, GLOBAL_BATCH, NUM_DOCUMENTS = 10, 12, 60
TIMEOUT_SECONDS = 150
TARGETS_AT_ONCE = 4
ALL = [
    StateLayout(stage, precision, optimizer, 2, 2)
    for optimizer in ("adamw", "muon")
    for precision in ("fp32", "bf16", "fp16")
    for stage in range(4)
]
POSSIBLE = [layout for layout in ALL if judge(layout, layout, GLOBAL_BATCH).outcome == "exact"]
MOVES = [
    (one, goals[first : first + TARGETS_AT_ONCE])
    for one in POSSIBLE
    for goals in [[two for two in POSSIBLE if judge(one, two, GLOBAL_BATCH).outcome != "refused"] + [replace(one, micro_batch_samples=3)]]
    for first in range(0, len(goals), TARGETS_AT_ONCE)
]
RANKS = (2, 1, 2, 3)
WALKS = 8

Leg = dict[str, Any]


def prepare(folder: Path, chosen: random.Random) -> Path:
    """A dataset whose first epoch ends within a run."""
    write_tiny_dataset(folder / "data", NUM_DOCUMENTS, seed=chosen.randrange(1000))
    return folder / "data"


def check_layouts(case: Case) -> Outcome:
    """From one layout to some others."""
    written, goals = MOVES[case.number]
    cut = case.chosen.randrange(2, STEPS - 1)
    legs = [leg("still", written), leg("moved", written, until=cut)]
    legs += [leg(f"to {number}", goal, copy_of="moved", attempt=2) for number, goal in enumerate(goals)]
    still, begun, *moved = run_legs(case, legs, 2)
    problems = ledger_problems("never moved", still["fed"]) + compare(still, begun, judge(written, written, GLOBAL_BATCH), "before", False)
    for goal, found in zip(goals, moved, strict=True):
        what = f"{written} -> {goal} behind step {cut}"
        problems += compare(still, found, judge(written, goal, GLOBAL_BATCH), what, goal != written)
    return Outcome(len(goals), problems)


def check_ranks(case: Case) -> Outcome:
    """One run on 2, 1, 2 and 3 ranks in turn."""
    precision = case.chosen.choice(("fp32", "bf16"))
    stages = [layout.zero_stage for layout in POSSIBLE if (layout.precision, layout.optimizer) == (precision, "adamw")]
    layouts = [StateLayout(case.chosen.choice(stages), precision, "adamw", case.chosen.choice((1, 2)), ranks) for ranks in RANKS]
    cuts = sorted(case.chosen.sample(range(1, STEPS), len(RANKS) - 1))
    still, found = run_legs(case, [leg("still", layouts[0]), leg("moved", layouts[0], until=cuts[0])], RANKS[0])
    problems = ledger_problems("never moved", still["fed"])
    for number, (before, layout) in enumerate(pairwise(layouts), 2):
        until = cuts[number - 1] if number <= len(cuts) else None
        (found,) = run_legs(case, [leg("moved", layout, until=until, attempt=number)], layout.num_ranks)
        judgement = judge(before, layout, GLOBAL_BATCH)._replace(tolerance=judge(layouts[0], layouts[1], GLOBAL_BATCH).tolerance)
        problems += compare(still, found, judgement, f"{before} -> {layout} behind step {cuts[number - 2]}", True)
    if found["kind"] != "done":
        problems.append(f"the run ended as {found['kind']}")
    return Outcome(len(RANKS) - 1, problems)


def leg(name: str, layout: StateLayout, until: int | None = None, attempt: int = 1, copy_of: str | None = None) -> Leg:
    """What `moves.move` is told."""
    settings = {
        "training": f"{{sequence_length: 32, global_batch_samples: {GLOBAL_BATCH}, micro_batch_samples: {layout.micro_batch_samples}, "
        f"total_tokens: {STEPS * GLOBAL_BATCH * 32}}}",
        "parallel__zero_stage": str(layout.zero_stage),
        "precision": layout.precision,
        "optimizer__kind": layout.optimizer,
        "model__dropout": "0.0",  # its masks are those of a rank's micro-batch
        "evaluate__every_steps": "null",
        "checkpoint__self_test": "false",
    }
    name = name.replace(" ", "-")
    return {"name": name, "settings": settings, "until": until, "attempt": attempt} | ({"copy_of": copy_of} if copy_of else {})


def run_legs(case: Case, legs: list[Leg], num_ranks: int) -> list[dict[str, Any]]:
    """What each leg came to. Raises where a rank fails."""
    ranks = case.folder / f"ranks-{legs[0]['name']}-{legs[0]['attempt']}"
    ranks.mkdir()
    arguments = {"dataset": str(case.prepared), "runs": str(case.folder / "runs"), "legs": legs}
    try:
        return run_on_ranks("tests.faults.moves:move", num_ranks, arguments, TIMEOUT_SECONDS, ranks)[0]
    except pytest.fail.Exception as error:  # no Exception: it would end the campaign
        raise RuntimeError(str(error)) from None


def ledger_problems(what: str, fed: dict[str, list[list[Any]]]) -> list[str]:
    """Each sample once in each epoch, and more than one epoch."""
    samples = [(epoch, sample) for step in fed.values() for epoch, sample, _ in step]
    problems = [] if len(set(samples)) == len(samples) == STEPS * GLOBAL_BATCH else [f"{what}: samples were fed twice, or not at all"]
    return problems + ([] if len({epoch for epoch, _ in samples}) > 1 else [f"{what}: no epoch ended"])


def compare(still: dict[str, Any], found: dict[str, Any], judgement: Judgement, what: str, is_moved: bool) -> list[str]:
    """What is otherwise than in the run that was never moved."""
    problems: list[str] = []
    if found["handed_over"] != [True] * is_moved:
        problems.append(f"{what}: verified {found['handed_over']}")
    for step, samples in found["fed"].items():
        if samples != still["fed"][step]:
            problems.append(f"{what}: step {step} was fed other samples")
    for step, loss in found["losses"].items():
        if not abs(loss - still["losses"][step]) <= judgement.tolerance * abs(still["losses"][step]):
            problems.append(f"{what}: the loss of step {step} is {loss!r} instead of {still['losses'][step]!r}")
    if not found["fed"]:
        problems.append(f"{what}: no step was made")
    return problems


KINDS = {
    kind.name: kind
    for kind in (
        Kind("layouts", len(MOVES), TARGETS_AT_ONCE, prepare, check_layouts),
        Kind("ranks", WALKS, len(RANKS) - 1, prepare, check_ranks),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    return run_campaign("matrix", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
