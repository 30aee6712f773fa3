"""The benchmark of the loss: its rows on a tiny size are sane, its reference is right; on a GPU the house's goal is met."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--quick", "--tokens", "64", "--vocabulary", "512", "--width", "32", "--rounds", "1"]
FIELDS = {"name", "unit", "ours", "peer", "ratio", "target", "met", "note"}


def measure(*arguments: str) -> dict[str, dict[str, Any]]:
    """Its rows by their names."""
    command = [sys.executable, str(ROOT / "benchmarks/loss.py"), "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def check(rows: dict[str, dict[str, Any]]) -> None:
    """What is true of every row on every machine."""
    for row in rows.values():
        assert set(row) == FIELDS
        assert 0 < row["ours"] < math.inf
        assert row["peer"] is None or row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert row["peer"] is not None or row["target"] is not None or row["note"], "a peer is missing and nothing says why"
        assert row["met"] in (None, True), row


def test_the_rows_are_sane() -> None:
    rows = measure(*TINY, "--precision", "bf16", "--sides", "plain", "liger")
    check(rows)
    parts = ("loss off float64", "hidden states' gradient off float64", "weight's gradient off float64")
    wanted = {f"bf16 {part}{beside}" for part in parts for beside in ("", ", beside plain")}
    wanted |= {"bf16 speed, beside plain", "bf16 memory beside inputs and gradients", "bf16 memory, beside plain"}
    assert wanted <= set(rows)
    # Random targets: the logarithm of the vocabulary and half of the logits' variance, give or take what 64 targets and 512 rows do.
    found, exact = (float(word) for word in rows["bf16 loss off float64"]["note"].split() if word[0].isdigit())
    assert exact == pytest.approx(math.log(512) + 2.4**2 / 2, abs=1.5)
    assert abs(found / exact - 1) * 1e6 == pytest.approx(rows["bf16 loss off float64"]["ours"], abs=3)
    # The reference is not what it is compared with, and both are the same gradients: off by the rounding of bf16, and no more.
    for part in parts[1:]:
        assert 100 < rows[f"bf16 {part}, beside plain"]["peer"] < 2**-7 * 1e6


@pytest.mark.gpu
def test_on_a_gpu_the_loss_keeps_within_half_a_gigabyte() -> None:
    rows = measure("--quick")
    check(rows)
    memory = rows["bf16 memory beside inputs and gradients"]
    assert (memory["target"], memory["met"]) == (500, True)
    assert rows["bf16 memory, beside ours eager"]["peer"] < 500
