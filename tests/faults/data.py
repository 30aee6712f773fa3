"""The fault campaign of the data stage: whatever happens to a build, its dataset ends with the bytes it would have had.

    python -m tests.faults.data [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

Out: for each kind of fault a line (or an object of JSON) with how many were tried, how many ended as promised, and the seed;
what did not is named with its case. Exit status 1 if anything did not.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence

from tests.faults import changes, flips, kills, lines, names, points, poison
from tests.faults.campaign import Kind, Result, choose_cases, run_kind

KINDS = {
    kind.name: kind
    for kind in (
        Kind("worker_kills", 20, kills.WORKER_KILLS, kills.prepare, kills.kill_workers),
        Kind("driver_kills", 10, kills.DRIVER_KILLS, kills.prepare, kills.kill_drivers),
        Kind("kill_points", 60, 1, points.prepare, points.kill_at_points),
        Kind("fuzzed_lines", 20, lines.LINES_PER_CASE, lines.prepare_nothing, lines.check_lines),
        Kind("cut_files", 20, lines.CUTS_PER_CASE, lines.prepare_nothing, lines.check_cuts),
        Kind("full_disk", 20, 1, points.prepare, points.fill_disk),
        Kind("flipped_bits", 20, flips.FLIPS_PER_CASE, flips.prepare, flips.flip_bits),
        Kind("changed_inputs", 4 * len(changes.CHANGES), 1, changes.prepare, changes.check_change),
        Kind("poison", poison.NUM_CASES, 1, poison.prepare, poison.check_poison),
        Kind("hostile_names", len(names.SCENARIOS), 1, names.prepare_nothing, names.check_names),
        Kind("two_builds", 10, 1, kills.prepare, kills.meet),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds that are asked for; the exit status."""
    asked = _parse(arguments)
    num_failed = 0
    for name in asked.kind or KINDS:
        kind = KINDS[name]
        result = run_kind(kind, asked.seed, asked.case or choose_cases(kind, asked.seed, asked.sample))
        num_failed += bool(result.problems)
        _tell(result, asked.json)
    return 1 if num_failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.data", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=float, default=1.0, metavar="SHARE", help="run this share of each kind's cases (default: all)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="repeat a campaign (default: a new one)")
    parser.add_argument("--json", action="store_true", help="one object for each kind instead of a line")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind; may be given several times")
    parser.add_argument("--case", action="append", type=int, help="only the case of this number; may be given several times")
    return parser.parse_args(arguments)


def _tell(result: Result, as_json: bool) -> None:
    facts = {"kind": result.kind, "tried": result.tried, "passed": result.passed, "seed": result.seed}
    if as_json:
        print(json.dumps({**facts, "problems": result.problems, "seconds": round(result.seconds, 1)}), flush=True)
        return
    print(f"{result.kind:<14}  tried {result.tried:>5}  passed {result.passed:>5}  seed {result.seed}", flush=True)
    for problem in result.problems:
        print(f"    {problem}", flush=True)
    if result.problems:
        print(f"    to repeat: python -m tests.faults.data --kind {result.kind} --seed {result.seed} --case NUMBER", flush=True)


if __name__ == "__main__":
    sys.exit(main())
