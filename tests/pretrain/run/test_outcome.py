"""How the ends of all ranks become one exit status."""

import signal
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_DEFECT, EXIT_DONE, EXIT_MISTAKE, EXIT_RESUMABLE
from pretrain.run.outcome import Outcome, Verdict, decide, read_outcomes, write_outcome

DONE, STOPPED = Outcome("done", "all done"), Outcome("stopped", "stopped and saved")
LATE_DEFECT, EARLY_DEFECT = Outcome("defect", "the late one", time=9.0), Outcome("defect", "the early one", time=3.0)
MISTAKE = Outcome("mistake", "the user's", time=50.0)


def test_the_exit_statuses_are_what_launchers_know() -> None:
    assert (EXIT_DONE, EXIT_DEFECT, EXIT_MISTAKE, EXIT_RESUMABLE) == (0, 1, 2, 75)


@pytest.mark.parametrize(
    ("outcomes", "exit_codes", "status", "message"),
    [
        ({0: DONE, 1: DONE}, {}, 0, "all done"),
        ({0: STOPPED, 1: STOPPED}, {}, 75, "stopped and saved"),
        ({0: DONE, 1: STOPPED}, {}, 75, "stopped and saved"),
        ({}, {}, 1, "no rank left a record"),
        # a mistake outweighs everything
        ({0: EARLY_DEFECT, 1: MISTAKE}, {2: -signal.SIGKILL}, 2, "the user's"),
        ({0: Outcome("mistake", "second", time=2.0), 1: Outcome("mistake", "first", time=1.0)}, {}, 2, "first"),
        # killed from outside: resumable, whatever the others made of it
        *(({0: EARLY_DEFECT}, {1: -number}, 75, f"rank 1 was ended by {signal.Signals(number).name}") for number in (1, 2, 9, 10, 12, 15)),
        ({}, {0: -signal.SIGKILL}, 75, "is memory short?"),
        ({0: DONE}, {3: -signal.SIGTERM, 2: -signal.SIGKILL}, 75, "rank 2 was ended by SIGKILL"),
        # the record of a rank counts more than the signal that ended it afterwards
        ({0: DONE, 1: DONE}, {1: -signal.SIGSEGV}, 1, "rank 1 left its record and then failed with exit code -11"),
        ({0: LATE_DEFECT, 1: EARLY_DEFECT}, {0: -signal.SIGTERM}, 1, "rank 1 failed:\nthe early one"),
        # a rank's own crash is a defect
        ({}, {1: -signal.SIGSEGV, 0: -signal.SIGABRT}, 1, "rank 0 was ended by signal 6"),
        ({0: EARLY_DEFECT}, {0: 1, 1: -signal.SIGSEGV}, 1, "rank 1 was ended by signal 11"),
        ({0: DONE}, {1: 1}, 1, "rank 1 ended with exit code 1 and left no record"),
        ({0: LATE_DEFECT, 1: EARLY_DEFECT}, {}, 1, "rank 1 failed:\nthe early one"),
        ({0: STOPPED, 1: LATE_DEFECT}, {}, 1, "rank 1 failed:\nthe late one"),
    ],
)
def test_decide(outcomes: dict[int, Outcome], exit_codes: dict[int, int], status: int, message: str) -> None:
    verdict = decide(outcomes, exit_codes)
    assert verdict.status == status
    assert message in verdict.message
    # Who was asked to stop, is done or made a mistake is not begun again; whom something befell is.
    assert verdict.is_fault == (status == 1 or "was ended by" in message or "memory" in message)


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    ],
)
def test_a_lack_of_memory_would_come_again(error: str) -> None:
    verdict = decide({0: Outcome("defect", f"Traceback (most recent call last):\n{error}")}, {0: 1})
    assert (verdict.status, verdict.is_fault) == (EXIT_DEFECT, False)


def test_a_defect_may_say_itself_that_it_would_come_again() -> None:
    corrupt = Outcome("defect", "weights differ between ranks", comes_again=True)
    assert decide({0: corrupt, 1: corrupt}, {0: 1}) == Verdict(EXIT_DEFECT, "rank 0 failed:\nweights differ between ranks", is_fault=False)


def test_a_rollback_goes_on_with_its_plan_unless_something_worse_happened() -> None:
    planned = Outcome("rollback", "back to step 3", rollback={"to_step": 3})
    assert decide({0: planned, 1: planned}, {}) == Verdict(EXIT_RESUMABLE, "back to step 3", is_fault=True, rollback={"to_step": 3})
    for worse, exit_codes in ((MISTAKE, {}), (LATE_DEFECT, {}), (None, {1: -signal.SIGKILL})):
        outcomes = {0: planned} | ({1: worse} if worse else {})
        assert decide(outcomes, exit_codes).rollback is None


def test_records_come_back_as_they_were_left(tmp_path: Path) -> None:
    written: dict[int, Any] = {0: Outcome("done", "fine", 3, 9), 11: Outcome("defect", "Traceback\n  äöü 東京\n", 3, 0)}
    for rank, outcome in written.items():
        write_outcome(tmp_path, rank, outcome)
    read = read_outcomes(tmp_path)
    assert read.keys() == written.keys()
    for rank, outcome in read.items():
        assert outcome.time > 1.7e9, "the time of the record is its own"
        assert Outcome(outcome.kind, outcome.message, outcome.first_step, outcome.last_step) == written[rank]
    assert read_outcomes(tmp_path / "nowhere") == {}


def test_a_record_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-4711-canary")
    write_outcome(tmp_path, 0, Outcome("defect", "Traceback: the server refused canary-4711-canary"))
    assert read_outcomes(tmp_path)[0].message == "Traceback: the server refused [WANDB_API_KEY]"
    assert "canary" not in (tmp_path / "rank_00000.json").read_text()
