"""What `data build` prints is what is so: speeds, lines, tables; and how it ends."""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.manifest import load_manifest
from data_pipeline.stages import Progress
from pretrain import cli
from pretrain.build import LineReport, SpeedMeter, describe_speed
from pretrain.build import build_with_progress as build_and_tell
from tests.pretrain.verbs import Run

WHAT_COMES_OUT = """\
source  read  kept  dropped  quarantined     MB  tokens
notes      4     4        0            0  0.003  {notes}
rows      10     7        2            1  0.000  {rows}
all       14    11        2            1  0.003  {total}

reason         documents  became       examples, below shards
too_short              2  dropped      dropped/too_short.jsonl
not_an_object          1  quarantined  units/*/quarantine.jsonl
"""


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def reports(clock: Clock, meter: Callable[[Progress], Any], steps: list[tuple[float, Progress]]) -> Iterator[Any]:
    for clock.now, progress in steps:
        yield meter(progress)


# --- speeds -------------------------------------------------------------------------------------------------


def test_speeds_count_what_this_start_made_behind_what_was_there() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    steps = [
        (0, Progress("plan", 3, 3, "")),
        (10, Progress("tokens", 0, 10, "")),
        (20, Progress("tokens", 4, 10, "4 were there")),
        (25, Progress("tokens", 5, 10, "4 were there", 50, 1_000, 250)),
        (40, Progress("tokens", 6, 10, "4 were there", 100, 2_000, 500)),
        (41, Progress("tokens", 0, 1, "")),
        (43, Progress("tokens", 1, 1, "", 4, 8, 16)),
    ]
    speeds = list(reports(clock, meter.measure, steps))
    assert [(speed.documents, speed.num_bytes, speed.tokens) for speed in speeds] == [
        (0, 0, 0), (0, 0, 0), (0, 0, 0), (10, 200, 50), (5, 100, 25), (0, 0, 0), (2, 4, 8)
    ]  # fmt: skip
    assert [speed.seconds_left for speed in speeds] == [None, None, None, 25, 40, None, 0]


def test_a_stage_without_a_first_report_is_timed_from_the_one_before() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    steps = [
        (4, Progress("survey", 4, 4, "", 1, 1)),
        (6, Progress("duplicates", 1, 4, "exact duplicates")),
        (8, Progress("duplicates", 4, 4, "exact duplicates")),
        (12, Progress("duplicates", 1, 3, "merging surveys")),
    ]
    assert [speed.seconds_left for speed in reports(clock, meter.measure, steps)][1:] == [6, 0, 8]


def test_figures_are_those_there_are() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    steps = [
        (0, Progress("plan", 1, 1, "3 files in 2 work units")),
        (0, Progress("tokens", 0, 9, "starting the workers")),
        (10, Progress("tokens", 3, 9, "", 12_340, 56_000_000, 14_000_000)),
        (3000, Progress("tokens", 4, 9, "1 were there", 24, 9_000, 3)),
        (40000, Progress("tokens", 6, 7, "", 40_000, 1, 0)),
    ]
    assert [describe_speed(progress, meter.measure(progress)) for clock.now, progress in steps] == [
        "3 files in 2 work units",
        "(starting the workers)",
        "1,234 documents/s, 5.6 MB/s, 1,400,000 tokens/s, 20 s left",
        "0.008 documents/s, <0.001 MB/s, 0.001 tokens/s, 62 min left (1 were there)",
        "1 documents/s, <0.001 MB/s, 1 h 51 min left",
    ]


def test_without_a_terminal_a_line_where_a_stage_starts_and_ends_and_one_every_30_seconds() -> None:
    clock, said = Clock(), list[str]()
    report = LineReport(said.append, clock)
    steps: list[tuple[float, Progress]] = [(0, Progress("plan", 5, 5, "5 files in 100 work units"))]
    steps += [(float(done), Progress("tokens", done, 100, "", 10 * done, done * 1_000_000, done * 100)) for done in range(101)]
    steps += [(101, Progress("manifest", 0, 1, "writing the manifest")), (102, Progress("manifest", 1, 1, "7 tokens to train on"))]
    list(reports(clock, report, steps))
    report.end_stage()
    assert said == [
        "plan: 5 files in 100 work units",
        "tokens: 0 of 100 work units",
        "tokens: 30 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s, 70 s left",
        "tokens: 60 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s, 40 s left",
        "tokens: 90 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s, 10 s left",
        "tokens: done in 2 min, 100 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s",
        "manifest: writing the manifest",
        "manifest: done in 1 s, 7 tokens to train on",
    ]


def test_a_stage_of_several_rounds_ends_once_with_the_time_of_all() -> None:
    """Also where it starts behind its first piece of work, and where all was there; what is done in one report is not told twice."""
    clock, said = Clock(), list[str]()
    report = LineReport(said.append, clock)
    steps: list[tuple[float, Progress]] = [
        (0, Progress("plan", 5, 5, "5 files in 4 work units")),
        (1, Progress("survey", 0, 4, "starting the workers")),
        *((2, Progress("survey", done, 4, f"{done} were there")) for done in range(1, 5)),
        (5, Progress("duplicates", 1, 2, "exact duplicates")),
        (6, Progress("duplicates", 2, 2, "exact duplicates")),
        (9, Progress("duplicates", 1, 3, "near duplicates")),
        (11, Progress("duplicates", 3, 3, "near duplicates")),
    ]
    list(reports(clock, report, steps))
    report.end_stage()
    assert said == [
        "plan: 5 files in 4 work units",
        "survey: 0 of 4 work units (starting the workers)",
        "survey: done in 1 s, 4 of 4 work units (4 were there)",
        "duplicates: 1 of 2 tasks 3 s left (exact duplicates)",
        "duplicates: 1 of 3 tasks 6 s left (near duplicates)",
        "duplicates: done in 9 s, 3 of 3 tasks (near duplicates)",
    ]


# --- data build ---------------------------------------------------------------------------------------------


def test_a_build_tells_what_came_out(place: Path, run: Run) -> None:
    said = run("build", "run.yaml").err
    manifest = load_manifest(place / "shards")
    tokens = {
        name: sum(shard.sources[name].num_tokens for split in manifest.splits.values() for shard in split if name in shard.sources)
        for name in ("notes", "rows")
    }
    shown = {name: f"{count:>6,}" for name, count in {**tokens, "total": sum(tokens.values())}.items()}
    assert WHAT_COMES_OUT.format(**shown) in said
    assert (place / "shards" / "dropped" / "too_short.jsonl").read_text().count("\n") == 2
    assert re.search(r"^tokens +\d +0 +\d+\.\d +[\d.]+ +[\d.e-]+ +[\d,]+ +[\d,]+$", said, re.MULTILINE), said
    total = manifest.total("train") + manifest.total("held_out")
    assert f"shards: 11 documents, {total.num_bytes:,} bytes, {total.num_tokens:,} tokens (" in said.splitlines()[-1]
    for stage, counted in (("tokenizer", r"(\d+) of \1 work units"), ("tokens", r"(\d+) of \1 work units"), ("manifest", r"\d+ tokens")):
        assert len(re.findall(rf"^{stage}: done in \d+ s, {counted} ", said, re.MULTILINE)) == 1, said
    again = run("build", "run.yaml").err
    assert "shards is built from this input already: nothing to do." in again
    assert WHAT_COMES_OUT.splitlines()[6] in again and "documents/s" not in again


def test_an_unchanged_dataset_is_judged_by_what_is_said(place: Path, run: Run) -> None:
    """Names, sizes and times: bytes that changed behind them are not seen, and `data verify` finds those of the shards."""
    run("build", "run.yaml")
    for path in (place / "notes" / "0.txt", next((place / "shards" / "units").glob("*/*.bin"))):
        status, content = path.stat(), path.read_bytes()
        path.write_bytes(content[:-2] + b"!" + content[-1:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (
        "shards is built from this input already: nothing to do. Judged by the names, sizes and times of the input files and by the sizes "
        "of the shards: their bytes were not read (but those of an input file that has another time); `pretrain data verify shards` "
        "reads every byte of the shards.\n"
    ) in run("build", "run.yaml").err
    assert run("verify", "shards").status == 2
    (place / "notes" / "0.txt").touch()
    with pytest.raises(cli.UserError, match=r"notes:0\.txt: has other content"):
        run("build", "run.yaml")


def test_a_stage_is_one_row_where_a_unit_is_made_again(run: Run) -> None:
    said = run("build", "run.yaml", "data.held_out_fraction=1e-9").err
    assert len(re.findall(r"^tokens +\d+ +0 ", said, re.MULTILINE)) == 1, said
    assert len(re.findall(r"^tokens: ", said, re.MULTILINE)) == 2, said


def test_rebuild_makes_anew_what_differs_or_is_damaged(place: Path, run: Run) -> None:
    run("build", "run.yaml")
    before = (place / "shards" / "manifest.json").read_bytes()
    damaged = next((place / "shards" / "units").glob("*/*.bin"))
    damaged.write_bytes(b"")
    said = run("build", "run.yaml", "--rebuild").err
    num_units = len(list((place / "shards" / "units").iterdir()))
    assert f"{num_units - 1} of {num_units} work units were there from an earlier start." in said
    assert (place / "shards" / "manifest.json").read_bytes() == before
    assert run("verify", "shards").status == 0
    with pytest.raises(cli.UserError, match=r"data\.seed: was 1234, is 5"):
        run("build", "run.yaml", "data.seed=5")
    assert run("build", "run.yaml", "data.seed=5", "--rebuild").status == 0


def test_an_interrupted_build_says_that_the_same_command_continues(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(LineReport):
        def __call__(self, progress: Progress) -> None:
            super().__call__(progress)
            if progress.stage == "tokens" and progress.done == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.build.LineReport", Interrupting)
        done = run("build", "run.yaml")
    assert done.status == 75
    assert done.err.splitlines()[-1] == (
        "interrupted; the finished units in shards are kept, and the same command goes on where this one was"
    )
    assert "Traceback" not in done.err and not (place / "shards" / "manifest.json").exists()
    assert "2 of " in run("build", "run.yaml").err


def test_bars_and_tables_in_a_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from configs.loader import load_config

    screen, said = StringIO(), list[str]()
    console = partial(Console, file=screen, force_terminal=True, width=140, color_system=None)
    monkeypatch.setattr("pretrain.build.Console", lambda stderr: console())
    build_and_tell(load_config(place / "run.yaml").data, said.append)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for stage in ("plan", "tokenizer", "tokens", "manifest"):
        assert re.search(rf"[\r\n]{stage} +━+ (\d+)/\1 ", shown, re.MULTILINE), shown
    assert re.search(r"^ ?all +14 +11 +2 +1 ", shown, re.MULTILINE)
    assert re.search(r"^ ?too_short +2 +dropped +dropped/too_short\.jsonl", shown, re.MULTILINE)
    assert not any("plan" in line or "too_short" in line for line in said)
    assert "11 documents" in said[-1]


@pytest.mark.parametrize("verb", ["build", "show", "sample", "diff", "rules", "verify"])
def test_every_verb_has_a_worked_example(run: Run, verb: str) -> None:
    assert f"Example: pretrain data {verb}" in run(verb, "--help").out
