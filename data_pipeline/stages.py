"""One stage of a build over all its work units: run, counted, reported, and what failed named at the end.

In: a function and a task for each unit. Out: each unit's result, and a `StageReport` of what it took.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from configs.errors import UserError
from data_pipeline.execution import Failed, Run
from data_pipeline.report import StageReport
from data_pipeline.sources import WorkUnit

FAILURES_BORNE = 10  # so many units may fail before the rest is not tried any more
SHOWN_FAILURES = 5
Stage = Literal["plan", "tokenizer", "survey", "duplicates", "tokens", "manifest"]


@dataclass(frozen=True)
class Progress:
    """How far a stage has come."""

    stage: Stage
    done: int
    total: int
    """In work units (plan: files; duplicates: tasks; manifest: 1)."""
    detail: str
    """A few words for people."""
    num_documents: int = 0
    """That this start has made in this stage, so far; so for bytes and tokens."""
    num_bytes: int = 0
    num_tokens: int = 0


Report = Callable[[Progress], None]


class UnitWork(Protocol):
    """A task of one work unit."""

    @property
    def unit(self) -> WorkUnit:
        """The unit."""
        ...


class UnitDone(Protocol):
    """What such a task gives back."""

    @property
    def was_there(self) -> bool:
        """Whether it was found finished and whole."""
        ...

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory of the process that did it."""
        ...

    def measure(self) -> tuple[int, int, int]:
        """Documents read, bytes of text and tokens that came out."""
        ...


Work = TypeVar("Work", bound=UnitWork)
Done = TypeVar("Done", bound=UnitDone)


def run_stage(
    stage: Stage,
    function: Callable[[Work], Done],
    tasks: Sequence[Work],
    report: Report,
    run: Run,
    stages: list[StageReport],
) -> dict[int, Done]:
    """Do every unit's task; its result by the unit's number. Raises UserError naming the units that could not be made.

    What it took is added to the stage's report in `stages`: where some units of a stage are made again, it stays one stage of
    as many units, all of which were counted before.
    """
    if not tasks:
        return {}
    began = time.monotonic()
    measured = next((one for one in stages if one.stage == stage), None)
    counted = measured.num_units if measured else 0
    if measured is None:
        measured = StageReport(stage, len(tasks))
        stages.append(measured)
        report(Progress(stage, 0, len(tasks), "starting the workers"))
    results: dict[int, Done] = {}
    failures: list[tuple[Work, str]] = []
    with closing(run(function, tasks)) as done:
        for task, result in done:
            if isinstance(result, Failed):
                failures.append((task, result.reason))
                if len(failures) >= FAILURES_BORNE:
                    break
                continue
            results[task.unit.index] = result
            measured.start_seconds = measured.start_seconds or time.monotonic() - began
            measured.peak_worker_bytes = max(measured.peak_worker_bytes, result.peak_bytes)
            num_documents, num_bytes, num_tokens = result.measure()
            if result.was_there:
                measured.num_units_kept += 1
            else:
                measured.num_documents += num_documents
                measured.num_bytes += num_bytes
                measured.num_tokens += num_tokens
            detail = f"{measured.num_units_kept} were there" if measured.num_units_kept else ""
            made = measured.num_documents, measured.num_bytes, measured.num_tokens
            report(Progress(stage, counted or len(results) + len(failures), measured.num_units, detail, *made))
    measured.seconds += time.monotonic() - began
    if failures:
        shown = "\n  ".join(f"{task}: {reason}" for task, reason in failures[:SHOWN_FAILURES])
        raise UserError(
            f"{len(failures)} of {len(tasks)} work units could not be made ({len(results)} are finished and kept):\n  {shown}\n"
            "Mend that, then start the same command again."
        )
    return results
