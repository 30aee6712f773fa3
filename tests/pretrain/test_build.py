"""What the `data` verbs print is what is so: speeds, lines, tables, marks; and how they end."""

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline import build as conductor
from data_pipeline.execution import open_here
from data_pipeline.manifest import load_manifest
from data_pipeline.stages import Progress
from pretrain import cli
from pretrain.build import LineReport, Page, SpeedMeter, describe_speed, make_visible, tell_document
from pretrain.build import build_with_progress as build_and_tell

RUN_FILE = """
data:
  root: shards
  sources:
  - {name: notes, path: notes}
  - {name: rows, path: rows, id_field: url, metadata_fields: [lang]}
  clean: [{rule: "shown_rules:drop_short", settings: {words: 4}}]
  tokenizer: {vocabulary_size: 300}
  held_out_fraction: 0.2
  work_unit_bytes: 1500
  quarantine_limit: 0.2
model: {vocabulary_size: 320}
"""
RULES = """
def drop_short(document, *, words):
    return document if len(document.text.split()) >= words else "too_short"
"""
WHAT_COMES_OUT = """\
source  read  kept  dropped  quarantined     MB  tokens
notes      4     4        0            0  0.003  {notes}
rows      10     7        2            1  0.000  {rows}
all       14    11        2            1  0.003  {total}

reason         documents  became       examples, below shards
too_short              2  dropped      dropped/too_short.jsonl
not_an_object          1  quarantined  units/*/quarantine.jsonl
"""


class Result:
    """What a verb printed and how it ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Run = Callable[..., Result]


@pytest.fixture(name="place")
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run file, its sources and a rule. Builds are done in this process and do not wait for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(conductor, "build_dataset", partial(conductor.build_dataset, engine=open_here))
    (tmp_path / "shown_rules.py").write_text(RULES)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "notes").mkdir()
    (tmp_path / "rows").mkdir()
    for number in range(4):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"note {number} on what is so\n" * 30)
    rows = [json.dumps({"text": f"a row with number {number}", "url": f"http://x/{number}", "lang": "en"}) for number in range(7)]
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join([*rows, '{"text": "one"}', '{"text": "two"}', "[1]"]) + "\n")
    return tmp_path


@pytest.fixture(name="run")
def _run(place: Path) -> Run:
    """Run a verb of `pretrain data`; an error of ours is raised."""

    def run(*arguments: object) -> Result:
        done = CliRunner().invoke(cli.app, ["data", *map(str, arguments)], prog_name="pretrain")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)

    return run


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def reports(clock: Clock, meter: Callable[[Progress], Any], steps: list[tuple[float, Progress]]) -> Iterator[Any]:
    for clock.now, progress in steps:
        yield meter(progress)


# --- speeds ------------------------------------------------------------------------------------------------


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


def test_without_a_terminal_a_line_per_stage_and_one_every_30_seconds() -> None:
    clock, said = Clock(), list[str]()
    report = LineReport(said.append, clock)
    steps: list[tuple[float, Progress]] = [(0, Progress("plan", 5, 5, "5 files in 100 work units"))]
    steps += [(float(done), Progress("tokens", done, 100, "", 10 * done, done * 1_000_000, done * 100)) for done in range(101)]
    steps += [(101, Progress("manifest", 0, 1, "writing the manifest")), (102, Progress("manifest", 1, 1, "7 tokens to train on"))]
    list(reports(clock, report, steps))
    assert said == [
        "plan: 5 files in 100 work units",
        "tokens: 0 of 100 work units",
        "tokens: 30 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s, 70 s left",
        "tokens: 60 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s, 40 s left",
        "tokens: 90 of 100 work units 10 documents/s, 1 MB/s, 100 tokens/s, 10 s left",
        "manifest: writing the manifest",
    ]


# --- data build --------------------------------------------------------------------------------------------


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
    assert re.search(r"^tokens +\d +0 +\d+\.\d +[\d.]+ +[\d.e-]+ +[\d,]+ +\d+$", said, re.MULTILINE), said
    total = manifest.total("train") + manifest.total("held_out")
    assert f"shards: 11 documents, {total.num_bytes:,} bytes, {total.num_tokens:,} tokens (" in said.splitlines()[-1]
    again = run("build", "run.yaml").err
    assert "shards is built from this input already: nothing to do." in again
    assert WHAT_COMES_OUT.splitlines()[6] in again and "documents/s" not in again


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


# --- show, sample, diff, rules, verify ---------------------------------------------------------------------


def test_show_prints_what_json_says(run: Run) -> None:
    run("build", "run.yaml")
    found = json.loads(run("show", "run.yaml", "--json").out)
    shown = run("show", "run.yaml").out
    assert found["documents"] == {"read": 14, "kept": 11, "dropped": {"too_short": 2}, "quarantined": {"not_an_object": 1}}
    assert shown.startswith(f"shards, format 2, manifest {found['sha256'][:16]}\n")
    assert "rules      1. shown_rules:drop_short(words=4) [source " in shown
    for name, share in found["mixture"].items():
        assert re.search(rf"^{name} .* {100 * share:.2f}$", shown, re.MULTILINE)
    train = found["splits"]["train"]
    assert re.search(rf"^train +{train['num_shards']} +{train['num_documents']} .* {train['bytes_per_token']}$", shown, re.MULTILINE)
    assert "too_short              2  dropped      dropped/too_short.jsonl" in shown
    assert "a row with number" in shown and "on what is so␊\n" in shown


def test_a_sample_marks_tokens_and_names_the_document(run: Run) -> None:
    run("build", "run.yaml")
    arguments = ("sample", "shards", "--source", "rows", "--count", "2", "--seed", "3")
    found = json.loads(run(*arguments, "--json").out)
    shown = run(*arguments).out
    assert shown == run(*arguments).out and len(found) == 2
    for document, text in zip(found, shown.split("\n\n"), strict=True):
        lines = text.strip("\n").splitlines()
        assert lines[:5] == [
            f"document  {document['document_id']}, number {document['number']} of {document['shard']} (train)",
            f"source    rows, file a.jsonl, position {document['position']}",
            f"name      {document['name']}",
            'metadata  {"lang": "en"}',
            f"tokens    {document['num_tokens']} for {document['num_bytes']} bytes of text",
        ]
        assert lines[5:] == ["|".join(document["pieces"])] and document["pieces"][-1] == "<|endoftext|>"
        one = ("sample", "shards", "--document", document["document_id"])
        assert run(*one).out == text.strip("\n") + "\n"
        cut = run(*one, "--tokens", 3).out.splitlines()[-1]
        assert cut == "|".join(document["pieces"][:3]) + f"| ... {document['num_tokens'] - 4} more tokens ... |<|endoftext|>"
    with pytest.raises(cli.UserError, match="it has: notes, rows"):
        run("sample", "shards", "--source", "other")


def test_a_new_line_is_seen_and_made(run: Run) -> None:
    run("build", "run.yaml")
    shown = run("sample", "shards", "--source", "notes", "--count", "1", "--tokens", "1000").out
    assert shown.count("␊\n") == 30 and shown.endswith("<|endoftext|>\n")


def test_in_a_terminal_tokens_are_told_apart_by_their_backgrounds(place: Path, run: Run) -> None:
    from data_pipeline.show import sample_documents

    run("build", "run.yaml")
    document = sample_documents(place / "shards", "rows", "train", 1, 0, 1000)[0]
    screen, said = StringIO(), list[str]()
    tell_document(document, Page(Console(file=screen, force_terminal=True, color_system="256", width=40), said.append))
    backgrounds = re.findall(r"\x1b\[(?:1;37|30);48;5;(\d+)m([^\x1b]*)", screen.getvalue())
    assert [piece for _, piece in backgrounds] == document.pieces
    assert {colour for colour, _ in backgrounds[:-1:2]} == {"152"} and {colour for colour, _ in backgrounds[1:-1:2]} == {"223"}
    assert backgrounds[-1] == ("88", "<|endoftext|>")


def test_what_is_printed_obeys_no_text() -> None:
    text = "a\x1b[31m\r\n\t\x00\x9b\u202e\u2028\ufeff\ud800 é東🦊\xa0"
    assert make_visible(text) == "a␛[31m␍␊␉␀\\x9b\\u202e\\u2028\\ufeff\\ud800 é東🦊\xa0"


def test_diff_ends_as_diff_does(place: Path, run: Run) -> None:
    run("build", "run.yaml")
    run("build", "run.yaml", "data.root=same")
    same = run("diff", "run.yaml", "same")
    assert same.status == 0 and "equal: their manifests are the same byte for byte" in same.out
    (place / "notes" / "0.txt").unlink()
    (place / "notes" / "9.txt").write_text("another note than before\n" * 30)
    run("build", "run.yaml", "data.root=other", "data.seed=5", "data.clean=[]", "data.tokenizer.path=shards/tokenizer.json")
    other = run("diff", "shards", "other")
    assert other.status == 1
    for line in (
        r"seed +1234 +5",
        r"rules      only in A: shown_rules:drop_short\(words=4\) \[source \w{16}\]",
        r"inputs     4 equal, 1 only in A, 1 only in B, 0 changed, 0 of equal size, cut into other parts",
        r"           only in A: notes:0\.txt",
        r"           only in B: notes:9\.txt",
        r"rows kept +7 +9",
        r"too_short +2 +0",
        r"documents  10 in both by id \(0 of them .* 0 in the other split\), 1 only in A, 3 only in B",
    ):
        assert re.search(rf"^{line}$", other.out, re.MULTILINE), (line, other.out)
    as_json = run("diff", "shards", "other", "--json")
    assert as_json.status == 1 and json.loads(as_json.out)["documents"]["only_in_b"] == 3


def test_rules_are_listed_with_settings_and_what_they_do(run: Run) -> None:
    rules = json.loads(run("rules", "--json").out)
    shown = run("rules").out
    assert len(rules) > 3 and len([line for line in shown.splitlines() if not line.startswith(" ")]) == len(rules)
    for signature, description in rules.items():
        assert re.fullmatch(r"\w+\(.*\)", signature) and description.endswith(".")
        assert " ".join(description.split()) in " ".join(shown.split())


def test_verify_finds_a_flipped_bit_in_every_kind_of_file(place: Path, run: Run, seed: int) -> None:
    run("build", "run.yaml")
    assert "every byte is as it was written" in run("verify", "shards").out
    shard = load_manifest(place / "shards").shards("train")[0]
    for name in ("tokenizer.json", *shard.files):
        path = place / "shards" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = run("verify", "shards")
        assert done.status == 2 and f"{name}: its SHA-256 differs" in done.out, name
        assert "`pretrain data build RUN.yaml --rebuild` keeps what is whole" in done.out
        path.write_bytes(whole)
    manifest = place / "shards" / "manifest.json"
    whole = manifest.read_bytes()
    chosen = random.Random(seed)
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        manifest.write_bytes(flipped)
        done = run("verify", "shards", "--json")
        assert done.status == 2 and len(json.loads(done.out)["problems"]) == 1
    manifest.unlink()
    with pytest.raises(cli.UserError, match="this dataset is unfinished"):
        run("verify", "shards")


@pytest.mark.parametrize("verb", ["build", "show", "sample", "diff", "rules", "verify"])
def test_every_verb_has_a_worked_example(run: Run, verb: str) -> None:
    assert f"Example: pretrain data {verb}" in run(verb, "--help").out
