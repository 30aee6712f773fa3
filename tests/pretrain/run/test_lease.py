"""One attempt works in a run folder at a time."""

import json
import os
import signal
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
from pretrain.run import lease as module
from pretrain.run.folder import RunFolder
from pretrain.run.lease import Lease, holds_lease

ROOT = Path(__file__).parents[3]
IMPORT_LEASE = "from pretrain.run.lease import Lease, holds_lease"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    path = tmp_path / "mine"
    path.mkdir()
    return RunFolder(path)


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process of its own that has `Lease` and `RunFolder` at hand."""
    code = f"import os, signal, sys, time\nfrom pathlib import Path\nfrom pretrain.run.folder import RunFolder\n{IMPORT_LEASE}\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def leave_lease(run: RunFolder, **changes: Any) -> dict[str, Any]:
    """A lease as a living attempt of this process would have it, with changes."""
    holder = {
        "attempt": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "started": "2026-01-01T00:00:00+00:00",
    } | changes
    run.lease_file.write_text(json.dumps(holder))
    return holder


def test_a_lease_says_who_holds_it_and_goes_at_the_end(run: RunFolder) -> None:
    with Lease(run) as lease:
        content = json.loads(run.lease_file.read_text())
        assert (content["attempt"], content["pid"], content["host"]) == (1, os.getpid(), socket.gethostname())
        assert lease.attempt == 1
        assert holds_lease(run, 1)
        assert not holds_lease(run, 2)
    assert not run.lease_file.exists()
    assert not holds_lease(run, 1)
    assert run.attempts() == []


def test_a_lease_goes_also_after_an_error(run: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="told to"), Lease(run):
        raise RuntimeError("told to")
    assert list(run.path.iterdir()) == []


def test_a_second_process_is_refused_and_changes_nothing(run: RunFolder) -> None:
    run.record_attempt({"attempt": 1})
    with Lease(run) as lease:
        before = run.lease_file.read_bytes()
        second = python(
            "try:\n    Lease(RunFolder(Path(sys.argv[1]))).__enter__()\nexcept Exception as e: print(type(e).__name__, e)", str(run.path)
        )
        said, _ = second.communicate(timeout=60)
        assert said.startswith("UserError")
        for word in (f"process {os.getpid()} ", f"on {socket.gethostname()} ", "attempt 2", lease.started, "run.name="):
            assert word in said
        assert run.lease_file.read_bytes() == before
        assert holds_lease(run, 2)


def test_the_lease_of_a_killed_process_is_taken_over_and_recorded(run: RunFolder) -> None:
    killed = python("lease = Lease(RunFolder(Path(sys.argv[1]))); lease.__enter__(); os.kill(os.getpid(), signal.SIGKILL)", str(run.path))
    assert killed.wait(60) == -signal.SIGKILL
    assert json.loads(run.lease_file.read_text())["pid"] == killed.pid
    with Lease(run) as lease:
        assert lease.attempt == 2
        (row,) = run.attempts()
        assert (row["attempt"], row["pid"], row["end"], row["cause"]) == (1, killed.pid, None, "vanished without a word")
    assert [path.name for path in run.path.iterdir()] == ["attempts.jsonl"]


def test_a_zombie_holds_nothing(run: RunFolder) -> None:
    process = python("")
    started = psutil.Process(process.pid).create_time()
    deadline = time.monotonic() + 60
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    leave_lease(run, pid=process.pid, process_started=started)
    with Lease(run) as lease:
        assert lease.attempt == 2
    process.communicate()


def test_another_process_of_the_same_number_is_not_the_holder(run: RunFolder) -> None:
    leave_lease(run, process_started=psutil.Process().create_time() - 100)
    with Lease(run) as lease:
        assert lease.attempt == 2
    leave_lease(run, attempt=2, process_started=psutil.Process().create_time())
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Lease(run).__enter__()


@pytest.mark.parametrize("content", ["", '{"attempt": 1, "ho', "[]", '{"attempt": 1}'])
def test_a_half_written_lease_is_taken_over(run: RunFolder, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(module, "HALF_WRITTEN_SECONDS", 0.05)
    run.lease_file.write_text(content)
    with Lease(run) as lease:
        assert lease.attempt == 2
        assert run.attempts()[0]["cause"] == "vanished without a word"


def test_a_lease_that_is_just_being_written_is_respected(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALF_WRITTEN_SECONDS", 0.5)
    run.lease_file.touch()
    writer = threading.Timer(0.1, leave_lease, (run,))
    writer.start()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Lease(run).__enter__()
    writer.join()
    assert run.attempts() == []


def test_a_foreign_host_that_beats_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABANDONED_AFTER_SECONDS", 10)
    holder = leave_lease(run, host="another-host", pid=7)
    os.utime(run.lease_file, (0, 0))  # its clock may say anything
    beat = threading.Timer(0.3, os.utime, (run.lease_file, (1, 1)))
    beat.start()
    began = time.monotonic()
    with pytest.raises(UserError, match="in use by process 7 on another-host"):
        Lease(run).__enter__()
    assert time.monotonic() - began < 5, "a beat is noticed before the time is over"
    beat.join()
    assert json.loads(run.lease_file.read_text()) == holder


def test_a_foreign_host_that_does_not_beat_is_taken_over(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABANDONED_AFTER_SECONDS", 1.2)
    leave_lease(run, host="another-host", pid=os.getpid())
    far_ahead = time.time() + 10**6
    os.utime(run.lease_file, (far_ahead, far_ahead))
    began = time.monotonic()
    with Lease(run) as lease:
        assert time.monotonic() - began >= 1.2
        assert lease.attempt == 2
        assert not holds_lease(run, 1), "the stalled attempt must not commit when it wakes up"
        assert run.attempts()[0]["host"] == "another-host"


def test_beats_while_it_lives_but_never_on_anothers_lease(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    with Lease(run):
        os.utime(run.lease_file, (0, 0))
        deadline = time.monotonic() + 20
        while run.lease_file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.lease_file.stat().st_mtime > 0
        leave_lease(run, attempt=2, host="another-host")
        time.sleep(0.1)  # a beat that was under way
        os.utime(run.lease_file, (0, 0))
        time.sleep(0.2)
        assert run.lease_file.stat().st_mtime == 0
    assert json.loads(run.lease_file.read_text())["attempt"] == 2, "another attempt's lease was removed"


def test_a_stumbling_file_system_does_not_end_the_heartbeat(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    real, calls = os.utime, []

    def stumble(*arguments: Any, **keywords: Any) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("stale file handle")
        real(*arguments, **keywords)

    with Lease(run):
        monkeypatch.setattr(module.os, "utime", stumble)
        deadline = time.monotonic() + 20
        while len(calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(calls) >= 5


RACE = """
from configs.errors import UserError
from pretrain.run import lease as module
from pretrain.run.lease import Lease
module.HALF_WRITTEN_SECONDS = 0.05
run = RunFolder(Path(sys.argv[1]))
for line in sys.stdin:
    ready, go = os.pipe(), os.pipe()
    children = []
    for _ in range(6):
        if (pid := os.fork()) == 0:
            os.close(go[1])
            os.write(ready[1], b"x")
            os.read(go[0], 1)  # all begin when the parent closes its end
            lease = Lease(run)
            try:
                lease.__enter__()
            except UserError:
                os._exit(0)
            time.sleep(0.4)  # the others have looked long before
            os._exit(lease.attempt if holds_lease(run, lease.attempt) else 100)
        children.append(pid)
    for _ in children:
        os.read(ready[0], 1)
    for end in go:
        os.close(end)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children), flush=True)
"""


def test_of_many_that_take_over_at_once_one_gets_it(run: RunFolder) -> None:
    """Six processes find the same dead lease; the winner is killed, so that each round begins with a dead lease."""
    racers = python(RACE, str(run.path))
    assert racers.stdin is not None
    assert racers.stdout is not None
    leave_lease(run, process_started=1.0)
    winners = []
    for _ in range(8):
        racers.stdin.write("go\n")
        racers.stdin.flush()
        codes = [int(code) for code in racers.stdout.readline().split()]
        assert len(codes) == 6
        held = [code for code in codes if code]
        assert len(held) == 1, f"attempts that believe that they hold the folder: {codes}"
        winners += held
    racers.communicate(timeout=60)
    assert 100 not in winners
    assert winners == sorted(set(winners)), "a number was given twice"
