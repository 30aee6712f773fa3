"""The benchmark of checkpoints: its rows on a tiny state are sane, and a rank that is killed is followed by a step of the next attempt."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sample

ROOT = Path(__file__).parent.parent
FIELDS = {"name", "unit", "ours", "peer", "ratio", "target", "met", "note"}
SAVES = {
    "stall of a save, beside a save in the loop", "stall, beside torch.save", "stall, beside DCP's async_save",
    "until the commit, beside torch.save", "until the commit, beside DCP's end", "writing, beside the disk",
    "verifying and loading, beside the disk", "time lost to a save in 50 steps",
}  # fmt: skip


def measure(rows: str) -> dict[str, dict[str, Any]]:
    """Its rows by their names. Whether a goal is met is a matter of the machine, and of what else it does."""
    command = [sys.executable, str(ROOT / "benchmarks/checkpoint.py"), "--json", "--quick", "--rows", rows]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    for row in found.values():
        assert set(row) == FIELDS
        assert math.isfinite(row["ours"])
        assert row["peer"] is None or row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert row["peer"] is not None or row["target"] is not None or row["note"], "a peer is missing and nothing says why"
        assert (row["met"] is None) == (row["target"] is None)
    return found


def test_the_rows_of_saves_are_sane() -> None:
    found = measure("saves")
    assert found.keys() == {f"{name}, {ranks} ranks" for name in SAVES for ranks in (1, 2)}
    for ranks in (1, 2):
        stall, rate = found[f"stall of a save, beside a save in the loop, {ranks} ranks"], found[f"writing, beside the disk, {ranks} ranks"]
        assert 0 < stall["ours"] < stall["peer"], "the copy is a part of the save"
        assert rate["ours"] > 0
        assert f"15 MB, {ranks} of" in rate["note"], "a weight and two moments of 1.28 million parameters, in fp32"


def test_a_recovery_is_its_parts() -> None:
    found = measure("recovery")
    whole = found.pop("SIGKILL of a rank to the next attempt's first step, 2 ranks")
    assert all(row["ours"] > -0.1 for row in found.values()), "two clocks, of which one counts hundredths"
    assert len(found) == 5
    assert whole["ours"] == pytest.approx(sum(row["ours"] for row in found.values()))
