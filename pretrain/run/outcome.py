"""How a rank ended, in a form that survives the launcher.

Torch's elastic agent turns every exit status but 0 into 1, so a rank writes a record before it ends and the
supervisor maps the records of all ranks to the command's exit status.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from configs.durable import write_file
from configs.errors import EXIT_DEFECT, EXIT_DONE, EXIT_MISTAKE, EXIT_RESUMABLE
from configs.redaction import redact

OUTCOME_FOLDER_VARIABLE = "PRETRAIN_OUTCOME_FOLDER"
"""Environment variable: where ranks leave their records."""


@dataclass(frozen=True)
class Outcome:
    """done: trained to the end. stopped: asked to, saved. rollback: to go on from an older commit. mistake: the user's. defect: ours."""

    kind: Literal["done", "stopped", "rollback", "mistake", "defect"]
    message: str
    first_step: int | None = None
    last_step: int | None = None
    time: float = 0.0
    rollback: dict[str, Any] | None = None
    """What a rollback is to change (see `rollback.py`)."""
    comes_again: bool = False
    """Of a defect: whether another attempt is not to be made."""


def announce_ready(folder: Path) -> None:
    """Say that this process handles stop signals from now on; before, one would just end it."""
    (folder / f"{os.getpid()}.ready").touch()


def is_ready(folder: Path, pid: int) -> bool:
    """Whether a process has said that it handles stop signals."""
    return (folder / f"{pid}.ready").exists()


def write_outcome(folder: Path, rank: int, outcome: Outcome) -> None:
    """Leave this rank's record; a message may hold an exception's text, and that a secret."""
    record = asdict(outcome) | {"time": time.time(), "message": redact(outcome.message)}
    write_file(folder / f"rank_{rank:05d}.json", json.dumps(record).encode())


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """Rank -> record, of the ranks that left one."""
    return {int(path.stem.removeprefix("rank_")): Outcome(**json.loads(path.read_text())) for path in sorted(folder.glob("rank_*.json"))}


class Verdict(NamedTuple):
    """What is to be made of an attempt."""

    status: int
    """The command's exit status, if it ends with this attempt."""
    message: str
    is_fault: bool
    """Whether another attempt may fare better: something failed, and not for a reason that would come again."""
    rollback: dict[str, Any] | None = None
    """What is to be changed before the next attempt, which is no other try but part of the plan."""


OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|DefaultCPUAllocator: can't allocate", re.IGNORECASE)


def decide(outcomes: dict[int, Outcome], exit_codes: dict[int, int], name: Callable[[int], str] = "rank {}".format) -> Verdict:
    """Exit status and one message for a whole attempt.

    exit_codes: rank -> exit code, of the ranks that failed first (negative: the signal that ended it). name: what a rank is called.
    A mistake outweighs everything: the other ranks only noticed that one was gone. Then what ended a rank without a word
    (a signal from outside can be resumed, a crash is a defect), then the earliest defect that a rank wrote down.
    """
    by_kind = {
        kind: [(o.time, rank, o) for rank, o in outcomes.items() if o.kind == kind]
        for kind in ("mistake", "defect", "rollback", "stopped", "done")
    }
    if by_kind["mistake"]:
        return Verdict(EXIT_MISTAKE, min(by_kind["mistake"], key=lambda row: row[:2])[2].message, is_fault=False)
    wordless = {rank: code for rank, code in exit_codes.items() if rank not in outcomes}
    outside = {rank: -code for rank, code in wordless.items() if -code in _FROM_OUTSIDE}
    if outside:
        rank, number = min(outside.items())
        cause = f"{name(rank)} was ended by {_FROM_OUTSIDE[number]}" + (" (is memory short?)" if number == 9 else "")
        return Verdict(EXIT_RESUMABLE, f"{cause}; the run can be resumed.", is_fault=True)
    if wordless:
        rank, code = min(wordless.items())
        ended = f"was ended by signal {-code}." if code < 0 else f"ended with exit code {code} and left no record."
        return Verdict(EXIT_DEFECT, f"{name(rank)} {ended}", is_fault=True)
    if by_kind["defect"]:
        _, rank, first = min(by_kind["defect"], key=lambda row: row[:2])
        comes_again = first.comes_again or bool(OUT_OF_MEMORY.search(first.message))
        return Verdict(EXIT_DEFECT, f"{name(rank)} failed:\n{first.message}", is_fault=not comes_again)
    if exit_codes:
        rank, code = min(exit_codes.items())
        return Verdict(EXIT_DEFECT, f"{name(rank)} left its record and then failed with exit code {code}.", is_fault=True)
    if by_kind["rollback"]:
        planned = by_kind["rollback"][0][2]
        return Verdict(EXIT_RESUMABLE, planned.message, is_fault=True, rollback=planned.rollback)
    if by_kind["stopped"]:
        return Verdict(EXIT_RESUMABLE, by_kind["stopped"][0][2].message, is_fault=False)
    if by_kind["done"]:
        return Verdict(EXIT_DONE, by_kind["done"][0][2].message, is_fault=False)
    return Verdict(EXIT_DEFECT, "no rank left a record of how it ended.", is_fault=True)


_FROM_OUTSIDE = {1: "SIGHUP", 2: "SIGINT", 9: "SIGKILL", 10: "SIGUSR1", 12: "SIGUSR2", 15: "SIGTERM"}
