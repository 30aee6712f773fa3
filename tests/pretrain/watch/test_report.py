"""The page of a run: all that is told, nothing of it markup, whatever is missing; spikes stay; curves are thinned; several compared."""

import json
import math
import os
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from pretrain.report_view import gather
from pretrain.run.folder import RunFolder
from pretrain.watch.plots import HEIGHT, MOST_POINTS, Bar, Plot, draw_bars, draw_curves, make_curve, read_off, thin
from pretrain.watch.report import RunFacts, make_page
from tests.pretrain.verbs import call
from tests.pretrain.watch.run_folders import TOKENS_PER_STEP, write_lines, write_run_folder

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m & \"'"


FEW = ("loss", "tokens_per_second")


class Reader(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value is not None]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(*folders: Path) -> str:
    return make_page(gather([RunFolder(folder) for folder in folders], folders[0] / "reports"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_folder(tmp_path_factory.mktemp("runs") / "finished", num_steps=400)


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return page_of(finished)


# --- what it tells ------------------------------------------------------------------------------------------


def test_a_run_is_told_whole(page: str) -> None:
    read = Reader(page)
    titles = "Learning Speed Memory / Where the time went / Gradients and weights / Events Attempts Checkpoints / What it writes / Profiles"
    for title in [part for line in titles.split(" / ") for part in ([line] if " " in line and line[0] in "WG" else line.split())]:
        assert title in read.words
    for plot in (
        *("Loss", "Held out, by source", "Tasks", "Learning rate", "Throughput", "Utilisation", "Where a step's time goes"),
        *(
            "The slowest rank",
            "Memory of a device",
            "Memory of the host",
            "Gradient norm",
            "Parameter norm",
            "Norms of gradients, by layer",
        ),
    ):
        assert f"Numbers: {plot}" in read.words
    assert read.count("svg") == read.count("figure") >= 16
    assert "400 of 400 (100%)" in read.words
    assert "rank 1 was killed by SIGKILL" in read.words
    assert "attempts 2 to 3 begin" in read.words
    assert "text at 400 in two lines." in read.words
    assert "aten::mm" in read.words
    assert ("a", {"href": "../profile/attempt-1/steps-10-13/rank-0.json.gz"}) in read.tags
    assert "spike" in read.words
    assert "8 of 12 layers" in read.words


def test_the_numbers_are_those_of_the_run(finished: Path, page: str) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    words = Reader(page).words
    assert f"loss {last['loss']:.4f} nats per token" in words
    held_out = [row for row in rows if "held_out/bits_per_byte" in row][-1]["held_out/bits_per_byte"]
    assert f"held out {held_out:.4f} bits per byte" in words
    # The table behind the loss ends with the last step's.
    table = page[page.index('aria-label="Numbers: Loss"') :].split("</table>")[0]
    cells = re.findall(r"<td>(.*?)</td>", table)[-4:]
    assert cells[:3] == [f"{400 * TOKENS_PER_STEP:,}", "400", f"{last['loss']:.4f}"]


def test_it_needs_nothing_from_elsewhere(page: str) -> None:
    read = Reader(page)
    assert not read.count("script")
    assert not read.count("link") - 1  # the empty icon
    for _, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        for name in ("href", "xlink:href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "../profile/")) or address == "data:,"
    assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", page)
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert len(page.encode()) < 1_000_000


def test_every_name_in_it_is_there_once(page: str) -> None:
    ids = Reader(page).ids
    assert len(ids) == len(set(ids))
    assert not [name for name in re.findall(r'(?:href="#|url\(#)([^")]+)', page) if name not in ids]


# --- text of a run is text ----------------------------------------------------------------------------------


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    folder = write_run_folder(
        tmp_path / "<script>alert(3)</script>".replace("/", ""), num_steps=100, sources=(HOSTILE.replace("/", "|"), "b")
    )
    rows = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    rows[0]["cause"] = HOSTILE
    write_lines(folder / "attempts.jsonl", [*rows, {"changed": {HOSTILE: [HOSTILE, HOSTILE]}, "from_step": 3, "time": HOSTILE}])
    write_lines(
        folder / "samples.jsonl", [{"step": 5, "tokens_seen": 5, "attempt": 1, "prompt": HOSTILE, "text": HOSTILE + "\ud800\u202e"}]
    )
    (folder / "environment.json").write_text(json.dumps({HOSTILE: {"b": HOSTILE}}))
    (folder / "profile" / "attempt-1" / "steps-10-13" / "rank-0.md").write_text(HOSTILE)
    (folder / "profile" / "attempt-1" / "steps-10-13" / '"><script>.json').write_text("")
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text() + f"watch: {{wandb_tags: [{json.dumps('<script>' + chr(7))}]}}\n")
    one, two = page_of(folder), page_of(folder, write_run_folder(tmp_path / "b<b>", num_steps=60))
    for page in (one, two):
        read = Reader(page)
        assert not read.count("script") + read.count("img") + read.count("b") - page.count('<pre class="sample"><b>')
        assert not [attributes for _, attributes in read.tags if "onerror" in attributes]
        assert "\x1b" not in page
        page.encode()
    words = Reader(one).words
    assert HOSTILE.replace("\x1b", "␛") + "\\ud800\\u202e" in words
    assert words.count("<script>alert(1)</script>") >= 8
    assert "<script>alert(3)<script>" in words


def test_secrets_do_not_reach_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cret<&>value-of-mine"
    monkeypatch.setenv("MY_API_KEY", secret)
    folder = write_run_folder(tmp_path / f"run-{secret}", num_steps=60, sources=(f"of-{secret}", "b"))
    rows = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    write_lines(folder / "attempts.jsonl", [row | {"cause": f"no answer with {secret}"} for row in rows])
    write_lines(folder / "samples.jsonl", [{"step": 5, "tokens_seen": 5, "attempt": 1, "prompt": secret, "text": f"a {secret}"}])
    page = page_of(folder)
    assert secret not in "".join(Reader(page).text)
    assert "s3cret" not in page
    assert "no answer with [MY_API_KEY]" in page


# --- what is not there --------------------------------------------------------------------------------------


FILES = ("metrics.jsonl", "timeline.jsonl", "attempts.jsonl", "environment.json", "samples.jsonl", "profile")
SAID = (
    "no step was logged",
    "no timeline.jsonl",
    "No attempt has ended",
    "environment.json cannot be read",
    "evaluate.prompts",
    "profile.steps",
)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", num_steps=60)
    before = gather([RunFolder(folder)], None)[0].missing
    for name, sentence in zip(FILES, SAID, strict=True):
        (folder / name).rename(tmp_path / name)
        missing = gather([RunFolder(folder)], None)[0].missing
        assert [line for line in missing if line not in before and sentence in line], (name, missing)
        (tmp_path / name).rename(folder / name)
    for name in FILES:
        (folder / name).rename(tmp_path / name)
    words = Reader(page_of(folder)).words
    assert all(sentence in words for sentence in SAID)
    assert "Numbers" not in words


def test_files_that_were_cut_or_damaged_give_a_page(tmp_path: Path, seed: int) -> None:
    folder, chosen = write_run_folder(tmp_path / "run", num_steps=60, only=FEW), random.Random(seed)
    for name in FILES[:-1]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: chosen.randrange(len(content) // 2, len(content))] + b'{"step": \xff')
    words = Reader(page_of(folder)).words
    assert "environment.json cannot be read" in words
    assert "Numbers: Loss" in words


def test_a_run_whose_configuration_is_of_another_version_gives_a_page(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", num_steps=60, only=FEW)
    (folder / "run.yaml").write_text("no_such_section: {key: 3}\n")
    words = Reader(page_of(folder)).words
    assert "The configuration cannot be read" in words
    assert "no_such_section" in words
    assert "60 not recorded" not in words
    assert "step 60" in words


def test_rows_of_other_kinds_and_values_do_no_harm(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", num_steps=60, only=FEW)
    odd = [
        {"step": 61, "tokens_seen": 61 * TOKENS_PER_STEP, "attempt": 3, "loss": None, "gradient_norm": None, "new/kind": {"a": 1}},
        {"step": 62, "tokens_seen": 62 * TOKENS_PER_STEP, "attempt": 3, "loss": 1e300, "learning_rate": "text", "task/x/y": [1]},
        {"step": 63, "tokens_seen": None, "attempt": None, "skip/rank": 0},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in odd)
    assert "Numbers: Loss" in page_of(folder)


# --- several ------------------------------------------------------------------------------------------------


def test_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [write_run_folder(tmp_path / name, num_steps=100 + 10 * seed, seed=seed) for seed, name in enumerate(("a", "b", "c"), 1)]
    page = page_of(*folders)
    read = Reader(page)
    keys = page[page.index("Keys that differ") :]
    assert set(re.findall(r'<td data-header="key">(.*?)</td>', keys)) == {
        *("training.total_tokens", "optimizer.peak_lr", "schedule.warmup_tokens", "schedule.decay_tokens", "data.root", "run.name")
    }
    assert "0.002" in keys
    for plot in ("Loss", "Held out", "Throughput", "MFU", "Memory of a device", "Gradient norm"):
        assert f"Numbers: {plot}" in read.words
    summary = page[page.index('<section id="summary"') :].split("</section>")[0]
    assert re.findall(r'<td data-header="run">(.*?)</td>', summary) == ["a", "b", "c"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run_folder(tmp_path / parent / "same", num_steps=60) for parent in ("x", "y")]
    assert [run.name for run in gather(list(map(RunFolder, folders)), None)] == ["x/same", "y/same"]


# --- curves -------------------------------------------------------------------------------------------------


@given(num_points=st.integers(1, 30_000), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_extremes_ends_and_order(num_points: int, seed: int) -> None:
    chosen = np.random.default_rng(seed)
    x, y = np.sort(chosen.uniform(0, 1e12, num_points)), chosen.standard_cauchy(num_points)
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == len(thin_y) <= MOST_POINTS
    assert (thin_x[0], thin_x[-1], thin_y[0], thin_y[-1]) == (x[0], x[-1], y[0], y[-1])
    assert thin_y.min() == y.min()
    assert thin_y.max() == y.max()
    assert (np.diff(thin_x) >= 0).all()
    assert set(zip(thin_x, thin_y, strict=True)) <= set(zip(x, y, strict=True))
    # Each local extreme of a bucket is there: no value between two kept points goes beyond what the picture shows of that place.
    if num_points > MOST_POINTS:
        width = -(-num_points // ((MOST_POINTS - 2) // 2))
        place = int(chosen.integers(0, num_points - width))
        kept = (thin_x >= x[max(0, place - width)]) & (thin_x <= x[min(num_points - 1, place + 2 * width)])
        assert thin_y[kept].max() >= y[place : place + width].max()


def test_a_spike_of_one_step_in_a_million_is_drawn() -> None:
    x, y = np.arange(1e6), np.full(10**6, 3.0)
    y[654_321] = 9.5
    curve = make_curve("loss", x, y, is_noisy=True)
    assert curve is not None
    assert curve.y.max() == 9.5
    drawn = draw_curves(Plot("Loss", "nats", [curve]), "a")
    lines = re.findall(r'<path d="([^"]*)"[^>]*--colour-1', drawn)
    heights = np.array([float(number) for line in lines for number in re.findall(r"[ML] [\d.]+ ([\d.]+)", line)])
    assert len(heights) > 3
    assert heights.max() - heights.min() > 0.8 * HEIGHT  # the SVG's y axis points down
    assert (heights < heights.min() + 1).sum() == 1
    assert len(drawn) < 200_000


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (9e3, ["0", "2000", "4000"]),
        (204_800, ["0", "50k", "100k"]),
        (4e6, ["0", "1M", "2M"]),
        (3e9, ["0", "800M", "1.6B"]),
        (2e-4, ["0", "5e-05"]),
    ],
)
def test_an_axis_says_what_is_there(most: float, ticks: list[str]) -> None:
    curve = make_curve("a", np.array([0.0, most]), np.array([0.0, most]))
    assert curve is not None
    drawn = re.findall(r"<text [^>]*>([^<]*)</text>", draw_curves(Plot("t", "u", [curve]), "a"))
    assert all(drawn.count(tick) == 2 for tick in ticks), drawn  # across and up


def test_points_that_are_not_numbers_are_left_out() -> None:
    assert make_curve("a", np.array([1.0, math.nan]), np.array([math.inf, 1.0])) is None
    curve = make_curve("a", np.array([1.0, 2.0, 3.0]), np.array([1.0, math.nan, 5.0]))
    assert curve is not None
    assert curve.x.tolist() == [1.0, 3.0]


def test_values_are_read_off_where_they_are() -> None:
    dense = make_curve("dense", np.arange(1000.0), np.arange(1000.0) * 2)
    sparse = make_curve("sparse", np.array([0.0, 500.0, 999.0]), np.array([7.0, 8.0, 9.0]), True)
    assert dense is not None and sparse is not None
    rows = read_off(Plot("t", "u", [dense, sparse]), 11)
    assert len(rows) == 11
    assert all(values[0] == 2 * place for place, values in rows)
    assert [values[1] for _, values in rows if values[1] is not None] == [7.0, 8.0, 9.0]


def test_a_name_in_a_picture_is_text() -> None:
    curve = make_curve("<script>$x^2$\x07", np.arange(5.0), np.arange(5.0))
    assert curve is not None
    drawn = draw_curves(Plot("<b>", "$", [curve], marks=[(2.0, "<i>")]), "a") + draw_bars(
        "<b>", ["<u>"], [Bar("$\\x$", [1]), Bar("<s>", [2])], "b"
    )
    assert "<script>" not in drawn and "<b>" not in drawn and "<i>" not in drawn and "<u>" not in drawn and "<s>" not in drawn
    assert "&lt;script&gt;$x^2$␇: 0" in drawn
    assert "\x07" not in drawn


# --- the verb -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "runs" / "small", num_steps=60, only=FEW)


def test_the_verb_writes_the_page_and_says_where(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("report", small)
    path = small / "reports" / "report.html"
    assert done.status == 0
    assert done.out.strip() == str(path)
    assert "Numbers: Loss" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    call("report", small, "-o", path)  # a page takes the place of a page
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(small, other)
    assert call("report", small, other).out.strip() == "report.html"
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert call("report", small, small, "-o", "one.html").status == 0
    assert "2 runs" not in (tmp_path / "one.html").read_text()


def test_the_verb_takes_no_other_files_place(small: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>")
    for arguments, said in (
        ((small, "-o", mine), "no report"),
        ((small, "-o", tmp_path), "is a folder"),
        ((small, "-o", tmp_path / "nowhere" / "x.html"), "no such folder"),
        ((small, "-o", mine, "--serve"), "both given"),
        ((small, "--port", 8080), "belongs to --serve"),
        ((tmp_path / "nothing",), "holds no run"),
    ):
        with pytest.raises(UserError, match=said):
            call("report", *arguments)
    assert mine.read_text() == "<!doctype html>"


def test_a_page_that_fails_half_way_leaves_the_old_one(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    call("report", small, "-o", path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        call("report", small, "-o", path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "runs"]


def test_nothing_known_is_a_page_too() -> None:
    words = Reader(make_page([RunFacts("empty", "/runs/empty")])).words
    assert "unknown" in words
    waiting = RunFacts("waiting", "/runs/waiting", {"state": "queued", "why": "job 7 waits: Priority", "step": None, "attempts": None})
    assert "state queued job 7 waits: Priority step 0" in Reader(make_page([waiting])).words
    assert "waiting queued 0" in Reader(make_page([waiting, RunFacts("empty", "/runs/empty")])).words
