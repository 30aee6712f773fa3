"""A stop signal sets a flag, and does nothing else."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pretrain.run.signals import STOP_SIGNALS, StopRequest, end_with_parent


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_these_are_the_signals() -> None:
    assert set(STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP}


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


def test_nobody_asked() -> None:
    assert StopRequest().asked is False
    usr1 = signal.getsignal(signal.SIGUSR1)
    StopRequest()
    assert signal.getsignal(signal.SIGUSR1) is usr1, "only the stop signals are taken"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own link between a process and its parent")
def test_a_rank_ends_with_its_parent() -> None:
    """Parent -> rank; the parent is killed, and the rank is gone too."""
    from_rank, to_test = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:  # a child of the test never goes on with the test
            if os.fork() == 0:
                end_with_parent()
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
