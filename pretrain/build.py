"""The `data` verbs as a person sees them: bars or lines while they work, then tables of what came out.

In: the `data` section of a run file, or what `data_pipeline/show.py` found. Out: the dataset it describes, and text: bars,
tables and colours in a terminal, plain lines elsewhere, few enough for the log of a cluster.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any
from unicodedata import category

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from configs.errors import UserError
from configs.schema import DataSection
from data_pipeline.manifest import MANIFEST, TOKENIZER, dataset_bytes, load_manifest, verify_dataset
from data_pipeline.show import ShownDocument, describe_sources

if TYPE_CHECKING:
    from data_pipeline.build import BuildResult
    from data_pipeline.stages import Progress as StageProgress

LINE_SECONDS = 30  # between two lines of a stage, where there is no terminal
SHOWN_ROWS = 12
TEXT_WIDTH = 110
COUNTED = {"tokenizer": "work units", "survey": "work units", "duplicates": "tasks", "tokens": "work units"}
"""What a stage counts; of the others, their own words say enough."""
FINDS_UNITS = ("survey", "tokens")
"""Stages that find units of an earlier start."""
TOKEN_STYLES = ("black on color(152)", "black on color(223)")
END_STYLE = "bold white on color(88)"


@dataclass(frozen=True)
class Page:
    """Where text goes: tables and colours to `console` if that is a terminal, plain lines to `say` if not."""

    console: Console
    say: Callable[[str], Any]

    @property
    def is_plain(self) -> bool:
        """Whether nobody sees bars and colours."""
        return not self.console.is_terminal or self.console.is_dumb_terminal

    @property
    def has_colours(self) -> bool:
        """Whether backgrounds can be told apart."""
        return not self.is_plain and self.console.color_system is not None and not self.console.no_color

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of text under headers; columns of numbers are aligned to the right."""
        numeric = [all(row[column][:1] in "0123456789<-" for row in rows) for column in range(len(headers))]
        if self.is_plain:
            widths = [max(map(len, cells)) for cells in zip(headers, *rows, strict=True)]
            for row in (headers, *rows):
                cells = zip(row, widths, numeric, strict=True)
                self.say("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip())
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for header, right in zip(headers, numeric, strict=True):
            table.add_column(Text(header), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)


def open_page() -> Page:
    """Standard output, as a page."""
    return Page(Console(), print)


# --- while it works -----------------------------------------------------------------------------------------


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
        self._since, self._done_before = self._heard, 0

    def starts_stage(self, progress: "StageProgress") -> bool:
        """Whether this report is the first of a stage, or of one that is gone through again."""
        return progress.stage != self._stage or progress.done < self._done

    def measure(self, progress: "StageProgress") -> Speed:
        """The stage's speed so far. To be called with every report, in order."""
        now = self._clock()
        if self.starts_stage(progress):  # its first report may come behind its first piece of work
            self._since, self._done_before = now if progress.done == 0 else self._heard, 0
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
    parts = [f"{_rate(rate)} {unit}" for unit, rate in rates.items() if rate]
    if speed.seconds_left is not None and progress.done < progress.total:
        parts.append(f"{_duration(speed.seconds_left)} left")
    detail = f"({progress.detail})" if progress.detail else ""
    return " ".join(filter(None, (", ".join(parts), detail)))


class LineReport:
    """A line when a stage starts, and then one every `LINE_SECONDS` at most."""

    def __init__(self, say: Callable[[str], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock, self._meter, self._next = say, clock, SpeedMeter(clock), 0.0

    def __call__(self, progress: "StageProgress") -> None:
        """Report on a build."""
        starts = self._meter.starts_stage(progress)
        figures = describe_speed(progress, self._meter.measure(progress))
        if not starts and self._clock() < self._next:
            return
        self._next = self._clock() + LINE_SECONDS
        counted = f"{progress.done} of {progress.total} {COUNTED[progress.stage]} " if progress.stage in COUNTED else ""
        self._say(f"{progress.stage}: {counted}{figures}".rstrip())


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

    began = time.monotonic()
    page = Page(Console(stderr=True), say)
    if page.is_plain:
        result = build.build_dataset(data, LineReport(say), rebuild=rebuild)
    else:
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False)
        with Progress(*columns, console=page.console) as bar:
            result = build.build_dataset(data, BarReport(bar), rebuild=rebuild)
    tell_result(data.folder(), result, time.monotonic() - began, page)


def verify_with_progress(folder: Path, say: Callable[[str], Any]) -> list[str]:
    """What is wrong with a dataset, a sentence per problem, telling how far it is. Raises UserError when there is none."""
    try:
        total = dataset_bytes(load_manifest(folder)) + sum(path.stat().st_size for path in folder.glob(TOKENIZER))
    except UserError as error:
        if not (folder / MANIFEST).exists():
            raise
        return [str(error)]  # a damaged manifest is one of the things to be found
    page = Page(Console(stderr=True), say)
    if page.is_plain:
        return verify_dataset(folder, _LineVerification(say, total))
    columns = TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=page.console) as bar:
        task = bar.add_task("verifying", total=total)
        return verify_dataset(folder, lambda num_bytes: bar.advance(task, num_bytes))


class _LineVerification:
    """A line every `LINE_SECONDS` at most."""

    def __init__(self, say: Callable[[str], Any], total: int) -> None:
        self._say, self._total, self._done = say, total, 0
        self._began = self._told = time.monotonic()

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            speed = self._done / (now - self._began)
            left = _duration(max(0, self._total - self._done) / speed)
            self._say(f"verifying: {_megabytes(self._done)} of {_megabytes(self._total)} MB, {_rate(speed / 1e6)} MB/s, {left} left")


# --- what came out of a build -------------------------------------------------------------------------------


def tell_result(folder: str, result: "BuildResult", seconds: float, page: Page) -> None:
    """Tables of sources, of reasons, of stages; then a line of totals."""
    manifest = result.manifest
    page.table(*_source_table(describe_sources(manifest)))
    page.say("")
    if reasons := _reason_rows(result.folder, manifest.documents.dropped, manifest.documents.quarantined):
        page.table(("reason", "documents", "became", f"examples, below {folder}"), reasons)
        page.say("")
    if stages := result.report.get("stages", []):
        page.table(*_stage_table(stages))
        page.say("")
    if found := result.report.get("deduplication"):
        counts = [f"{key.removeprefix('num_').replace('_', ' ')} {value:,}" for key, value in found.items() if value]
        page.say(f"deduplication: {', '.join(counts)}")
    if result.outcome == "unchanged":
        page.say(f"{folder} is built from this input already: nothing to do.")
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


Rows = list[list[str]]


def _source_table(sources: dict[str, dict[str, Any]], mixture: dict[str, float] | None = None) -> tuple[list[str], Rows]:
    """Documents, text and tokens of each source, and of all; with `mixture`, each one's share of the training tokens."""
    headers = ["source", "read", "kept", "dropped", "quarantined", "MB", "tokens"]
    rows = [
        [
            name,
            *(f"{value:,}" for value in (one["read"], one["kept"], sum(one["dropped"].values()), sum(one["quarantined"].values()))),
            _megabytes(one["num_bytes"]),
            f"{one['num_tokens']:,}",
        ]
        for name, one in sources.items()
    ]
    if mixture is not None:
        headers.append("% of train")
        rows = [[*row, f"{100 * mixture.get(row[0], 0):.2f}"] for row in rows]
    if len(rows) > 1:
        sums = [sum(one[key] for one in sources.values()) for key in ("read", "kept", "num_bytes", "num_tokens")]
        left_out = [sum(sum(one[key].values()) for one in sources.values()) for key in ("dropped", "quarantined")]
        total = ["all", *(f"{value:,}" for value in (*sums[:2], *left_out)), _megabytes(sums[2]), f"{sums[3]:,}"]
        rows.append([*total, *([] if mixture is None else ["100.00"])])
    return headers, rows


def _reason_rows(folder: Path, dropped: dict[str, int], quarantined: dict[str, int]) -> Rows:
    """How many documents each reason cost, and where to read about them."""
    rows: Rows = []
    for reason, count in dropped.items():
        name = f"dropped/{reason}.jsonl"  # a user's own reason may have letters that no file name has
        rows.append([make_visible(reason), f"{count:,}", "dropped", make_visible(name) if (folder / name).is_file() else "dropped/"])
    return rows + [[reason, f"{count:,}", "quarantined", "units/*/quarantine.jsonl"] for reason, count in quarantined.items()]


def _stage_table(stages: Sequence[dict[str, Any]]) -> tuple[list[str], Rows]:
    headers = ["stage", "units", "there before", "seconds", "documents/s", "MB/s", "tokens/s", "peak MB per worker"]
    rows: Rows = []
    for stage in stages:
        rates = [stage["per_second"][key] for key in ("documents", "megabytes", "tokens")]
        counts = [f"{stage[key]:,}" for key in ("num_units", "num_units_kept")]
        peak = f"{stage['peak_worker_bytes'] / 1e6:,.0f}"
        rows.append([stage["stage"], *counts, f"{stage['seconds']:.1f}", *(_rate(rate) if rate else "-" for rate in rates), peak])
    return headers, rows


# --- what is there ------------------------------------------------------------------------------------------


def tell_dataset(found: dict[str, Any], page: Page) -> None:
    """What `show_dataset` found."""
    tokenizer, inputs = found["tokenizer"], found["inputs"]
    page.say(f"{found['folder']}, format {found['format_version']}, manifest {found['sha256'][:16]}")
    page.say(
        f"tokenizer  {tokenizer['vocabulary_size']:,} entries as {tokenizer['dtype']}, end of text {tokenizer['end_of_text']} = "
        f"{tokenizer['end_of_text_id']}, SHA-256 {tokenizer['sha256'][:16]}"
    )
    page.say(f"inputs     {inputs['num_files']:,} files, {_megabytes(inputs['num_bytes'])} MB")
    page.say("libraries  " + ", ".join(f"{name} {version}" for name, version in found["libraries"].items()))
    rules = [f"{number}. {_describe_rule(rule)}" for number, rule in enumerate(found["rules"], 1)]
    page.say("rules      " + ("\n           ".join(rules) or "none"))
    page.say("")
    splits: Rows = []
    for name, one in found["splits"].items():
        shards, documents, tokens = (f"{one[key]:,}" for key in ("num_shards", "num_documents", "num_tokens"))
        splits.append([name, shards, documents, _megabytes(one["num_bytes"]), tokens, str(one["bytes_per_token"] or "-")])
    page.table(("split", "shards", "documents", "MB", "tokens", "bytes per token"), splits)
    page.say("")
    page.table(*_source_table(found["sources"], found["mixture"]))
    if reasons := _reason_rows(Path(found["folder"]), found["documents"]["dropped"], found["documents"]["quarantined"]):
        page.say("")
        page.table(("reason", "documents", "became", f"examples, below {found['folder']}"), reasons)
    for example in found["examples"]:
        page.say(f"\n{make_visible(_place(example))}, {example['num_tokens']:,} tokens")
        page.say("  " + make_visible(example["text"]).replace("␊", "␊\n  "))


def tell_document(document: ShownDocument, page: Page) -> None:
    """A document with its tokens told apart: by colours, or by `|` where there are none."""
    page.say(f"document  {document.document_id}, number {document.number} of {document.shard} ({document.split})")
    page.say(make_visible(f"source    {document.source}, file {document.file}, position {document.position}"))
    if document.name is not None:
        page.say(make_visible(f"name      {document.name}"))
    if document.metadata is not None:
        page.say(make_visible(f"metadata  {json.dumps(document.metadata, ensure_ascii=False)}"))
    page.say(f"tokens    {document.num_tokens:,} for {document.num_bytes:,} bytes of text")
    left_out = document.num_tokens - len(document.ids)
    pieces = [make_visible(piece).replace("␊", "␊\n") for piece in document.pieces]
    ending = f" ... {left_out - 1:,} more tokens ... " if left_out > 1 else ""
    last = [document.last_piece] if left_out else []
    if page.has_colours:
        text = Text()
        whole = pieces if left_out else pieces[:-1]
        for number, piece in enumerate(whole):
            text.append(piece, TOKEN_STYLES[number % len(TOKEN_STYLES)])
        text.append(ending).append(make_visible(document.last_piece), END_STYLE)
        page.console.print(text, soft_wrap=True)
    else:
        page.say("|".join([*pieces, *filter(None, [ending]), *map(make_visible, last)]))


def tell_differences(found: dict[str, Any], page: Page) -> None:
    """What `compare_datasets` found, but for what is equal."""
    for letter, folder, digest in zip("AB", found["folders"], found["sha256"], strict=True):
        page.say(f"{letter}  {folder}, manifest {digest[:16]}")
    if found["equal"]:
        page.say("equal: their manifests are the same byte for byte, and so is what these promise")
        return
    for title in ("configuration", "tokenizer", "libraries"):
        _tell_pairs(title, {name: [_short_value(value) for value in pair] for name, pair in found[title].items()}, page)
    _tell_rules_and_inputs(found, page)
    counts: dict[str, list[str]] = {}
    for name, pair in found["sources"].items():
        for key in ("read", "kept", "num_tokens", "num_bytes"):
            left, right = (one[key] if one else 0 for one in pair)
            if left != right:
                counts[f"{name} {key.removeprefix('num_')}"] = [f"{left:,}", f"{right:,}"]
    _tell_pairs("source", counts, page)
    for key in ("dropped", "quarantined"):
        _tell_pairs(key, {reason: [f"{count or 0:,}" for count in pair] for reason, pair in found[key].items()}, page)
    shards, documents = found["shards"], found["documents"]
    page.say(f"\nshards     {shards['equal']:,} equal by SHA-256, {shards['only_in_a']:,} only in A, {shards['only_in_b']:,} only in B")
    page.say(
        f"documents  {documents['in_both']:,} in both by id ({documents['with_other_num_tokens_or_num_bytes']:,} of them with another "
        f"number of tokens or bytes, {documents['in_other_split']:,} in the other split), {documents['only_in_a']:,} only in A, "
        f"{documents['only_in_b']:,} only in B"
    )


def _tell_pairs(title: str, pairs: dict[str, list[str]], page: Page) -> None:
    if pairs:
        page.say("")
        page.table((title, "A", "B"), [[make_visible(text) for text in (name, *pair)] for name, pair in pairs.items()])


def _tell_rules_and_inputs(found: dict[str, Any], page: Page) -> None:
    rules, inputs = found["rules"], found["inputs"]
    lines = [f"only in {side}: {_describe_rule(rule)}" for side in "AB" for rule in rules[f"only_in_{side.lower()}"]]
    if rules["in_other_order"]:
        lines.append("the same rules in another order")
    if lines:
        page.say("\nrules      " + "\n           ".join(lines))
    named = {"only in A": "only_in_a", "only in B": "only_in_b", "changed": "changed"}
    named["of equal size, cut into other parts"] = "of_equal_size_in_other_parts"
    if any(inputs[key] for key in named.values()):
        page.say(f"\ninputs     {inputs['num_equal']:,} equal, " + ", ".join(f"{len(inputs[key]):,} {text}" for text, key in named.items()))
        for text, key in named.items():
            shown = inputs[key][:SHOWN_ROWS]
            more = [f"           ... and {len(inputs[key]) - len(shown):,} more"] if len(inputs[key]) > len(shown) else []
            for line in [*(f"           {text}: {make_visible(name)}" for name in shown), *more]:
                page.say(line)


def tell_rules(rules: dict[str, str], page: Page) -> None:
    """Every rule with its settings and their defaults, and below it what it does."""
    for signature, description in rules.items():
        page.say(fill(signature, TEXT_WIDTH, subsequent_indent="        ", break_long_words=False))
        page.say(fill(description, TEXT_WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False))


# --- words and numbers --------------------------------------------------------------------------------------


def make_visible(text: str) -> str:
    """Text with every control character shown instead of obeyed: ␊ for a new line, ␛ for an escape, \\u202e, ..."""
    return "".join(_show_letter(letter) if category(letter)[0] == "C" or category(letter) in ("Zl", "Zp") else letter for letter in text)


def _show_letter(letter: str) -> str:
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    return letter.encode("unicode_escape").decode("ascii")


def _describe_rule(rule: dict[str, Any]) -> str:
    """A rule's name, the settings that were given, and where more than its name decides, what it was made of."""
    settings = json.loads(rule["settings"])["settings"]
    given = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())
    read = [f"{path} {digest[:16]}" for path, digest in rule["files"]]
    own = [f"source {rule['source_sha256'][:16]}"] if rule["source_sha256"] else []
    return make_visible(f"{rule['rule']}({given})" + (f" [{', '.join([*read, *own])}]" if read or own else ""))


def _place(example: dict[str, Any]) -> str:
    return f"{example['document_id']}, source {example['source']}, file {example['file']}, position {example['position']}"


def _short_value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(value)}}}"
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.3f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "<0.001"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min"
