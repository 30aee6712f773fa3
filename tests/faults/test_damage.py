"""A seeded sample of the campaign of damaged checkpoints and full disks, another one each time, and that its judgement can fail.

`python -m tests.faults.damage` runs all of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.verify import MANIFEST
from tests.faults.damage import DISKS_PER_CASE, FAULTS, KINDS, judge_disk

ROOT = Path(__file__).parent.parent.parent
SAMPLES = ((("damaged_tensors", "damaged_descriptions", "damaged_manifests"), "0.05", FAULTS), (("full_disks",), "0.1", DISKS_PER_CASE))


def test_every_kind_is_sampled() -> None:
    assert [name for names, _, _ in SAMPLES for name in names] == list(KINDS)


@pytest.mark.parametrize(("kinds", "share", "faults"), SAMPLES)
def test_sample(kinds: tuple[str, ...], share: str, faults: int, seed: int) -> None:
    """A case of each kind, in a process of its own; the kinds of files share a training."""
    chosen = [word for kind in kinds for word in ("--kind", kind)]
    command = [sys.executable, "-m", "tests.faults.damage", "--json", *chosen, "--seed", str(seed), "--sample", share]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    problems = [problem for one in found for problem in one["problems"]]
    assert not problems, "\n".join([*problems, f"to repeat: python {' '.join(command[1:])}"])
    told = [(one["kind"], one["tried"], one["passed"], one["seed"]) for one in found]
    assert (done.returncode, told) == (0, [(kind, faults, faults, seed) for kind in kinds]), done.stderr


def test_what_is_believed_though_it_is_damaged_is_told(tmp_path: Path, seed: int) -> None:
    """With blocks that are not compared with their sums."""
    code = (
        "import sys\n"
        "from tests.faults import damage\n"
        "from pretrain.checkpoint import blocks\n"
        "blocks.VerifiedFiles._read_block = lambda files, name, number, memory: memoryview((files.folder / name).read_bytes())\n"
        "damage.FLIPS, damage.CUTS, damage.DELETIONS, damage.SWAPS = 3, 0, 0, 0\n"
        "sys.exit(damage.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "--json", "--kind", "damaged_tensors", "--seed", str(seed), "--case", "0"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["tried"], found["passed"]) == (1, 3, 0), found
    assert all("bit " in problem for problem in found["problems"])


def test_a_disk_that_was_borne_badly_is_told() -> None:
    tried = {"saves": [2], "ranks": [1], "of": "tensors", "share": 0.5}
    whole: dict[str, list[str]] = {f"step-0000000{step}": [] for step in (2, 4, 6, 8)}
    undisturbed: dict[str, Any] = {"ended": ["done"], "said": [], "commits": [whole], "left": [], "hash": "a"}
    said = ["WARNING: step 4 could not be saved: rank 1: [Errno 27] File too large. Training goes on."]
    without = {name: found for name, found in whole.items() if name != "step-00000004"}
    good = {"ended": ["done"], "said": said, "commits": [without], "left": [], "hash": "a"}
    assert judge_disk(tried, [good, good], undisturbed) == []
    for change in (
        {"hash": "b"},
        {"said": []},
        {"ended": ["stopped"]},
        {"commits": [whole]},
        {"commits": [{**without, "step-00000002": [f"{MANIFEST}: missing"]}]},
        {"left": [".tmp-step-00000004-attempt-1"]},
    ):
        assert judge_disk(tried, [{**good, **change}, good], undisturbed), change
    assert judge_disk({**tried, "saves": [1, 2, 3]}, [good, good], undisturbed), "three in a row end it"
