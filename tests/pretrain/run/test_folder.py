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
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = run.config_file.read_bytes()
    other = config(
        tmp_path,
        run={"seed": 7},
        optimizer={"kind": "muon", "peak_lr": 1e-3},
        precision="fp32",  # may change
        training={"micro_batch_samples": 4},  # may change
        parallel={"zero_stage": 0},  # may change
    )
    ramp = ({"until_tokens": 1000, "global_batch_samples": 8},)
    with pytest.raises(
        UserError, match=r"batch_ramp: the folder has \[\], asked for \[\{'until_tokens': 1000, 'global_batch_samples': 8\}\]\n"
    ):
        run.prepare(config(tmp_path, training={"batch_ramp": ramp}))
    assert run.changes() == []
    with pytest.raises(UserError) as refusal:
        run.prepare(other)
    rows = [line.strip() for line in str(refusal.value).splitlines() if line.startswith("  ")]
    assert rows == [
        "run.seed: the folder has 1234, asked for 7",
        "optimizer.kind: the folder has 'adamw', asked for 'muon'",
    ]
    assert "run.name=" in str(refusal.value)
    assert run.config_file.read_bytes() == before


@pytest.mark.parametrize("begun", ["metrics.jsonl", "checkpoints/step-00000001"])
def test_a_start_that_failed_leaves_the_folder_free(tmp_path: Path, begun: str) -> None:
    """Who mends a wrong value after it was refused by a rank needs no other name; once a step was made, nothing is taken over."""
    mine, other = config(tmp_path, model={"norm_epsilon": 1.0}), config(tmp_path, model={"norm_epsilon": 1e-3})
    run = RunFolder.of(mine)
    for wanted, existed in ((mine, False), (mine, True), (other, False), (other, True)):
        assert run.prepare(wanted) is existed
        assert run.take_changes(wanted, 0) == []
        run.write_description(wanted, Path(wanted.data.folder()))
        run.record_attempt({"attempt": 1, "status": 2})
        (run.path / "metrics.jsonl").touch()
    (run.path / begun).parent.mkdir(exist_ok=True)
    (run.path / begun).write_text("x")
    with pytest.raises(UserError, match=r"model.norm_epsilon: the folder has 0.001, asked for 1.0"):
        run.prepare(mine)


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


def begun(tmp_path: Path, mine: RunConfig) -> RunFolder:
    """A run folder in which steps were made."""
    run = RunFolder.of(mine)
    run.prepare(mine)
    run.write_description(mine, Path(mine.data.folder()))
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def test_what_is_applied_is_said_in_a_line_and_recorded_and_what_is_free_is_not(tmp_path: Path) -> None:
    run = begun(tmp_path, config(tmp_path, optimizer={"peak_lr": 1e-3}))
    run.record_attempt({"attempt": 1, "status": 75})
    sources = tuple({"name": f"source-{number}", "path": "x"} for number in range(9))
    other = config(tmp_path, optimizer={"peak_lr": 5e-4}, watch={"log_every_steps": 1}, data={"sources": sources}, checkpoint={"keep": 9})
    assert run.prepare(other, 120) is True
    data, rate = run.take_changes(other, 120)
    assert rate == "optimizer.peak_lr: 0.001 -> 0.0005, from step 120 on"
    assert data.startswith("data.sources: [] -> [{'name': 'source-0', ")
    assert data.endswith("..., where data is built anew; what was seen is held by its hash")
    assert len(data) < 200
    (row,) = run.changes()
    assert row["from_step"] == 120
    assert row["changed"].keys() == {"data.sources", "optimizer.peak_lr"}
    assert row["changed"]["optimizer.peak_lr"] == [1e-3, 5e-4]
    assert [source["name"] for source in row["changed"]["data.sources"][1]] == [source["name"] for source in sources]
    assert [attempt["attempt"] for attempt in run.attempts()] == [1], "it is no attempt"
    run.write_description(other, Path(other.data.folder()))
    assert run.take_changes(other, 130) == []
    assert len(run.changes()) == 1


def test_a_run_may_become_longer_and_never_shorter_than_it_is(tmp_path: Path) -> None:
    step = 256 * 2048
    run = begun(tmp_path, config(tmp_path, training={"total_tokens": 10 * step}))
    assert run.prepare(config(tmp_path, training={"total_tokens": 20 * step}), 8)
    assert run.prepare(config(tmp_path, training={"total_tokens": 8 * step}), 8)
    with pytest.raises(UserError, match=rf"has come to step 8, and training.total_tokens={7 * step} ends it at step 7; raise it"):
        run.prepare(config(tmp_path, training={"total_tokens": 7 * step}), 8)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_at_nothing(tmp_path: Path) -> None:
    mine = config(tmp_path)
    run = begun(tmp_path, mine)
    run.record_attempt({"attempt": 1, "committed": 0})
    assert run.prepare(mine) is True  # killed before its first one
    run.record_attempt({"attempt": 2, "committed": 40})
    run.record_attempt({"attempt": 3, "end": None})
    with pytest.raises(UserError, match=r"has had a checkpoint of step 40, and .*checkpoints holds none now.*--fresh"):
        run.prepare(mine)
    # Whole, damaged, or left behind by a return to the beginning: what reads it decides.
    for name in ("step-00000040", "rejected/step-00000040", "rolled-back/step-00000040-attempt-2"):
        (run.checkpoints / name).mkdir(parents=True)
        assert run.prepare(mine) is True
        (run.checkpoints / name).rmdir()


def test_a_run_is_set_aside_whole_under_a_new_name(tmp_path: Path) -> None:
    mine = config(tmp_path)
    assert RunFolder.of(mine).set_aside() is None
    for number in (1, 2):
        run = begun(tmp_path, mine)
        (run.path / "note").write_text(str(number))
        run.lease_file.write_text("{}")
        before = {path.name: path.read_bytes() for path in run.path.iterdir() if path != run.lease_file}
        aside = run.set_aside()
        assert aside == tmp_path / f"mine.before-{number}"
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
        assert not run.path.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert RunFolder.of(mine).set_aside() is None
    assert (tmp_path / "mine" / "thesis.txt").exists()


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
