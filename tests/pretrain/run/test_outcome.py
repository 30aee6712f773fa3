"""How the ends of all ranks become one exit status."""

import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.outcome import EXIT_DEFECT, EXIT_DONE, EXIT_MISTAKE, EXIT_RESUMABLE, Outcome, decide, read_outcomes, write_outcome

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
        *(({0: EARLY_DEFECT}, {1: -number}, 75, f"rank 1 was ended by {signal.Signals(number).name}") for number in (1, 2, 9, 15)),
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
    found, said = decide(outcomes, exit_codes)
    assert found == status
    assert message in said


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
