"""One hang of the campaign, of another kind each time; `python -m tests.faults.hangs` runs all of them."""

import random
import subprocess
import sys
from pathlib import Path

from tests.faults.campaign import run_sample

ROOT = Path(__file__).parent.parent.parent
KINDS = ("stopped", "deadlock", "data", "save", "end", "paused")


def test_sample(seed: int) -> None:
    """In a process of its own, which may count its descendants. A quarter of a minute each: to start, to hang, to start again."""
    assert run_sample("hangs", random.Random(seed).choice(KINDS), seed, 0.05)["tried"] == 1


def test_every_kind_may_be_drawn() -> None:
    names = subprocess.run([sys.executable, "-m", "tests.faults.hangs", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "{" + ",".join(KINDS) + "}" in names.stdout
