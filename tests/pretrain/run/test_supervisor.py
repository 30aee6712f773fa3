"""What the supervisor decides before it starts anything."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import EXIT_DEFECT, EXIT_DONE, EXIT_MISTAKE, EXIT_RESUMABLE, UserError
from configs.schema import RunConfig
from pretrain.run import supervisor
from pretrain.run.attempt import count_processes
from pretrain.run.folder import RunFolder
from pretrain.run.outcome import OUTCOME_FOLDER_VARIABLE, Outcome, Verdict
from pretrain.run.ranks import rank_environment
from pretrain.run.rollback import Rollback, read_rollbacks
from pretrain.run.supervisor import attempts_in_vain


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
    flight_record = {name for name in on_gpu if name.startswith("TORCH_NCCL_")}
    assert {name: on_gpu[name] for name in on_gpu.keys() - flight_record}.items() <= on_cpu.items()
    assert flight_record.isdisjoint(on_cpu) and on_gpu["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/nccl_"
    for name, value in on_gpu.items():
        monkeypatch.setenv(name, value)
    second = rank_environment(2, tmp_path / "second", has_gpu=True)
    assert second["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/second/nccl_", "not where the attempt before had it"


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    wrong = config(tmp_path / "runs", parallel={"cpu_processes": 3}, training={"global_batch_samples": 8, "micro_batch_samples": 2})
    said: list[str] = []
    umask = os.umask(0o022)
    os.umask(umask)
    with pytest.raises(UserError, match="does not divide by 3 ranks x 2 samples.*global_batch_samples=6 or 12"):
        supervisor.supervise(wrong, tmp_path, said.append, lambda *_: False, lambda _: 0)
    assert list(tmp_path.iterdir()) == []
    assert said == []
    assert os.umask(umask) == umask


def test_a_size_of_the_ramp_that_does_not_divide_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ramp = [{"until_tokens": 10_000, "global_batch_samples": 4}, {"until_tokens": 20_000, "global_batch_samples": 6}]
    training = {"batch_ramp": tuple(ramp), "global_batch_samples": 12, "micro_batch_samples": 2}
    wrong = config(tmp_path / "runs", parallel={"cpu_processes": 3}, training=training)
    with pytest.raises(UserError, match=r"batch of 4 samples does not divide by 3.*training\.batch_ramp\[0\]\.global_batch_samples=6"):
        supervisor.supervise(wrong, tmp_path, pytest.fail, lambda *_: False, lambda _: 0)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint room is asked about the last step of this run's folder; no rank starts, nothing is written."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(supervisor, "run_team", lambda *_: pytest.fail("a rank was started"))
    mine = config(tmp_path, training={"total_tokens": 2500, "global_batch_samples": 4, "micro_batch_samples": 4, "sequence_length": 64})
    run = RunFolder.of(mine)
    run.prepare(mine)
    run.write_description(mine, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}
    asked: list[tuple[Path, int]] = []
    said: list[str] = []
    umask = os.umask(0o022)
    try:
        assert supervisor.supervise(mine, tmp_path, said.append, lambda *place: asked.append(place) is None, lambda _: 0) == 0
    finally:
        os.umask(umask)
    assert asked == [(run.checkpoints, 10)]
    assert len(said) == 1
    assert "all 10 steps are committed" in said[0]
    assert {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()} == before


def test_an_attempt_is_recorded_with_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(
        supervisor, "run_team", lambda *_: (Verdict(75, "stopped and saved\nmore", False), {0: Outcome("stopped", "", 3, 9)})
    )
    mine = config(tmp_path)
    umask = os.umask(0o022)
    try:
        for attempt in (1, 2):
            assert supervisor.supervise(mine, tmp_path, lambda _: None, lambda *_: False, lambda _: 0) == 75
            row = RunFolder.of(mine).attempts()[-1]
            found = {key: row[key] for key in ("attempt", "status", "cause", "first_step", "last_step", "num_processes", "pid")}
            assert list(found.values()) == [attempt, 75, "stopped and saved", 3, 9, 1, os.getpid()]
    finally:
        os.umask(umask)
    assert not RunFolder.of(mine).lease_file.exists()


KILLED = Verdict(EXIT_RESUMABLE, "rank 1 was ended by SIGKILL", is_fault=True)
CRASHED = Verdict(EXIT_DEFECT, "rank 0 was ended by signal 11.", is_fault=True)
FAILED = [
    Verdict(EXIT_DEFECT, f"rank 0 failed:\nTraceback (most recent call last):\n  at {n}\nValueError: {n % 2}", True) for n in range(4)
]
STOPPED = Verdict(EXIT_RESUMABLE, "stopped and saved", is_fault=False)
DONE = Verdict(EXIT_DONE, "done", is_fault=False)
MISTAKE = Verdict(EXIT_MISTAKE, "a mistake", is_fault=False)


@pytest.mark.parametrize(
    ("verdicts", "steps", "status", "pauses"),
    [
        ([DONE], [10], 0, []),
        ([STOPPED], [10], 75, []),
        ([MISTAKE], [0], 2, []),
        ([KILLED, DONE], [10, 20], 0, [0]),  # a new commit: at once
        ([KILLED, KILLED, DONE], [0, 0, 20], 0, [5, 30]),
        ([KILLED, CRASHED, KILLED], [0, 0, 0], 75, [5, 30]),  # three in vain: it gives up
        ([KILLED] * 9 + [DONE], range(10, 110, 10), 0, [0] * 9),  # never while it progresses
        ([KILLED] * 6, [0, 0, 10, 10, 10, 10], 75, [5, 30, 0, 5, 30]),
        ([KILLED, STOPPED], [0, 0], 75, [5]),
        ([KILLED, MISTAKE], [0, 0], 2, [5]),
        ([FAILED[0], FAILED[2]], [0, 0], 1, [5]),  # the same error again: it would come a third time
        ([FAILED[0], FAILED[1], FAILED[2]], [0, 0, 0], 1, [5, 30]),
        ([FAILED[0], FAILED[2], DONE], [10, 20, 30], 0, [0, 0]),
    ],
)
def test_it_begins_again_while_that_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdicts: list[Verdict], steps: list[int], status: int, pauses: list[int]
) -> None:
    """steps: the newest commit behind each attempt."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    attempts, slept, said = iter(zip(verdicts, steps, strict=False)), list[float](), list[str]()
    newest = 0

    def run_team(*_: object) -> tuple[Verdict, dict[int, Outcome]]:
        nonlocal newest
        verdict, newest = next(attempts)
        return verdict, {}

    monkeypatch.setattr(supervisor, "run_team", run_team)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(sleep=slept.append))
    mine = config(tmp_path)
    umask = os.umask(0o022)
    try:
        assert supervisor.supervise(mine, tmp_path, said.append, lambda *_: False, lambda _: newest) == status
    finally:
        os.umask(umask)
    assert slept == pauses
    assert next(attempts, None) is None
    rows = RunFolder.of(mine).attempts()
    assert [(row["attempt"], row["status"]) for row in rows] == [(n, verdict.status) for n, verdict in enumerate(verdicts, 1)]
    assert not RunFolder.of(mine).lease_file.exists()


def test_a_stop_file_made_while_a_rank_dies_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lay there before the command is removed: this start is asked for. One that came since stays, and no other attempt begins."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    mine = config(tmp_path)
    stop_file, found = RunFolder.of(mine).stop_file, list[bool]()

    def run_team(*_: object) -> tuple[Verdict, dict[int, Outcome]]:
        found.append(stop_file.exists())
        stop_file.touch()
        return (STOPPED if len(found) == 1 else KILLED), {}

    monkeypatch.setattr(supervisor, "run_team", run_team)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(sleep=lambda _: None))
    umask, said = os.umask(0o022), list[str]()
    try:
        for _ in range(2):
            assert supervisor.supervise(mine, tmp_path, said.append, lambda *_: False, lambda _: 0) == EXIT_RESUMABLE
    finally:
        os.umask(umask)
    assert found == [False, False]
    assert said[-1] == f"{stop_file} is there: no other attempt is made."


def test_a_rollback_is_written_down_and_the_next_attempt_begins_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a commit and without a pause, more often than attempts may be in vain; the row is there before the lease is given up."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    plans = [asdict(Rollback(30 + n, 9.0, 12.0, 20, 100, 108, n + 1)) for n in range(4)]
    verdicts = iter([*(Verdict(EXIT_RESUMABLE, "back", True, rollback=plan) for plan in plans), DONE])
    mine, known = config(tmp_path), list[int]()
    run = RunFolder.of(mine)

    def run_team(*_: object) -> tuple[Verdict, dict[int, Outcome]]:
        known.append(len(read_rollbacks(run.path)))
        return next(verdicts), {}

    monkeypatch.setattr(supervisor, "run_team", run_team)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(sleep=lambda _: pytest.fail("it waited")))
    umask = os.umask(0o022)
    try:
        assert supervisor.supervise(mine, tmp_path, lambda _: None, lambda *_: False, lambda _: 0) == 0
    finally:
        os.umask(umask)
    assert known == [0, 1, 2, 3, 4]
    assert [asdict(one) for one in read_rollbacks(run.path)] == plans
    assert [row.get("rollback") for row in run.attempts()] == [*plans, None]


def test_a_run_may_be_told_never_to_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(supervisor, "run_team", lambda *_: (KILLED, {}))
    mine, said = config(tmp_path), list[str]()
    mine = mine.model_copy(update={"run": mine.run.model_copy(update={"attempts_in_vain": 1})})
    umask = os.umask(0o022)
    try:
        assert supervisor.supervise(mine, tmp_path, said.append, lambda *_: False, lambda _: 0) == 75
    finally:
        os.umask(umask)
    assert said[-1] == KILLED.message


def test_a_launch_s_attempts_in_vain_are_counted_over_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed, vanished (its lease is still there), and of another launch; a new checkpoint or a polite stop begins the count anew."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(supervisor, "run_team", lambda *_: (KILLED, {}))
    mine, said = config(tmp_path), list[str]()
    mine = mine.model_copy(update={"run": mine.run.model_copy(update={"attempts_in_vain": 2})})
    run = RunFolder.of(mine)
    run.path.mkdir(parents=True)
    in_vain = {"attempt": 1, "launch": "a", "from_commit": 20, "status": 75, "cause": "killed"}
    for row in ({**in_vain, "launch": "b"}, {**in_vain, "stopped": True}, in_vain):
        run.record_attempt(row)
    assert [attempts_in_vain(run, launch, newest) for launch, newest in (("a", 20), ("a", 30), ("b", 20), (None, 20))] == [1, 0, 0, 0]
    run.lease_file.write_text(json.dumps({**in_vain, "attempt": 4}))
    assert attempts_in_vain(run, "a", 20) == 2, "it is written down only when its lease is taken"
    umask = os.umask(0o022)
    try:
        assert supervisor.supervise(mine, tmp_path, said.append, lambda *_: False, lambda _: 20, "a") == EXIT_DEFECT
    finally:
        os.umask(umask)
    assert [row["attempt"] for row in run.attempts()[3:]] == [4] and not run.lease_file.exists()
    assert said == ["2 attempts of launch a ended without a new checkpoint (run.attempts_in_vain): no other one is made."]
