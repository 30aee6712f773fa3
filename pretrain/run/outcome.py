"""How a rank ended, in a form that survives the launcher.

Torch's elastic agent turns every exit status but 0 into 1, so a rank writes a record before it ends and the
supervisor maps the records of all ranks to the command's exit status.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from configs.durable import write_file

EXIT_DONE, EXIT_DEFECT, EXIT_MISTAKE, EXIT_RESUMABLE = 0, 1, 2, 75

OUTCOME_FOLDER_VARIABLE = "PRETRAIN_OUTCOME_FOLDER"
"""Environment variable: where ranks leave their records."""


@dataclass(frozen=True)
class Outcome:
    """done: trained to the end. stopped: asked to stop, saved. mistake: the user's. defect: ours."""

    kind: Literal["done", "stopped", "mistake", "defect"]
    message: str
    first_step: int | None = None
    last_step: int | None = None
    time: float = 0.0


def announce_ready(folder: Path) -> None:
    """Say that this process handles stop signals from now on; before, one would just end it."""
    (folder / f"{os.getpid()}.ready").touch()


def is_ready(folder: Path, pid: int) -> bool:
    """Whether a process has said that it handles stop signals."""
    return (folder / f"{pid}.ready").exists()


def write_outcome(folder: Path, rank: int, outcome: Outcome) -> None:
    """Leave this rank's record."""
    write_file(folder / f"rank_{rank:05d}.json", json.dumps(asdict(outcome) | {"time": time.time()}).encode())


def read_outcomes(folder: Path) -> dict[int, Outcome]:
    """Rank -> record, of the ranks that left one."""
    return {int(path.stem.removeprefix("rank_")): Outcome(**json.loads(path.read_text())) for path in sorted(folder.glob("rank_*.json"))}


def decide(outcomes: dict[int, Outcome], exit_codes: dict[int, int]) -> tuple[int, str]:
    """Exit status and one message for a whole attempt.

    exit_codes: rank -> exit code, of the ranks that failed first (negative: the signal that ended it). A mistake
    outweighs everything: the other ranks only noticed that one was gone. Then what ended a rank without a word
    (a signal from outside can be resumed, a crash is a defect), then the earliest defect that a rank wrote down.
    """
    by_kind = {
        kind: [(o.time, rank, o) for rank, o in outcomes.items() if o.kind == kind] for kind in ("mistake", "defect", "stopped", "done")
    }
    if by_kind["mistake"]:
        return EXIT_MISTAKE, min(by_kind["mistake"], key=lambda row: row[:2])[2].message
    wordless = {rank: code for rank, code in exit_codes.items() if rank not in outcomes}
    outside = {rank: -code for rank, code in wordless.items() if -code in _FROM_OUTSIDE}
    if outside:
        rank, number = min(outside.items())
        cause = f"rank {rank} was ended by {_FROM_OUTSIDE[number]}" + (" (is memory short?)" if number == 9 else "")
        return EXIT_RESUMABLE, f"{cause}; the run can be resumed."
    if wordless:
        rank, code = min(wordless.items())
        return (
            EXIT_DEFECT,
            f"rank {rank} was ended by signal {-code}." if code < 0 else f"rank {rank} ended with exit code {code} and left no record.",
        )
    if by_kind["defect"]:
        _, rank, first = min(by_kind["defect"], key=lambda row: row[:2])
        return EXIT_DEFECT, f"rank {rank} failed:\n{first.message}"
    if exit_codes:
        rank, code = min(exit_codes.items())
        return EXIT_DEFECT, f"rank {rank} left its record and then failed with exit code {code}."
    if by_kind["stopped"]:
        return EXIT_RESUMABLE, by_kind["stopped"][0][2].message
    if by_kind["done"]:
        return EXIT_DONE, by_kind["done"][0][2].message
    return EXIT_DEFECT, "no rank left a record of how it ended."


_FROM_OUTSIDE = {1: "SIGHUP", 2: "SIGINT", 9: "SIGKILL", 15: "SIGTERM"}
