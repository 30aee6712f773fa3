"""`pretrain status` and `pretrain stop`: one word for each way in which a run stands, also where Slurm has a part in it."""

import json
import os
import re
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
from pretrain.verbs import standing
from pretrain.verbs import status as verbs
from tests.pretrain.verbs import call
from tests.pretrain.watch.terminal import open_terminal

TOTAL_STEPS = 10


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was launched once and has not begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(verbs, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(standing, "BEAT_SECONDS", 0.3)
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
    row = row_of(run)
    assert time.time() - row.pop("committed_seconds_ago") == pytest.approx(1_700_000_000, abs=60)
    assert row == {
        "run": str(run.path),
        "state": "running",
        "phase": None,
        "why": None,
        "stalled_seconds": None,
        "step": 6,
        "total_steps": TOTAL_STEPS,
        "tokens": 1536,
        "total_tokens": 2560,
        "loss": 3.4,
        "tokens_per_second": None,
        "seconds_left": None,
        "committed": 4,
        "attempts": 1,
        "goodput": None,
        "jobs": [],
    }


def log(run: RunFolder, *rows: dict[str, Any]) -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))


def in_phase(run: RunFolder, phase: str, silent_seconds: float = 0.0, attempt: int = 1, step: int = 7) -> None:
    """Let the newest row of the timeline be so old, by the clock of the file system."""
    path, now = run.path / "timeline.jsonl", time.time()
    rows = [{"attempt": attempt, "time": now - 500, "phase": "start", "step": 0, "waited": 0.0}]
    rows += [{"attempt": attempt, "time": now - silent_seconds, "phase": phase, "step": step, "waited": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"attempt": 1, "ti')
    os.utime(path, (now - silent_seconds, now - silent_seconds))


def test_how_fast_and_how_long(run: RunFolder) -> None:
    """Of the last attempt, as the median: a hiccup does not count."""
    begin(run, step=4)
    hold(run)
    rates = [(1, 9e9), (2, 100.0), (2, 1.0), (2, 100.0)]
    log(run, *({"step": 5, "tokens_seen": 1280, "attempt": attempt, "tokens_per_second": rate} for attempt, rate in rates))
    row = row_of(run)
    assert (row["tokens_per_second"], row["seconds_left"]) == (100.0, 12.8)
    run.lease_file.unlink()
    run.record_attempt({"attempt": 1, "end": "2026", "status": 1, "cause": "rank 0 failed"})
    assert row_of(run)["seconds_left"] is None


@pytest.mark.parametrize(
    ("phase", "state", "why"),
    [
        ("start", "running", "is starting"),
        ("first_step", "running", "is in its first step"),
        ("step", "running", None),
        ("evaluate", "evaluating", None),
        ("score", "evaluating", None),
        ("save", "saving", None),
        ("end", "running", "is ending"),
    ],
)
def test_what_it_does(run: RunFolder, phase: str, state: str, why: str | None) -> None:
    begin(run, step=6, committed=4)
    hold(run)
    in_phase(run, phase)
    row = row_of(run)
    assert (row["state"], row["phase"], row["why"], row["step"], row["attempts"]) == (state, phase, why, 7, 1)


@pytest.mark.parametrize(
    ("phase", "silent_seconds", "step_seconds", "is_stalled"),
    [
        ("step", 50, 0.1, False),
        ("step", 70, 0.1, True),
        ("step", 70, 30, False),
        ("step", 100, 30, True),
        ("evaluate", 70, 0.1, True),
        ("save", 600, 0.1, False),
        ("save", 2000, 0.1, True),
        ("first_step", 600, 0.1, False),
        ("end", 130, 0.1, True),
    ],
)
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_stalled(run: RunFolder, phase: str, silent_seconds: float, step_seconds: float, is_stalled: bool, host: str) -> None:
    begin(run, step=6, committed=4)
    log(run, {"step": 6, "tokens_seen": 1536, "attempt": 1, "step_seconds": step_seconds})
    hold(run, **({"host": host} if host == "elsewhere" else {}))
    in_phase(run, phase, silent_seconds)
    row = row_of(run)
    assert (row["state"] == "stalled") == is_stalled
    assert (row["stalled_seconds"] == pytest.approx(silent_seconds, abs=5)) if is_stalled else row["stalled_seconds"] is None
    if is_stalled:
        since = time.mktime(time.strptime(" ".join(row["why"].split()[2:4]), "%Y-%m-%d %H:%M:%S,"))
        assert since == pytest.approx(time.time() - silent_seconds, abs=5) and phase in row["why"]


def test_a_host_whose_clock_is_wrong_is_not_stalled(run: RunFolder) -> None:
    """What it touches and what it writes is as wrong."""
    begin(run, step=6)
    hold(run, host="elsewhere")
    slurm_says("7|RUNNING|None|n1")
    for silent, state in ((5, "running"), (300, "stalled")):
        in_phase(run, "step", 7200 + silent)
        os.utime(run.lease_file, (time.time() - 7200, time.time() - 7200))
        assert state_of(run)[0] == state


def test_a_timeline_of_the_attempt_before_says_nothing(run: RunFolder) -> None:
    begin(run, step=6, status=1, cause="rank 0 failed")
    hold(run, attempt=2)
    in_phase(run, "save", 5000, attempt=1)
    assert state_of(run) == ("running", "is starting")


def test_preempted_is_not_stopped(run: RunFolder) -> None:
    """Slurm says which it was."""
    begin(run, step=6, committed=6, status=75, cause="stopped and saved.", stopped=True)
    assert state_of(run) == ("stopped", "stopped and saved.")
    slurm_says("7|PREEMPTED|None|n1")
    assert state_of(run) == ("preempted", "stopped and saved. job 7 ended: PREEMPTED (None)")
    slurm_says("7|PREEMPTED|None|n1", "8|CANCELLED|None|")
    assert state_of(run)[0] == "stopped", "somebody wanted no more of it"


def test_goodput(run: RunFolder) -> None:
    begin(run, step=6, status=0, cause="stopped", started="2026-01-01T00:00:00+00:00")
    began, row = 1767225600.0, {"attempt": 1, "step": 0, "waited": 0.0}
    run.attempts_file.write_text(run.attempts_file.read_text().replace('T00:00:00+00:00", "committed', 'T00:01:40+00:00", "committed'))
    rows = [row | {"time": began + 20, "phase": "step"}, row | {"time": began + 95, "phase": "end", "step": 6}]
    (run.path / "timeline.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert row_of(run)["goodput"] == pytest.approx(0.75)
    (run.path / "timeline.jsonl").write_text('{"attempt": 1}\n' * 2)
    assert row_of(run)["goodput"] is None, "rows that somebody else wrote"


def test_one_run_that_cannot_be_read_hides_no_other(run: RunFolder) -> None:
    begin(run, step=6, committed=6, status=75, cause="stopped")
    other = run.path.parent / "other"
    other.mkdir()
    (other / "run.yaml").write_text("no: such key\n")
    rows = json.loads(call("status", "--json").out)
    assert [(Path(row["run"]).name, row["state"]) for row in rows] == [("mine", "stopped"), ("other", "unreadable")]
    assert "no" in rows[1]["why"] and set(rows[0]) == set(rows[1])
    assert "unreadable" in call("status").out
    with pytest.raises(UserError):
        call("status", "other")


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
    assert head.split() == ["run", "state", "step", "tokens", "loss", "commit", "tries", "why"]
    assert re.fullmatch(r"mine  failed     6  1.54k/2.56k  3.400  4 \(\d+ d\)      1  rank 0 failed␛\[2J", row)
    assert call("status", "mine").out == call("status", run.path).out


USUAL = {
    "run": "runs/phrase-book",
    "state": "evaluating",
    "step": 41_000,
    "total_steps": 100_000,
    "tokens": 12_345_678_901,
    "total_tokens": 30_000_000_000,
    "loss": 3.4124,
    "tokens_per_second": 123_456.7,
    "seconds_left": 143_000,
    "committed": 40_000,
    "committed_seconds_ago": 1234,
    "attempts": 3,
    "goodput": 0.974,
    **dict.fromkeys(("phase", "why", "stalled_seconds")),
    "jobs": [],
}


def test_the_table_fits_a_hundred_columns() -> None:
    why = "rank 3 on node-17 ended by signal SIGKILL: " + "out of memory " * 8 + "again"
    failed = USUAL | {"state": "failed", "why": why, "seconds_left": None}
    head, row = (line.plain for line in verbs.tabulate([USUAL], 100))
    assert row == "phrase-book  evaluating  41,000  12.3B/30.0B  3.412   123k  1.7 d  40,000 (21 min)      3     97 %"
    assert head.split() == [*verbs.COLUMNS[:-1]] and max(len(head), len(row)) <= 100
    lines = [line.plain for line in verbs.tabulate([USUAL, failed], 100)]
    assert max(map(len, lines[:3])) <= 100 and lines[3] == f"phrase-book: {failed['why']}", "there is no room beside the others"
    assert [line.plain for line in verbs.tabulate([USUAL, failed])][2].endswith(failed["why"])
    for width in range(1, 160):
        rows = verbs.tabulate([USUAL, failed], width)
        assert max(line.cell_len for line in rows[:3]) <= width
    (_, alone) = verbs.tabulate([failed | {"why": "no room", "goodput": None}], 100)
    assert alone.plain.endswith("3  no room") and len(alone.plain) <= 100
    assert verbs.tabulate([USUAL | {"state": "stalled", "stalled_seconds": 720}], 100)[1].plain.split()[1:4] == ["stalled", "12", "min"]


def test_fifty_runs_are_looked_at_together(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm is asked once, and leases of hosts that are gone are waited for side by side, and once only while runs are watched."""
    begin(run, step=6, committed=6)
    hold(run, host="elsewhere")
    os.utime(run.lease_file, (1e9, 1e9))
    for number in range(49):
        shutil.copytree(run.path, run.path.parent / f"run-{number:02}", copy_function=shutil.copy2)
    slurm_says()
    asked, waited = list[object](), list[str]()
    monkeypatch.setattr(standing.queue, "_run", lambda command: asked.append(command) or "")
    monkeypatch.setattr(standing, "say", waited.append)
    monkeypatch.setattr(standing, "BEAT_SECONDS", 0.05)
    folders, memory = verbs.find_all(Path("runs")), standing.Memory()
    for _ in range(2):
        rows = standing.describe_all(folders, memory=memory)
        assert [row["state"] for row in rows] == ["vanished"] * 50
    assert len(asked) == 2 * 2, "squeue, and sacct for what it has forgotten"
    assert len(waited) == 50


def test_only_the_end_of_a_long_file_is_read(run: RunFolder) -> None:
    begin(run, step=6)
    path = run.path / "metrics.jsonl"
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a hole of a terabyte
    with path.open("a") as file:
        file.write("\n" + json.dumps({"step": 9, "tokens_seen": 2304, "loss": 1.5}) + "\n")
    row = row_of(run)
    assert (row["step"], row["tokens"], row["loss"]) == (9, 2304, 1.5)


def test_watching_in_a_terminal(run: RunFolder) -> None:
    begin(run, step=6, committed=4)
    with open_terminal("-m", "pretrain.cli", "status", "--watch", folder=run.path.parent.parent, all_streams=True) as seen:
        assert "mine" in seen.wait_for("q ends this")
        log(run, {"step": 9, "tokens_seen": 2304, "loss": 1.5})
        seen.wait_for("2.30k/2.56k")
        seen.press("q")
        seen.wait_for_the_end()
    assert seen.raw.count("\x1b[?1049h") == seen.raw.count("\x1b[?1049l") == 1, "the screen that was there is there again"
    assert seen.raw.rfind("\x1b[?25l") < seen.raw.rfind("\x1b[?25h"), "the cursor is shown"


@pytest.mark.parametrize("is_told", [True, False])
def test_watching_ends_with_its_terminal(run: RunFolder, is_told: bool) -> None:
    """Also where no signal says that it is closed: a watch that nobody sees would go on for ever."""
    begin(run, step=6, committed=4)
    ignore = "" if is_told else "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    watch = ("-c", f"{ignore}from pretrain.cli import main; main()", "status", "--watch")
    with open_terminal(*watch, folder=run.path.parent.parent, all_streams=True) as seen:
        seen.wait_for("q ends this")
        seen.close()
        seen.program.wait(60)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Ctrl-C behind the second look; what was waited between looks."""
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(verbs.time, "sleep", wait)
    return looks


def test_watching_where_there_is_no_terminal(run: RunFolder, looks: list[float]) -> None:
    begin(run, step=6, committed=4)
    done = call("status", "--watch")
    assert done.status == 0 and looks == [2.0, 2.0] and done.out.count("1.54k/2.56k") == 2


def test_watching_as_lines_of_json(run: RunFolder, looks: list[float]) -> None:
    begin(run, step=6, committed=4)
    shutil.copytree(run.path, run.path.parent / "other")
    done = call("status", "--watch", "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert done.status == 0 and [Path(row["run"]).name for row in rows] == ["mine", "other"] * 2
    assert all(row["step"] == 6 and abs(row["time"] - time.time()) < 600 for row in rows)


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
    read_tail = standing.read_tail

    def end_first(path: Path) -> list[dict[str, Any]]:
        if run.lease_file.exists():
            end_when_told(run).join(10)
        return read_tail(path)

    run.stop_file.touch()
    monkeypatch.setattr(standing, "read_tail", end_first)
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
