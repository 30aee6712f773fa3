"""`pretrain status` and `pretrain stop`: one word for each way in which a run stands, also where Slurm has a part in it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.errors import UserError
from configs.loader import dump_config, load_config
from pretrain.checkpoint.verify import Commit, commit_name, write_manifest
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from pretrain.verbs import status as verbs
from tests.pretrain.verbs import call

TOTAL_STEPS = 10


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was launched once and has not begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(verbs, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(verbs, "BEAT_SECONDS", 0.3)
    (tmp_path / "bin").mkdir()
    (tmp_path / "mine.yaml").write_text("training: {sequence_length: 32, global_batch_samples: 8, total_tokens: 2560}\n")
    config = load_config(tmp_path / "mine.yaml")
    folder = RunFolder.of(config)
    launched = folder.path / "launches" / "first"
    launched.mkdir(parents=True)
    (launched / "run.yaml").write_text(dump_config(config))
    (launched / "jobs.json").write_text('{"kind": "slurm", "jobs": ["7", "8"]}')
    return folder


def slurm_says(*jobs: str) -> None:
    """Jobs as squeue prints them; who cancels one takes it out."""
    folder = Path.cwd() / "bin"
    (folder / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    for name, body in {"squeue": 'cat "${0%/*}/jobs"', "sacct": "exit 1", "scancel": 'echo "$*" >>"$0.calls"; : >"${0%/*}/jobs"'}.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)


def begin(run: RunFolder, step: int = 0, committed: int = 0, **attempt: Any) -> None:
    """Let the run have begun: rows up to a step, a commit, and the end of an attempt if one is told."""
    run.config_file.write_bytes((run.path / "launches" / "first" / "run.yaml").read_bytes())
    rows = [{"step": n, "tokens_seen": 256 * n, "loss": 4 - n / 10} for n in range(1, step + 1)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": step, "held_out/loss": 1}]) + '{"st')
    if committed:
        folder = run.checkpoints / commit_name(committed)
        folder.mkdir(parents=True)
        write_manifest(Commit(folder, TrainState(committed, 8 * committed, 256 * committed, 0), {}, {}, {}, 1, 1, 2.5, 1_700_000_000))
    if attempt:
        run.record_attempt({"attempt": 1, "end": "2026-01-01T00:00:00+00:00", "committed": committed, **attempt})


def hold(run: RunFolder, **holder: Any) -> None:
    """A lease; of this process, where nothing else is said."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time(), "attempt": 1}
    run.lease_file.write_text(json.dumps(own | holder))


def row_of(run: RunFolder) -> dict[str, Any]:
    (row,) = json.loads(call("status", run.path, "--json").out)
    return row


def state_of(run: RunFolder) -> tuple[str, str | None]:
    row = row_of(run)
    return row["state"], row["why"]


def test_launched_and_not_begun(run: RunFolder) -> None:
    assert state_of(run) == ("not begun", None)
    slurm_says("7|FAILED|NonZeroExitCode|n1")
    assert state_of(run) == ("not begun", "job 7 ended: FAILED (NonZeroExitCode)")
    slurm_says("7|PENDING|Resources|", "8|PENDING|Dependency|")
    assert state_of(run) == ("queued", "job 7 waits: Resources")
    slurm_says("7|RUNNING|None|n[1-2]", "8|PENDING|Dependency|")
    row = row_of(run)
    assert (row["state"], row["why"]) == ("running", "job 7 is running")
    assert row["jobs"] == [
        {"number": "7", "state": "RUNNING", "reason": "None", "nodes": "n[1-2]", "waits": False},
        {"number": "8", "state": "PENDING", "reason": "Dependency", "nodes": "", "waits": True},
    ]


def test_running(run: RunFolder) -> None:
    begin(run, step=6, committed=4)
    hold(run)
    assert row_of(run) == {
        "run": str(run.path),
        "state": "running",
        "why": None,
        "step": 6,
        "total_steps": TOTAL_STEPS,
        "loss": 3.4,
        "tokens": 1536,
        "committed": 4,
        "attempts": 1,
        "jobs": [],
    }


def test_done_also_while_a_job_of_the_chain_waits(run: RunFolder) -> None:
    begin(run, step=TOTAL_STEPS, committed=TOTAL_STEPS, status=0, cause="done: 10 steps")
    slurm_says("8|PENDING|Dependency|")
    assert state_of(run) == ("done", None)
    slurm_says("8|RUNNING|None|n1")
    assert state_of(run) == ("done", None)


def test_done_where_its_commits_lie_elsewhere(run: RunFolder) -> None:
    begin(run, step=TOTAL_STEPS, status=0, cause="done")
    run.record_attempt({"attempt": 2, "end": "2026", "committed": TOTAL_STEPS, "status": 0, "cause": "done"})
    assert state_of(run) == ("done", None)


@pytest.mark.parametrize(
    ("attempt", "state"),
    [
        ({"status": 75, "cause": "stopped after step 6", "stopped": True}, "stopped"),
        ({"status": 1, "cause": "rank 0 failed"}, "failed"),
        ({"status": 2, "cause": "no room"}, "failed"),
        ({"end": None, "cause": "vanished without a word"}, "vanished"),
    ],
)
def test_how_the_last_attempt_ended(run: RunFolder, attempt: dict[str, Any], state: str) -> None:
    begin(run, step=6, committed=6, **attempt)
    assert state_of(run) == (state, attempt["cause"])
    slurm_says("7|PENDING|BeginTime|")  # put back into the queue
    assert state_of(run) == ("queued", "job 7 waits: BeginTime")


def gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_that_nobody_holds(run: RunFolder) -> None:
    begin(run, step=6)
    hold(run, pid=gone())
    assert state_of(run)[0] == "vanished"
    run.lease_file.write_text("")
    assert state_of(run)[0] == "vanished"
    hold(run, process_started=1.0)  # another process has its number now
    assert state_of(run)[0] == "vanished"


def test_a_lease_of_another_host(run: RunFolder) -> None:
    begin(run, step=6)
    hold(run, host="elsewhere")
    assert state_of(run)[0] == "running"
    os.utime(run.lease_file, (1e9, 1e9))
    assert state_of(run)[0] == "vanished"
    slurm_says("7|RUNNING|None|n1")
    assert state_of(run)[0] == "running"


def test_a_lease_of_a_host_whose_clock_is_wrong(run: RunFolder) -> None:
    begin(run, step=6)
    hold(run, host="elsewhere")
    os.utime(run.lease_file, (1e9, 1e9))
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.05):
            beats += 1
            os.utime(run.lease_file, (1e9 + beats, 1e9 + beats))

    holder = threading.Thread(target=beat)
    holder.start()
    try:
        assert state_of(run)[0] == "running"
    finally:
        ended.set()
        holder.join()


def test_the_table(run: RunFolder) -> None:
    begin(run, step=6, committed=4, status=1, cause="rank 0 failed\x1b[2J")
    head, row = call("status").out.splitlines()
    assert head.split() == ["run", "state", "step", "of", "tokens", "loss", "committed", "attempts", "jobs", "why"]
    assert row.split() == ["mine", "failed", "6", "10", "1,536", "3.4000", "4", "1", "rank", "0", "failed␛[2J"]
    assert call("status", "mine").out == call("status", run.path).out


def test_where_there_is_no_run(run: RunFolder) -> None:
    shutil.rmtree(run.path)
    assert call("status", "--json").out == "[]\n"
    assert "holds no run" in call("status").err
    with pytest.raises(UserError, match="holds no run"):
        call("status", "other")


def end_when_told(run: RunFolder, restarts: int = 0, told: Path | None = None) -> threading.Thread:
    """A supervisor: it removes the file at its start, and ends when it is there again. told: the file, else STOP."""

    def supervise() -> None:
        for remaining in range(restarts, -1, -1):
            while not (told or run.stop_file).exists():
                time.sleep(0.02)
            if remaining:
                run.stop_file.unlink()
        run.record_attempt({"attempt": 1, "end": "2026", "status": 75, "cause": "stopped after step 6", "committed": 6})
        run.lease_file.unlink()

    thread = threading.Thread(target=supervise)
    thread.start()
    return thread


@pytest.mark.parametrize("restarts", [0, 1], ids=["running", "just starting"])
def test_stop_waits_for_the_end(run: RunFolder, restarts: int) -> None:
    begin(run, step=6)
    hold(run)
    supervisor = end_when_told(run, restarts)
    said = call("stop", "mine").err
    supervisor.join(10)
    assert "stopped: stopped after step 6; step 6 of 10 is committed" in said
    assert run.stop_file.exists()


def test_a_run_that_ends_while_it_is_looked_at(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(run, step=6)
    hold(run)
    last_loss = verbs._last_loss

    def end_first(path: Path) -> dict[str, Any]:
        if run.lease_file.exists():
            end_when_told(run).join(10)
        return last_loss(path)

    run.stop_file.touch()
    monkeypatch.setattr(verbs, "_last_loss", end_first)
    rows = [row_of(run) for _ in range(2)]
    assert [(row["state"], row["committed"]) for row in rows] == [("running", 0), ("stopped", 6)], "an end, and what stood before it"


def test_stop_without_waiting(run: RunFolder) -> None:
    begin(run, step=6)
    hold(run)
    call("stop", "mine", "--no-wait")
    assert run.stop_file.exists() and row_of(run)["state"] == "running"


def test_stop_cancels_what_has_not_begun(run: RunFolder) -> None:
    slurm_says("7|PENDING|Priority|", "8|PENDING|Dependency|")
    said = call("stop", "mine").err
    assert "job 7, 8 had not begun and is cancelled" in said and "nothing to stop" not in said
    assert (Path.cwd() / "bin" / "scancel.calls").read_text() == "7 8\n"
    assert not run.stop_file.exists()


def test_stop_of_pods(run: RunFolder) -> None:
    """They are deleted: told by a file alone they would end, and be made again."""
    begin(run, step=6)
    hold(run)
    bin_folder, manifests = Path.cwd() / "bin", run.path / "launches" / "first" / "job.yaml"
    manifests.touch()
    bin_folder.joinpath("kubectl").write_text(f'#!/bin/sh\necho "$*" >"$0.calls"\ntouch {run.stop_file}.pods\necho job deleted\n')
    bin_folder.joinpath("kubectl").chmod(0o755)
    pods = end_when_told(run, told=Path(f"{run.stop_file}.pods"))
    said = call("stop", "mine").err
    pods.join(10)
    assert "job deleted" in said and "stopped: stopped after step 6; step 6 of 10 is committed" in said
    assert bin_folder.joinpath("kubectl.calls").read_text() == f"delete --ignore-not-found --wait=false -f {manifests}\n"
    assert not run.stop_file.exists()


def test_stop_where_nothing_runs(run: RunFolder) -> None:
    begin(run, step=6, committed=6, status=75, cause="stopped after step 6")
    assert "not running (stopped: stopped after step 6). There is nothing to stop." in call("stop", "mine").err
    assert not run.stop_file.exists()
