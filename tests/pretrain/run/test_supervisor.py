"""What the supervisor decides before it starts anything."""

import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.run import supervisor
from pretrain.run.folder import RunFolder
from pretrain.run.outcome import OUTCOME_FOLDER_VARIABLE
from pretrain.run.supervisor import count_processes, rank_environment


def config(root: Path = Path("runs"), **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"root": str(root), "name": "mine"}, **sections})


@pytest.mark.parametrize(
    ("num_gpus", "parallel", "expected"),
    [
        (0, {}, 1),
        (0, {"cpu_processes": 2}, 2),
        (8, {"cpu_processes": 2}, 8),
        (8, {"processes": 4, "cpu_processes": 2}, 4),
        (0, {"processes": 4}, 4),
    ],
    ids=str,
)
def test_count_processes(monkeypatch: pytest.MonkeyPatch, num_gpus: int, parallel: dict[str, int], expected: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    assert count_processes(config(parallel=parallel)) == expected


def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = rank_environment(1, tmp_path, has_gpu=False).keys()
    assert names >= {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR"}
    for name in names:
        monkeypatch.setenv(name, f"the user's {name}")
    found = rank_environment(1, tmp_path, has_gpu=False)
    assert found == {name: f"the user's {name}" for name in names} | {OUTCOME_FOLDER_VARIABLE: str(tmp_path)}


def test_what_the_ranks_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in rank_environment(1, tmp_path, has_gpu=False):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [rank_environment(n, tmp_path, has_gpu=False)["OMP_NUM_THREADS"] for n in (1, 3, 8, 20)] == ["8", "2", "1", "1"]
    on_cpu, on_gpu = (rank_environment(2, tmp_path, has_gpu=has_gpu) for has_gpu in (False, True))
    assert on_cpu["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in on_gpu
    assert "GLOO_SOCKET_IFNAME" not in on_gpu
    assert on_gpu.items() <= on_cpu.items()


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    wrong = config(tmp_path / "runs", parallel={"cpu_processes": 3}, training={"global_batch_samples": 8, "micro_batch_samples": 2})
    said: list[str] = []
    umask = os.umask(0o022)
    os.umask(umask)
    with pytest.raises(UserError, match="does not divide by 3 ranks x 2 samples.*global_batch_samples=6 or 12"):
        supervisor.supervise(wrong, tmp_path, said.append, lambda *_: False)
    assert list(tmp_path.iterdir()) == []
    assert said == []
    assert os.umask(umask) == umask


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint room is asked about the last step of this run's folder; no rank starts, nothing is written."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(supervisor, "_run_ranks", lambda *_: pytest.fail("a rank was started"))
    mine = config(tmp_path, training={"total_tokens": 2500, "global_batch_samples": 4, "micro_batch_samples": 4, "sequence_length": 64})
    run = RunFolder.of(mine)
    run.prepare(mine)
    run.write_description(mine, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}
    asked: list[tuple[Path, int]] = []
    said: list[str] = []
    umask = os.umask(0o022)
    try:
        assert supervisor.supervise(mine, tmp_path, said.append, lambda *place: asked.append(place) is None) == 0
    finally:
        os.umask(umask)
    assert asked == [(run.checkpoints, 10)]
    assert len(said) == 1
    assert "all 10 steps are committed" in said[0]
    assert {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()} == before


def test_an_attempt_is_recorded_with_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(supervisor, "_run_ranks", lambda *_: (75, "stopped and saved\nmore", (3, 9)))
    mine = config(tmp_path)
    umask = os.umask(0o022)
    try:
        for attempt in (1, 2):
            assert supervisor.supervise(mine, tmp_path, lambda _: None, lambda *_: False) == 75
            row = RunFolder.of(mine).attempts()[-1]
            found = {key: row[key] for key in ("attempt", "status", "cause", "first_step", "last_step", "num_processes", "pid")}
            assert list(found.values()) == [attempt, 75, "stopped and saved", 3, 9, 1, os.getpid()]
    finally:
        os.umask(umask)
    assert not RunFolder.of(mine).lease_file.exists()
