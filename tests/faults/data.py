"""The fault campaign of the data stage: whatever happens to a build, its dataset ends with the bytes it would have had.

    python -m tests.faults.data [--sample SHARE] [--seed N] [--json] [--kind KIND ...] [--case NUMBER ...]

Out: for each kind of fault a line (or an object of JSON) with how many were tried, how many ended as promised, and the seed;
what did not is named with its case. Exit status 1 if anything did not.
"""

import sys
from collections.abc import Sequence

from tests.faults import changes, flips, kills, lines, names, points, poison
from tests.faults.campaign import Kind, run_campaign

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
    return run_campaign("data", __doc__, KINDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
