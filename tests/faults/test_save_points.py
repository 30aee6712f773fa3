"""A seeded sample of the campaign of saves that are killed, another one each time; `python -m tests.faults.save_points` runs all of it."""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.faults.campaign import run_sample

ROOT = Path(__file__).parent.parent.parent


def test_sample(seed: int) -> None:
    """Some twenty points of the twelve hundred, in a process of its own, which forks. In a rank, or in a writer."""
    assert run_sample("save_points", random.Random(seed).choice(("rank", "writer")), seed, 0.02)["tried"] >= 15


def test_every_process_and_place_of_a_save_has_points(tmp_path: Path) -> None:
    """Of each rank, each writer, and the thread that commits: so that no sample is of nothing."""
    code = (
        f"from pathlib import Path; from tests.faults.save_points import all_points; print(*all_points(Path({str(tmp_path)!r})), sep='\\n')"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=True
    )
    points = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    counts = {place: sum(point[:2] == place for point in points) for place in {point[:2] for point in points}}
    assert set(counts) == {("rank", 0), ("rank", 1), ("writer", 0), ("writer", 1), ("commit", 0)}
    assert min(counts.values()) >= 60, counts
