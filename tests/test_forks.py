"""Forks, changed configurations and `--fresh` by the command line, with real ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_tiny_dataset
from tests.training import TINY

LIMIT_SECONDS = 150
Pretrain = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", name="pretrain")
def _pretrain(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """`pretrain ARGUMENTS` in a folder with a dataset and `runs/base`, which was trained for 10 steps and saved at every second."""
    root = tmp_path_factory.mktemp("forks")
    write_tiny_dataset(root / "data")
    (root / "sums.yaml").write_text("{}")
    given = {**TINY, "data.root": "data", "parallel.cpu_processes": "1", "checkpoint": "{every_steps: 2, keep: 2, self_test: false}"}

    def pretrain(*arguments: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
        overrides = [f"{key}={value}" for key, value in given.items()] if arguments[0] == "train" else []
        command = [sys.executable, "-m", "pretrain.cli", *arguments[:1], *(["sums.yaml"] if overrides else []), *overrides, *arguments[1:]]
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        assert done.returncode == status, (arguments, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        return done

    pretrain("train", "run.name=base")
    pretrain.root = root  # type: ignore[attr-defined]
    return pretrain


def attempts(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_branch_is_recorded_protected_and_shown(pretrain: Pretrain) -> None:
    """`start_from` in run.yaml and attempts.jsonl; the parent keeps the commit while it goes on; both lists say so."""
    runs: Path = pretrain.root / "runs"  # type: ignore[attr-defined]
    longer = "training.total_tokens=3584"
    said = pretrain("train", "run.name=decay", "start_from=base@8", "start_with=everything", longer, "optimizer.peak_lr=5e-3").stderr
    start = f"{runs / 'base'}@8"
    assert f"begins with the everything of {start}, every byte verified" in said
    assert "done: 14 steps" in said
    assert f"start_from: {start}\n" in (runs / "decay" / "run.yaml").read_text()
    (row,) = attempts(runs / "decay")
    assert (row["parent"], row["first_step"], row["last_step"], row["committed"]) == (start, 8, 14, 14)

    said = pretrain("train", "run.name=base", longer).stderr
    assert "training.total_tokens: 2560 -> 3584, from step 10 on" in said
    assert sorted(path.name for path in (runs / "base" / "checkpoints").glob("step-*")) == [f"step-{step:08d}" for step in (8, 12, 14)]
    listed = {row["name"]: row["stays"] for row in json.loads(pretrain("checkpoints", "list", "runs/base", "--json").stdout)}
    assert listed["step-00000008"] == f"the beginning of {runs / 'decay'}"
    assert json.loads(pretrain("checkpoints", "list", "runs/decay", "--json").stdout)[-1]["name"] == start
    changed = [row for row in attempts(runs / "base") if "changed" in row]
    assert [(row["changed"], row["from_step"]) for row in changed] == [({"training.total_tokens": [2560, 3584]}, 10)]


def test_a_branch_that_cannot_be_makes_no_folder(pretrain: Pretrain) -> None:
    runs: Path = pretrain.root / "runs"  # type: ignore[attr-defined]
    for arguments, words in (
        (["start_from=bsae@8"], "Runs there: base"),
        (["start_from=base@7"], "has no checkpoint of step 7; it has"),
        (["start_from=never"], "start_from=never is this run itself"),
        (["start_from=base", "start_with=everything", "model.norm_epsilon=1e-6"], "model.norm_epsilon: it has 1e-05, asked for 1e-06"),
    ):
        assert words in pretrain("train", "run.name=never", *arguments, status=2).stderr
        assert not (runs / "never").exists()
    said = pretrain("train", "run.name=wide", "start_from=base", "model.feed_forward_width=96", status=2).stderr
    assert "holds other parameters than the model has" in said and "feed_forward" in said
    assert "Traceback" not in said


def test_a_run_begins_anew_only_when_it_is_told_to(pretrain: Pretrain) -> None:
    runs: Path = pretrain.root / "runs"  # type: ignore[attr-defined]
    short = "training.total_tokens=512"
    fast = ("schedule={warmup_tokens: 0, decay_tokens: 0}", short, "run.name=again")
    pretrain("train", *fast)
    before = {path.name: path.read_bytes() for path in (runs / "again").iterdir() if path.is_file()}
    assert "is done" in pretrain("train", *fast).stderr
    said = pretrain("train", "--fresh", *fast).stderr
    assert f"the run that was in {runs / 'again'} is now in {runs / 'again.before-1'}" in said
    assert "(new)" in said and "done: 2 steps" in said
    assert {path.name: path.read_bytes() for path in (runs / "again.before-1").iterdir() if path.is_file()} == before
    assert [row["attempt"] for row in attempts(runs / "again")] == [1]
