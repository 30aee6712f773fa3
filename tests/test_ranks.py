"""`run_on_ranks` itself: it joins ranks, tells what failed, and leaves no process behind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunOnRanks = Callable[..., list[Any]]


def test_ranks_are_joined(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks("tests.ranks:add_ranks", 2, {"offset": 10}) == [
        {"sum": 21, "rank": 0, "local_rank": 0},
        {"sum": 21, "rank": 1, "local_rank": 1},
    ]


def test_a_crashing_rank_is_named_and_nothing_stays(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 ended with exit code 1") as failure:
        run_on_ranks("tests.ranks:crash_on", 2, {"rank": 1, "pid_folder": str(tmp_path)})
    assert "this rank was told to crash" in str(failure.value)
    assert_all_gone(tmp_path, 4)


def test_a_rank_that_hangs_is_stopped(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] were still running after 15 s"):
        run_on_ranks("tests.ranks:sleep_forever", 2, {"pid_folder": str(tmp_path)}, 15)
    assert_all_gone(tmp_path, 2)


def assert_all_gone(folder: Path, expected: int) -> None:
    pids = [int(pid) for file in folder.glob("*.pids") for pid in file.read_text().split()]
    assert len(pids) == expected
    deadline = time.monotonic() + 5  # a killed process needs a moment to be gone
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that waits for init."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return status not in "ZX"
