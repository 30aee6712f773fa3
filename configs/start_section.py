"""Where a run begins that does not begin at nothing: the key `start_from` of a run file, taken apart.

In: `PATH@STEP` or `PATH`. Out: the path and the step. Nothing is looked up here.
"""

import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

_STEP = re.compile(r"[0-9]{1,18}")


class Start(NamedTuple):
    """A checkpoint of another run."""

    path: Path
    """A run folder, or its name below `run.root`."""
    step: int | None
    """None: its newest."""

    def __str__(self) -> str:
        return str(self.path) if self.step is None else f"{self.path}@{self.step}"


def parse_start(text: str) -> Start:
    """`PATH@STEP` or `PATH`. A run's name holds no `@`, so one in the last part of the path begins a step.

    Raises ValueError for a step that is no number, and for no path.
    """
    head, slash, last = text.rpartition("/")
    name, at, step = last.partition("@")
    if not name:
        raise ValueError(f"wanted PATH@STEP or PATH of another run's folder, found {text!r}")
    if at and not _STEP.fullmatch(step):
        raise ValueError(f"behind @ wanted the step of a checkpoint, such as {head}{slash}{name}@1000, found {step!r}")
    return Start(Path(f"{head}{slash}{name}"), int(step) if at else None)


def _checked(text: str) -> str:
    parse_start(text)
    return text


StartFrom = Annotated[str, AfterValidator(_checked)]
