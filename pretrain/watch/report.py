"""The page of a run, or of several side by side: one HTML file that needs no network and no script.

In: what is known of each run (`RunFacts`: `pretrain/report_view.py` gathers it from run folders). Out: the page's sections, and their HTML
(`report_page.py`).
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pretrain.page import spell_duration
from pretrain.watch.plots import (
    Bar,
    Curve,
    FloatArray,
    Plot,
    colour_of,
    draw_bars,
    draw_curves,
    make_curve,
    number_rows,
)
from pretrain.watch.report_page import Figure, Page, Section, Table, Text, Written, render
from pretrain.watch.spelling import spell_count

if TYPE_CHECKING:
    import pyarrow

    from pretrain.watch.ledger import Ledger

MOST_LAYERS, MOST_ROWS = 8, 200
"""Of a plot by layer, and of a table."""
MOST_PROMPTS, MOST_SAMPLES, MOST_LETTERS = 20, 12, 4000
"""Of the texts along the way, of those that continue one prompt, and of each."""
PARTS = {
    "productive": "steps that count",
    "recomputed": "steps done again, and lost ones",
    "start_up": "start-up",
    "compile": "first steps (compiling)",
    "data_wait": "waiting for data",
    "checkpoint": "saving",
    "evaluation": "evaluating",
    "ending": "ending",
    "idle": "nobody ran it",
    "queue": "waiting in a queue",
}
"""The ledger's, in words."""


class Profile(NamedTuple):
    """What a trace of some steps left."""

    name: str
    text: str
    files: Sequence[tuple[str, str | None]]
    """Names, and where the page finds them; None: it cannot link there."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run. What is not there is empty, and said in `missing`."""

    name: str
    folder: str
    status: dict[str, Any] = field(default_factory=dict)
    """As `pretrain status --json` has it."""
    metrics: "pyarrow.Table | None" = None
    """As `read_run` gives it."""
    ledger: "Ledger | None" = None
    attempts: Sequence[dict[str, Any]] = ()
    """Rows of attempts.jsonl: finished attempts, and changes between them."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    configuration_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    mixture: dict[str, Any] | None = None
    """As `describe_mixture` has it."""
    checkpoints: Sequence[dict[str, Any]] = ()
    """As `list_checkpoints` has them."""
    samples: Sequence[dict[str, Any]] = ()
    profiles: Sequence[Profile] = ()
    missing: Sequence[str] = ()
    """Sentences."""

    @property
    def is_running(self) -> bool:
        """Whether there will be more."""
        return self.status.get("state") in ("running", "saving", "evaluating", "stalled", "queued")


def make_page(runs: Sequence[RunFacts], refresh_seconds: int | None = None) -> str:
    """HTML of one run, or of several compared. refresh_seconds: after which a browser asks for it again; None: never."""
    written = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    if len(runs) == 1:
        run = runs[0]
        state = str(run.status.get("state", "unknown"))
        page = Page(run.name, f"{run.folder} · written {written}", state, _tiles(run), _sections_of_one(run), refresh_seconds)
    else:
        names = ", ".join(run.name for run in runs)
        page = Page(f"{len(runs)} runs", f"{names} · written {written}", "", (), _sections_of_several(runs), refresh_seconds)
    return render(page)


# --- one run ------------------------------------------------------------------------------------------------


def _tiles(run: RunFacts) -> list[tuple[str, str, str]]:
    status, ledger = run.status, run.ledger
    step, total = status.get("step") or int(_last(run, "step") or 0), status.get("total_steps")
    tokens = status.get("tokens") or int(_last(run, "tokens_seen") or 0)
    left = f"; {spell_duration(status['seconds_left'])} left" if status.get("seconds_left") else ""
    tiles = [
        ("state", str(status.get("state", "unknown")), str(status.get("why") or "")),
        ("step", f"{step:,}", f"of {total:,} ({step / total:.0%})" if total else ""),
        ("tokens", spell_count(tokens), f"{tokens:,}"),
        ("loss", _spell(_last(run, "loss"), "{:.4f}"), "nats per token, of the last step logged"),
        ("held out", _spell(_last(run, "held_out/bits_per_byte"), "{:.4f}"), "bits per byte"),
        ("speed", _spell(_recent(run, "tokens_per_second"), "{:,.0f}"), "tokens per second, median of the last 20 rows"),
        ("MFU", _spell(_recent(run, "mfu/palm"), "{:.1%}"), "PaLM's, median of the last 20 rows"),
        ("goodput", _spell(ledger.goodput if ledger else None, "{:.1%}"), "of the time made steps that count"),
        ("attempts", f"{status.get('attempts') or len(run.attempts)}", ""),
        ("time", spell_duration(ledger.wall_seconds) if ledger else "", f"since the run began{left}"),
    ]
    return [(what, value or "–", hint if value else "not recorded") for what, value, hint in tiles]


def _sections_of_one(run: RunFacts) -> list[Section]:
    draw = _Drawing([run])
    return [
        Section(
            "learning", "Learning", figures=[*draw.several(_LEARNING), *_held_out(draw, run), *_tasks(draw, run), *draw.several(_RATE)]
        ),
        Section("speed", "Speed", figures=draw.several(_SPEED)),
        Section("memory", "Memory", figures=draw.several(_MEMORY)),
        _time_of(run),
        Section("norms", "Gradients and weights", figures=[*draw.several(_NORMS), *_layers(draw, run)]),
        _data_of(run),
        Section("events", "Events", tables=_events(run)),
        Section("attempts", "Attempts", tables=_attempts(run)),
        Section("checkpoints", "Checkpoints", figures=draw.several(_SAVES), tables=_checkpoints(run)),
        Section("samples", "What it writes", written=_written(run.samples)),
        Section("profiles", "Profiles", texts=[Text(one.name, one.text, one.files) for one in run.profiles]),
        Section("configuration", "Configuration and environment", tables=_environment(run), texts=_configuration(run)),
        Section("missing", "What is not there", lines=run.missing),
    ]


class _Wanted(NamedTuple):
    """A plot, by the columns of its curves."""

    title: str
    unit: str
    columns: dict[str, str]
    """Names in the metrics, and in the picture."""
    form: str = ".4g"
    scale: float = 1.0
    note: str = ""
    is_log: bool = False
    is_sparse: bool = False
    is_noisy: bool = False
    scarce: tuple[str, ...] = ()
    """Columns whose points are marked each."""


_LEARNING = (
    _Wanted(
        "Loss",
        "nats per token",
        {"loss": "training", "held_out/nats_per_token": "held out"},
        ".4f",
        is_noisy=True,
        scarce=("held_out/nats_per_token",),
    ),
)
_RATE = (_Wanted("Learning rate", "of the first group", {"learning_rate": "learning rate"}, ".3g"),)
_SPEED = (
    _Wanted("Throughput", "tokens per second", {"tokens_per_second": "all devices"}, "k", is_noisy=True),
    _Wanted(
        "Utilisation",
        "% of the devices' peak",
        {"mfu/palm": "MFU, PaLM's", "mfu/causal": "MFU, causal", "mfu/hardware": "hardware, with recomputation"},
        ".1%",
        is_noisy=True,
    ),
    _Wanted(
        "Where a step's time goes",
        "milliseconds, rank 0",
        {f"seconds/{part}": part.replace("_", " ") for part in ("data_wait", "forward", "backward", "optimizer", "other")},
        ".3g",
        1000,
        is_noisy=True,
    ),
    _Wanted("Waiting for data", "% of the time", {"data_wait_share": "rank 0"}, ".2%"),
    _Wanted("The slowest rank", "times the median rank's step", {"ranks/slowest_ratio": "slowest"}, ".2f"),
)
_MEMORY = (
    _Wanted(
        "Memory of a device",
        "GB, the most since the last row",
        {"memory/allocated_bytes": "allocated", "memory/reserved_bytes": "reserved"},
        ".3g",
        1e-9,
    ),
    _Wanted("Memory of the host", "GB, rank 0's process", {"memory/host_bytes": "host"}, ".3g", 1e-9),
)
_NORMS = (
    _Wanted("Gradient norm", "before clipping", {"gradient_norm": "all gradients"}, is_log=True, is_noisy=True),
    _Wanted("Parameter norm", "all weights", {"parameter_norm": "all weights"}),
    _Wanted("Loss scale", "fp16", {"loss_scale": "loss scale"}, "k", is_log=True),
    _Wanted("Skipped steps", "so far", {"skipped_steps": "skipped"}, ".0f"),
)
_SAVES = (_Wanted("Training stands still", "seconds, each save", {"checkpoint/stall_seconds": "standing still"}, ".3g", is_sparse=True),)
_COMPARED = (
    _Wanted("Loss", "nats per token", {"loss": "loss"}, ".4f", is_noisy=True),
    _Wanted("Held out", "bits per byte", {"held_out/bits_per_byte": "held out"}, ".4f", is_sparse=True),
    _Wanted("Throughput", "tokens per second", {"tokens_per_second": "speed"}, "k", is_noisy=True),
    _Wanted("MFU", "PaLM's, % of the devices' peak", {"mfu/palm": "MFU"}, ".1%", is_noisy=True),
    _Wanted("Memory of a device", "GB allocated", {"memory/allocated_bytes": "memory"}, ".3g", 1e-9),
    _Wanted("Memory of the host", "GB, rank 0's process", {"memory/host_bytes": "memory"}, ".3g", 1e-9),
    _Wanted("Gradient norm", "before clipping", {"gradient_norm": "norm"}, is_log=True, is_noisy=True),
    _Wanted("Learning rate", "of the first group", {"learning_rate": "learning rate"}, ".3g"),
)
_HIDDEN_ZEROS = {"Skipped steps"}
"""Plots that say nothing where all is zero."""


class _Drawing:
    """Plots of one run, or of several, on the same axis of tokens; each run's is read once."""

    def __init__(self, runs: Sequence[RunFacts]) -> None:
        self._runs = runs
        self._tokens = [_column(run, "tokens_seen") for run in runs]
        self._count = 0

    def several(self, wanted: Iterable[_Wanted]) -> list[Figure]:
        """Those of which there is a value."""
        return [figure for one in wanted if (figure := self.one(one)) is not None]

    def one(self, wanted: _Wanted) -> Figure | None:
        """A plot with all columns of the one run, or with the one column of all runs; None where there is no value."""
        curves: list[Curve] = []
        for run, tokens in zip(self._runs, self._tokens, strict=True):
            for column, name in wanted.columns.items():
                values = _column(run, column)
                if tokens is None or values is None:
                    continue
                is_sparse = wanted.is_sparse or column in wanted.scarce
                curve = make_curve(
                    run.name if len(self._runs) > 1 else name, tokens, wanted.scale * values, is_sparse, wanted.is_noisy and not is_sparse
                )
                curves += [] if curve is None else [curve]
        if not curves or (wanted.title in _HIDDEN_ZEROS and not any(curve.y.any() for curve in curves)):
            return None
        marks, steps, note = [], None, wanted.note
        if len(self._runs) == 1 and self._tokens[0] is not None:
            marks, steps = _beginnings(self._runs[0], self._tokens[0]), _steps(self._runs[0], self._tokens[0])
            if self._count == 0:  # once, on the first plot of the page
                note = " ".join(filter(None, (note, _spell_marks(marks))))
        if self._count == 0 and any(curve.trend is not None for curve in curves):
            note = f"Pale: what was logged; strong, here and below: medians. {note}".strip()
        return self._draw(Plot(wanted.title, wanted.unit, curves, wanted.form, marks, steps, note, wanted.is_log))

    def _draw(self, plot: Plot) -> Figure:
        from markupsafe import Markup

        self._count += 1
        legend = [(curve.name, colour_of(number)) for number, curve in enumerate(plot.curves)] if len(plot.curves) > 1 else []
        headers = ["tokens", *(["step"] if plot.steps is not None else []), *(curve.name for curve in plot.curves)]
        svg = Markup(draw_curves(plot, f"plot{self._count}"))  # built of numbers; its words are escaped there
        return Figure(plot.title, f"{plot.unit}, by tokens", svg, legend, plot.note, headers, list(number_rows(plot)))


def _held_out(draw: _Drawing, run: RunFacts) -> list[Figure]:
    """Bits per byte of each source and of all; where bytes mean nothing, nats per token."""
    for measure, unit in (("bits_per_byte", "bits per byte"), ("nats_per_token", "nats per token")):
        sources = {name: name.split("/", 1)[1].rsplit("/", 1)[0] for name in _names(run) if _is_of_source(name, measure)}
        columns = {**({f"held_out/{measure}": "all"} if f"held_out/{measure}" in _names(run) else {}), **sources}
        if columns and (measure == "bits_per_byte" or sources):
            return draw.several([_Wanted("Held out, by source", unit, columns, ".4f", is_sparse=True)])
    return []


def _is_of_source(name: str, measure: str) -> bool:
    return name.startswith("held_out/") and name.endswith(f"/{measure}") and name.count("/") > 1


def _tasks(draw: _Drawing, run: RunFacts) -> list[Figure]:
    columns = {name: name.removeprefix("task/") for name in _names(run) if name.startswith("task/")}
    return draw.several([_Wanted("Tasks", "score", columns, ".4f", is_sparse=True)]) if columns else []


def _layers(draw: _Drawing, run: RunFacts) -> list[Figure]:
    """Norms of some layers, evenly chosen where there are many."""
    figures: list[_Wanted] = []
    for kind in ("gradients", "weights"):
        names = [name for name in _names(run) if name.startswith(f"norm/{kind}/")]
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(MOST_LAYERS, len(names))).round().astype(int)] if names else []
        note = f"{len(chosen)} of {len(names)} layers." if len(chosen) < len(names) else ""
        columns = {name: name.removeprefix(f"norm/{kind}/") for name in chosen}
        figures.append(_Wanted(f"Norms of {kind}, by layer", "norm", columns, note=note, is_log=kind == "gradients"))
    return draw.several(figures)


def _time_of(run: RunFacts) -> Section:
    """The ledger: of the whole run, and of each attempt where there are several."""
    from markupsafe import Markup

    ledger, key, title = run.ledger, "time", "Where the time went"
    if ledger is None or not ledger.wall_seconds:
        return Section(key, title)
    names = [PARTS.get(name, name) for name in ledger.parts]
    whole = [Bar("the run", list(ledger.parts.values()))]
    rows = [[PARTS.get(name, name), f"{part:,.1f}", f"{part / ledger.wall_seconds:.1%}"] for name, part in ledger.parts.items()]
    figures = [
        Figure(
            "The run",
            f"{spell_duration(ledger.wall_seconds)} in all; goodput {ledger.goodput:.1%}",
            Markup(draw_bars("Where the run's time went", names, whole, "ledger")),
            _bar_legend(names, list(ledger.parts.values())),
            headers=("part", "seconds", "% of the time"),
            rows=rows,
            is_bar=True,
        )
    ]
    if 1 < len(ledger.attempts) <= MOST_ROWS:
        shown = ledger.attempts[-20:]
        bars = [Bar(f"attempt {one.attempt}", [one.parts.get(name, 0.0) for name in ledger.parts]) for one in shown]
        table = [[str(one.attempt), *(f"{one.parts.get(name, 0.0):,.1f}" for name in ledger.parts)] for one in ledger.attempts]
        note = "" if len(shown) == len(ledger.attempts) else f"The last {len(shown)} of {len(ledger.attempts)}."
        unit = f"each as long as the others; from attempt {shown[0].attempt} on, downwards"
        svg = Markup(draw_bars("Where each attempt's time went", names, bars, "attempts"))
        figures.append(Figure("Each attempt", unit, svg, (), note, ("attempt", *names), table, is_bar=True))
    return Section(key, title, figures)


def _bar_legend(names: Sequence[str], parts: Sequence[float]) -> list[tuple[str, str]]:
    """Of parts that are there, with their share."""
    whole = sum(parts) or 1.0
    return [
        (f"{name} {part / whole:.1%}", colour_of(i, is_bar=True)) for i, (name, part) in enumerate(zip(names, parts, strict=True)) if part
    ]


def _data_of(run: RunFacts) -> Section:
    """What was seen of each source so far, beside what the whole run sees."""
    from markupsafe import Markup

    key, title, found = "data", "Data seen", run.mixture
    if found is None:
        return Section(key, title)
    sources: dict[str, Any] = found["sources"]
    seen = {name: one.get("by_now", one) for name, one in sources.items()}
    bars = [Bar("so far", [one["tokens"] for one in seen.values()]), Bar("the whole run", [one["tokens"] for one in sources.values()])]
    rows = [
        [
            name,
            f"{now['tokens']:,}",
            _share(now, seen),
            f"{now['epochs']:.3g}",
            f"{one['tokens']:,}",
            _share(one, sources),
            f"{one['epochs']:.3g}",
        ]
        for (name, one), now in zip(sources.items(), seen.values(), strict=True)
    ]
    headers = ("source", "tokens so far", "share so far", "epochs so far", "tokens of the run", "share of the run", "epochs of the run")
    svg = Markup(draw_bars("Data by source", list(sources), bars, "data"))
    legend = _bar_legend(list(sources), bars[0].parts)
    unit = f"upper bar: up to step {found['step']:,}; lower bar: the whole run" if found["step"] is not None else "the whole run"
    figure = Figure("Tokens by source", unit, svg, legend, is_bar=True)
    return Section(key, title, [figure], [Table("By source", headers, rows)], lines=found["problems"])


def _share(one: dict[str, Any], all_of_them: dict[str, Any]) -> str:
    return f"{one['tokens'] / max(1, sum(other['tokens'] for other in all_of_them.values())):.1%}"


def _events(run: RunFacts) -> list[Table]:
    """Rows of findings, the newest first."""
    rows: list[list[str]] = []
    for kind in ("skip", "spike", "slow_ranks", "rollback"):
        names = [name for name in _names(run) if name.startswith(f"{kind}/")]
        if run.metrics is None or not names:
            continue
        for row in run.metrics.select(["step", *names]).to_pylist():
            values = {name.removeprefix(f"{kind}/"): row[name] for name in names if row[name] is not None}
            if values:
                rows.append(
                    [f"{row['step']:,}", kind.replace("_", " "), ", ".join(f"{key} {_plain(value)}" for key, value in values.items())]
                )
    rows.sort(key=lambda row: -int(row[0].replace(",", "")))
    note = f"The newest {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return [Table("Skipped steps, spikes, slow ranks, rollbacks", ("step", "what", "more"), rows[:MOST_ROWS], note)] if rows else []


def _attempts(run: RunFacts) -> list[Table]:
    """Each attempt and why it ended, the newest first, with what was changed in between."""
    times = {one.attempt: one for one in run.ledger.attempts} if run.ledger is not None else {}
    rows: list[list[str]] = []
    known: set[Any] = set()
    for row in run.attempts:
        if "changed" in row:
            changes = ", ".join(f"{key}: {_plain(old)} -> {_plain(new)}" for key, (old, new) in row["changed"].items())
            rows.append(["", _moment(row.get("time")), "", f"from {row.get('from_step', 0):,} on", "", f"changed: {changes}"])
            continue
        number = row.get("attempt")
        known.add(number)
        time = times.get(number) if isinstance(number, int) else None
        lasted = spell_duration(time.ended - time.began) if time is not None else ""
        steps = f"{row.get('first_step') or 0:,} to {row.get('last_step') or 0:,}"
        committed = "" if row.get("committed") is None else f"{row['committed']:,}"
        rows.append([_plain(number), _moment(row.get("started")), lasted, steps, committed, str(row.get("cause") or "")])
    for number, time in times.items():
        if number not in known:
            steps = f"{time.first_step or 0:,} to {time.last_step or 0:,}"
            rows.append(
                [_plain(number), _moment(time.began), spell_duration(time.ended - time.began), steps, "", str(time.cause or "still there")]
            )
    headers = ("attempt", "began, UTC", "lasted", "steps", "committed", "why it ended")
    note = f"The last {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return [Table("Attempts", headers, rows[::-1][:MOST_ROWS], note)] if rows else []


def _checkpoints(run: RunFacts) -> list[Table]:
    headers = ("checkpoint", "tokens", "loss", "MB", "committed, UTC", "state", "at the next save")
    rows = [
        [
            str(row.get("name")),
            _spell(row.get("tokens_seen"), "{:,}"),
            _spell(row.get("loss"), "{:.4f}"),
            _spell(row["bytes"] / 1e6 if "bytes" in row else None, "{:,.1f}"),
            _moment(row.get("time")),
            str(row.get("state", "")),
            "goes" if row.get("stays") is None else f"stays: {row['stays']}",
        ]
        for row in run.checkpoints
    ]
    note = f"The newest {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return [Table("Checkpoints", headers, rows[:MOST_ROWS], note)] if rows else []


def _written(samples: Sequence[dict[str, Any]]) -> list[Written]:
    """The texts of each prompt, the newest first; of many, some evenly chosen."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        by_prompt.setdefault(str(row.get("prompt")), []).append(row)
    found: list[Written] = []
    for prompt, rows in list(by_prompt.items())[:MOST_PROMPTS]:
        chosen = [rows[i] for i in sorted({*np.linspace(0, len(rows) - 1, min(MOST_SAMPLES, len(rows))).round().astype(int)}, reverse=True)]
        texts = [
            (f"step {row.get('step', 0):,}, {spell_count(row.get('tokens_seen', 0))} tokens", str(row.get("text", ""))[:MOST_LETTERS])
            for row in chosen
        ]
        found.append(Written(prompt[:MOST_LETTERS], texts))
    return found


def _configuration(run: RunFacts) -> list[Text]:
    return [Text("run.yaml", run.configuration_text)] if run.configuration_text else []


def _environment(run: RunFacts) -> list[Table]:
    rows = [[key, _plain(value)] for key, value in flatten(run.environment).items()]
    return [Table("Environment", ("what", "found"), rows)] if rows else []


# --- several runs -------------------------------------------------------------------------------------------


def _sections_of_several(runs: Sequence[RunFacts]) -> list[Section]:
    draw = _Drawing(runs)
    return [
        Section("summary", "Summary", tables=[_summary(runs)]),
        Section("curves", "Curves", figures=draw.several(_COMPARED)),
        _times_of(runs),
        Section("configuration", "Configuration keys that differ", tables=_differences(runs), lines=_same(runs)),
        Section("missing", "What is not there", lines=[f"{run.name}: {line}" for run in runs for line in run.missing]),
    ]


def _summary(runs: Sequence[RunFacts]) -> Table:
    tiles = [_tiles(run) for run in runs]
    headers = ["run", *(what for what, _, _ in tiles[0])]
    return Table("Summary", headers, [[run.name, *(value for _, value, _ in row)] for run, row in zip(runs, tiles, strict=True)])


def _times_of(runs: Sequence[RunFacts]) -> Section:
    """A bar for each run that has a ledger."""
    from markupsafe import Markup

    there = [(run, run.ledger) for run in runs if run.ledger is not None and run.ledger.wall_seconds]
    if not there:
        return Section("time", "Where the time went")
    keys = list(dict.fromkeys(key for _, ledger in there for key in ledger.parts))
    names = [PARTS.get(key, key) for key in keys]
    bars = [Bar(run.name, [ledger.parts.get(key, 0.0) for key in keys]) for run, ledger in there]
    rows = [[bar.name, *(f"{part:,.1f}" for part in bar.parts)] for bar in bars]
    legend = [(name, colour_of(i, is_bar=True)) for i, name in enumerate(names) if any(bar.parts[i] for bar in bars)]
    unit = f"each as long as the others; downwards: {', '.join(bar.name for bar in bars)}"
    svg = Markup(draw_bars("Where each run's time went", names, bars, "ledger"))
    return Section("time", "Where the time went", [Figure("Each run", unit, svg, legend, "", ("run, seconds", *names), rows, is_bar=True)])


def _differences(runs: Sequence[RunFacts]) -> list[Table]:
    """Keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.configuration)
    rows: list[list[str]] = []
    for key in keys:
        values = [_plain(run.configuration[key]) if key in run.configuration else "(not there)" for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return [Table("Keys that differ", ("key", *(run.name for run in runs)), rows)] if rows else []


def _same(runs: Sequence[RunFacts]) -> list[str]:
    return [] if _differences(runs) or not any(run.configuration for run in runs) else ["None: all runs have the same configuration."]


# --- values of a run ----------------------------------------------------------------------------------------


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; lists stay."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _names(run: RunFacts) -> list[str]:
    return [] if run.metrics is None else list(run.metrics.column_names)


def _column(run: RunFacts, name: str) -> FloatArray | None:
    """A column's values, NaN where a step has none; None where no step has, or where it holds no numbers."""
    import pyarrow

    if run.metrics is None or name not in run.metrics.column_names:
        return None
    column = run.metrics.column(name)
    if column.null_count == len(column):
        return None
    try:
        return column.cast(pyarrow.float64(), safe=False).to_numpy()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return None


def _finite(run: RunFacts, name: str) -> FloatArray:
    values = _column(run, name)
    return np.array([]) if values is None else values[np.isfinite(values)]


def _last(run: RunFacts, name: str) -> float | None:
    values = _finite(run, name)
    return float(values[-1]) if len(values) else None


def _recent(run: RunFacts, name: str) -> float | None:
    values = _finite(run, name)[-20:]
    return float(np.median(values)) if len(values) else None


def _beginnings(run: RunFacts, tokens: FloatArray) -> list[tuple[float, str]]:
    """Where each attempt but the first begins, by the first row it left."""
    attempts = _column(run, "attempt")
    if attempts is None:
        return []
    there = np.isfinite(attempts) & np.isfinite(tokens)
    attempts, tokens = attempts[there], tokens[there]
    changes = np.flatnonzero(np.diff(attempts)) + 1
    return [(float(tokens[i]), f"attempt {attempts[i]:.0f} begins") for i in changes]


def _spell_marks(marks: Sequence[tuple[float, str]]) -> str:
    if not marks:
        return ""
    names = [text.split()[1] for _, text in marks]
    which = f"attempt {names[0]} begins" if len(names) == 1 else f"attempts {names[0]} to {names[-1]} begin"
    return f"Dashed lines, here and below: {which}."


def _steps(run: RunFacts, tokens: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    steps = _column(run, "step")
    if steps is None:
        return None
    there = np.isfinite(steps) & np.isfinite(tokens)
    return (tokens[there], steps[there]) if there.any() else None


def _spell(value: Any, form: str) -> str:
    """Nothing for what is not there, or is no number."""
    return form.format(value) if isinstance(value, (int, float)) and math.isfinite(value) else ""


def _plain(value: Any) -> str:
    """A value in a table: text as it is, numbers short, all else as JSON."""
    if isinstance(value, str):
        return value
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)


def _moment(value: Any) -> str:
    """Unix seconds, or a time in ISO's form, to the second."""
    if isinstance(value, (int, float)):
        return f"{datetime.fromtimestamp(value, timezone.utc):%Y-%m-%d %H:%M:%S}"
    return str(value or "").replace("T", " ").removesuffix("+00:00")
