"""A stop signal sets a flag, and does nothing else."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.run.signals import STOP_SIGNALS, StopRequest, end_with_parent


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_these_are_the_signals() -> None:
    assert set(STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    stop = StopRequest()
    assert stop.asked is False
    threads, work = threading.active_count(), 0
    for _ in range(3):  # Ctrl-C again and again: no exception anywhere, the work goes on
        os.kill(os.getpid(), number)
        work += sum(range(10_000))
    assert stop.asked is True
    assert work == 3 * sum(range(10_000))
    assert threading.active_count() == threads


def test_a_file_asks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for once a second, and once it was there the answer stays."""
    now, file = 100.0, tmp_path / "STOP"
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop, other = StopRequest(file), StopRequest()
    assert not stop.asked
    file.touch()
    now = 100.9
    assert not stop.asked
    now = 101.0
    assert stop.asked
    file.unlink()
    assert stop.asked
    assert not other.asked


def test_nobody_asked() -> None:
    assert StopRequest().asked is False
    winch = signal.getsignal(signal.SIGWINCH)
    StopRequest()
    assert signal.getsignal(signal.SIGWINCH) is winch, "only the stop signals are taken"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own link between a process and its parent")
def test_a_rank_ends_with_its_parent() -> None:
    """Parent -> rank; the parent is killed, and the rank is gone too."""
    from_rank, to_test = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:  # a child of the test never goes on with the test
            if os.fork() == 0:
                end_with_parent(os.getppid())
                os.write(to_test, b"ready")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(to_test)
    assert os.read(from_rank, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    began = time.monotonic()
    assert os.read(from_rank, 1) == b"", "the pipe closes when the last process that holds it is gone"
    assert time.monotonic() - began < 30
    os.close(from_rank)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own link between a process and its parent")
def test_a_rank_whose_parent_ended_before_it_asked_ends_at_once() -> None:
    """As one does whose supervisor is killed while it imports: a campaign found two that waited for half an hour."""
    started = os.fork()
    if started == 0:
        try:
            end_with_parent(1 if os.getppid() != 1 else 2)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(started, 0)[1]) == -signal.SIGKILL
