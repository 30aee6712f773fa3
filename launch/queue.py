"""Slurm's queue, as the command asks it: what became of the jobs of a launch, and their end.

In: the numbers of jobs, which each launch leaves in `jobs.json`. Out: what squeue says of them, or, of those it has forgotten, what sacct
says; nothing where there is no Slurm. It never raises: a queue that does not answer must not hide what the run folder says.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from configs.durable import write_file

ASK_SECONDS = 60
"""Slurm's own commands give up later, on a controller that is not there."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "SUSPENDED"}
ACTIVE = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED"}


class Job(NamedTuple):
    """A job as Slurm has it."""

    number: str
    state: str
    """A word of Slurm: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ..."""
    reason: str
    """Why it waits, in Slurm's words; of one that has ended, its exit status where that is known."""
    nodes: str

    @property
    def is_waiting(self) -> bool:
        """Whether it is still to begin."""
        return self.state in WAITING

    @property
    def is_active(self) -> bool:
        """Whether it has nodes."""
        return self.state in ACTIVE


def write_jobs(path: PurePath, numbers: Sequence[str]) -> None:
    """Leave the numbers of a launch's jobs, the first one first."""
    write_file(Path(path), (json.dumps({"kind": "slurm", "jobs": list(numbers)}) + "\n").encode())


def read_jobs(path: Path) -> list[str]:
    """The numbers that a launch left; none where it left none."""
    try:
        content = json.loads(path.read_text())
        return [str(number) for number in content["jobs"] if str(number).isdigit()] if content["kind"] == "slurm" else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def ask(numbers: Sequence[str]) -> dict[str, Job]:
    """What Slurm knows of these jobs, by number; those that it has forgotten are left out."""
    if not numbers:
        return {}
    known = _read(["squeue", "--noheader", "--states=all", f"--jobs={','.join(numbers)}", "--format=%i|%T|%r|%N"])
    if forgotten := [number for number in numbers if number not in known]:
        fields = "--format=JobIDRaw,State,ExitCode,NodeList"
        known |= _read(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(forgotten)}", fields])
    return {number: known[number] for number in numbers if number in known}


def cancel(numbers: Sequence[str]) -> None:
    """Take jobs out of the queue."""
    if numbers:
        _run(["scancel", *numbers])


def _read(command: Sequence[str]) -> dict[str, Job]:
    rows = [line.split("|") for line in _run(command).splitlines()]
    # sacct says `CANCELLED by 1000`.
    return {row[0]: Job(row[0], row[1].split(" ")[0], row[2], row[3]) for row in rows if len(row) == 4}


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
