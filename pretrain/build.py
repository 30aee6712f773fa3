"""`data build` as a person sees it: bars or lines while it works, then tables of what came out.

In: the `data` section of a run file. Out: the dataset it describes, and text: bars and tables in a terminal, plain lines
elsewhere, few enough for the log of a cluster.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from configs.data_section import DataSection
from data_pipeline.report import describe_sources
from pretrain.data.remote import refuse_remote
from pretrain.data_view import SHOWN_ROWS, Rows, tabulate_reasons, tabulate_sources
from pretrain.page import LINE_SECONDS, Page, spell_duration, spell_rate

if TYPE_CHECKING:
    from data_pipeline.build import BuildResult
    from data_pipeline.stages import Progress as StageProgress

COUNTED = {"tokenizer": "work units", "survey": "work units", "duplicates": "tasks", "tokens": "work units"}
"""What a stage counts; of the others, their own words say enough."""
FINDS_UNITS = ("survey", "tokens")
"""Stages that find units of an earlier start."""


@dataclass(frozen=True)
class Speed:
    """How fast a stage goes, per second, by what this start has made."""

    documents: float
    num_bytes: float
    tokens: float
    seconds_left: float | None
    """None where nobody can tell."""


class SpeedMeter:
    """Turns the reports of a build into speeds. A stage's clock starts with it, or behind the units that were there already."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard = clock()
        self._stage, self._done = "", 0
        self._stage_began = self._heard
        self._since, self._done_before = self._heard, 0

    @property
    def stage_seconds(self) -> float:
        """From the start of the stage to its last report."""
        return self._heard - self._stage_began

    def starts_stage(self, progress: "StageProgress") -> bool:
        """Whether this report is the first of a stage, or of one that is gone through again."""
        return progress.stage != self._stage or progress.done < self._done

    def measure(self, progress: "StageProgress") -> Speed:
        """The stage's speed so far. To be called with every report, in order."""
        now = self._clock()
        if self.starts_stage(progress):  # its first report may come behind its first piece of work
            self._since, self._done_before = now if progress.done == 0 else self._heard, 0
            if progress.stage != self._stage:
                self._stage_began = self._since
        made = progress.num_documents, progress.num_bytes, progress.num_tokens
        if progress.stage in FINDS_UNITS and not any(made):
            self._since, self._done_before = now, progress.done
        self._stage, self._done, self._heard = progress.stage, progress.done, now
        seconds = max(now - self._since, 1e-3)
        num_units = progress.done - self._done_before
        timed = num_units > 0 and progress.stage in COUNTED and progress.stage != "tokenizer"
        documents, num_bytes, tokens = (amount / seconds for amount in made)
        return Speed(documents, num_bytes, tokens, (progress.total - progress.done) * seconds / num_units if timed else None)


def describe_speed(progress: "StageProgress", speed: Speed) -> str:
    """The figures that a stage has, and what it says of itself: `812 documents/s, 3.1 MB/s, 5 min left (3 were there)`."""
    if progress.stage not in COUNTED:
        return progress.detail
    rates = {"documents/s": speed.documents, "MB/s": speed.num_bytes / 1e6, "tokens/s": speed.tokens}
    parts = [f"{spell_rate(rate)} {unit}" for unit, rate in rates.items() if rate]
    if speed.seconds_left is not None and progress.done < progress.total:
        parts.append(f"{spell_duration(speed.seconds_left)} left")
    detail = f"({progress.detail})" if progress.detail else ""
    return " ".join(filter(None, (", ".join(parts), detail)))


class LineReport:
    """A line when a stage starts, then one every `LINE_SECONDS` at most, and one when it has ended."""

    def __init__(self, say: Callable[[str], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock, self._meter, self._next = say, clock, SpeedMeter(clock), 0.0
        self._stage, self._line, self._num_reports = "", "", 0

    def __call__(self, progress: "StageProgress") -> None:
        """Report on a build."""
        if progress.stage != self._stage:
            self.end_stage()
            self._stage, self._num_reports = progress.stage, 0
        starts = self._meter.starts_stage(progress)
        figures = describe_speed(progress, self._meter.measure(progress))
        counted = f"{progress.done} of {progress.total} {COUNTED[progress.stage]} " if progress.stage in COUNTED else ""
        self._line = f"{counted}{figures}".rstrip()
        self._num_reports += 1
        if starts or self._clock() >= self._next:
            self._next = self._clock() + LINE_SECONDS
            self._say(f"{self._stage}: {self._line}")

    def end_stage(self) -> None:
        """Say what came of the stage; the next one's first report does so too. What was done in one report is said already."""
        if self._num_reports > 1:
            self._say(f"{self._stage}: done in {spell_duration(self._meter.stage_seconds)}, {self._line}")


class BarReport:
    """A bar for every stage."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._meter = bar, SpeedMeter()
        self._task = TaskID(0)

    def __call__(self, progress: "StageProgress") -> None:
        """Report on a build."""
        if self._meter.starts_stage(progress):
            self._task = self._bar.add_task(progress.stage, total=progress.total, figures="")
        figures = describe_speed(progress, self._meter.measure(progress))
        self._bar.update(self._task, completed=progress.done, total=progress.total, figures=figures)


def build_with_progress(data: DataSection, say: Callable[[str], Any], rebuild: bool = False) -> None:
    """Build a dataset (`rebuild`: keep only what is whole and fits), telling how far it is, and say what came out.

    Raises UserError as `build_dataset` does.
    """
    from data_pipeline import build

    refuse_remote(data, "`pretrain data build`")
    began = time.monotonic()
    page = Page(Console(stderr=True), say)
    if page.is_plain:
        report = LineReport(say)
        result = build.build_dataset(data, report, rebuild=rebuild)
        report.end_stage()
    else:
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False)
        with Progress(*columns, console=page.console) as bar:
            result = build.build_dataset(data, BarReport(bar), rebuild=rebuild)
    tell_result(data.folder(), result, time.monotonic() - began, page)


def tell_result(folder: str, result: "BuildResult", seconds: float, page: Page) -> None:
    """Tables of sources, of reasons, of stages; then a line of totals."""
    manifest = result.manifest
    page.table(*tabulate_sources(describe_sources(manifest)))
    page.say("")
    if reasons := tabulate_reasons(result.folder, manifest.documents.dropped, manifest.documents.quarantined):
        page.table(("reason", "documents", "became", f"examples, below {folder}"), reasons)
        page.say("")
    if stages := result.report.get("stages", []):
        page.table(*_stage_table(stages))
        page.say("")
    if found := result.report.get("deduplication"):
        counts = [f"{key.removeprefix('num_').replace('_', ' ')} {value:,}" for key, value in found.items() if value]
        page.say(f"deduplication: {', '.join(counts)}")
    if result.outcome == "unchanged":
        page.say(
            f"{folder} is built from this input already: nothing to do. Judged by the names, sizes and times of the input files and by "
            "the sizes of the shards: their bytes were not read (but those of an input file that has another time); "
            f"`pretrain data verify {folder}` reads every byte of the shards."
        )
    elif result.num_units_kept:
        page.say(f"{result.num_units_kept} of {result.num_units} work units were there from an earlier start.")
    if result.skipped:
        counted = [f"{count} {suffix or '(none)'}" for suffix, count in sorted(result.skipped.items())[:SHOWN_ROWS]]
        page.say("files passed over, by suffix: " + ", ".join(counted))
    total = manifest.total("train") + manifest.total("held_out")
    page.say(
        f"{folder}: {total.num_documents:,} documents, {total.num_bytes:,} bytes, {total.num_tokens:,} tokens "
        f"({total.num_bytes / max(1, total.num_tokens):.2f} bytes per token), {seconds:.0f} s"
    )


def _stage_table(stages: Sequence[dict[str, Any]]) -> tuple[list[str], Rows]:
    headers = ["stage", "units", "there before", "seconds", "documents/s", "MB/s", "tokens/s", "peak MB per worker"]
    rows: Rows = []
    for stage in stages:
        rates = [stage["per_second"][key] for key in ("documents", "megabytes", "tokens")]
        counts = [f"{stage[key]:,}" for key in ("num_units", "num_units_kept")]
        peak = f"{stage['peak_worker_bytes'] / 1e6:,.0f}"
        rows.append([stage["stage"], *counts, f"{stage['seconds']:.1f}", *(spell_rate(rate) if rate else "-" for rate in rates), peak])
    return headers, rows
