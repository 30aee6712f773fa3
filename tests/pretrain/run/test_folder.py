"""The run folder: whose it is, and what it takes in."""

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.run.folder import RunFolder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    path = tmp_path / "mine"
    path.mkdir()
    return RunFolder(path)


def config(root: Path, **sections: Any) -> RunConfig:
    run = {"root": str(root), "name": "mine"} | sections.pop("run", {})
    return RunConfig.model_validate({"run": run, **sections})


def test_attempts_survive_a_torn_line(run: RunFolder) -> None:
    run.record_attempt({"attempt": 1})
    with run.attempts_file.open("a") as file:
        file.write('{"attempt": 2, "ho')
    assert run.attempts() == [{"attempt": 1}]
    run.record_attempt({"attempt": 3})
    assert run.attempts() == [{"attempt": 1}, {"attempt": 3}]
    run.record_attempt({"attempt": 4})
    assert run.attempts_file.read_text().splitlines()[-2:] == ['{"attempt": 3}', '{"attempt": 4}']


@pytest.mark.parametrize(("readable_by", "mode"), [("owner", 0o700), ("group", 0o750)])
def test_modes(tmp_path: Path, readable_by: str, mode: int) -> None:
    mine = config(tmp_path, run={"readable_by": readable_by})
    run = RunFolder.of(mine)
    assert run.path == tmp_path / "mine"
    before = os.umask(0)  # the mode is ours, not the umask's
    try:
        assert run.prepare(mine) is False
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.path.stat().st_mode) == mode
    run.write_description(mine, Path(mine.data.folder()))
    assert run.prepare(mine) is True
    other = config(tmp_path, run={"readable_by": "owner" if readable_by == "group" else "group"})
    assert run.prepare(other) is True
    assert stat.S_IMODE(run.path.stat().st_mode) == (0o700 if readable_by == "group" else 0o750)


def test_its_description_is_a_run_file_and_names_what_ran(tmp_path: Path) -> None:
    mine = config(tmp_path, optimizer={"peak_lr": 3e-4}, deepspeed={"flops_profiler": {"enabled": True}})
    run = RunFolder.of(mine)
    run.prepare(mine)
    run.write_description(mine, Path(mine.data.folder()))
    assert run.load_config() == mine
    environment = json.loads(run.environment_file.read_text())
    assert environment["versions"].keys() >= {"torch", "deepspeed", "numpy"}
    assert environment["host"] == socket.gethostname()
    assert RunFolder.existing(run.path).path == run.path


def test_another_configuration_is_refused_with_exactly_the_keys_that_differ(tmp_path: Path) -> None:
    mine = config(tmp_path)
    run = RunFolder.of(mine)
    run.prepare(mine)
    run.write_description(mine, Path(mine.data.folder()))
    before = run.config_file.read_bytes()
    other = config(
        tmp_path,
        run={"seed": 7},
        optimizer={"peak_lr": 1e-3, "clip_norm": None},
        training={"micro_batch_samples": 4},  # may change
        parallel={"zero_stage": 3},  # may change
    )
    with pytest.raises(UserError) as refusal:
        run.prepare(other)
    rows = [line.strip() for line in str(refusal.value).splitlines() if line.startswith("  ")]
    assert rows == [
        "run.seed: the folder has 1234, asked for 7",
        "optimizer.peak_lr: the folder has 0.0003, asked for 0.001",
        "optimizer.clip_norm: the folder has 1.0, asked for None",
    ]
    assert "run.name=" in str(refusal.value)
    assert run.config_file.read_bytes() == before


def test_what_may_change_is_accepted_and_written(tmp_path: Path) -> None:
    mine = config(tmp_path)
    run = RunFolder.of(mine)
    run.prepare(mine)
    run.write_description(mine, Path(mine.data.folder()))
    changed = config(
        tmp_path,
        training={"micro_batch_samples": 4},
        parallel={"zero_stage": 3, "processes": 2},
        checkpoint={"every_steps": 5, "keep": 9},
        evaluate={"every_steps": None},
        watch={"log_every_steps": 1, "wandb": "disabled"},
        deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}},
    )
    assert run.prepare(changed) is True
    run.write_description(changed, Path(changed.data.folder()))
    assert run.load_config() == changed


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    mine = config(tmp_path)
    (tmp_path / "mine").mkdir()
    assert RunFolder.of(mine).prepare(mine) is False  # an empty one is welcome
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    mode = (tmp_path / "mine").stat().st_mode
    with pytest.raises(UserError, match="exists and holds no run"):
        RunFolder.of(mine).prepare(mine)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "mine").stat().st_mode == mode


def test_a_folder_without_a_run_names_the_runs_beside_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").touch()
    with pytest.raises(UserError, match=r"three holds no run \(no run\.yaml\)\. Runs beside it: one, two\."):
        RunFolder.existing(tmp_path / "three")
