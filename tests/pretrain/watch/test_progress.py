"""A run in the terminal: lines where there is none, not too many and with a time left that is right; else a panel, in a real pty."""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.steps import Steps
from pretrain.state import TrainState
from pretrain.watch import progress
from pretrain.watch.progress import ProgressReport
from tests.pretrain.watch.terminal import Terminal, open_terminal

RUN = Path("runs/mine")
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


def row(step: int, loss: float | None = 1.25, rate: float = 12345.6, **more: Any) -> dict[str, Any]:
    """A logged step of samples of one token."""
    return {"step": step, "tokens_seen": step, **({} if loss is None else {"loss": loss}), "tokens_per_second": rate, **more}


def at(step: int) -> TrainState:
    return TrainState(step, step, step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed at step 20 of 100, a second per step: time left counts this attempt's steps only."""
    with ProgressReport(Steps(100, 1, [], 1), at(20), True, RUN) as report:
        for step in range(21, 101):
            clock[0] += 1
            report.show(row(step))
            report.show({"step": step, "tokens_seen": step, "held_out/nats_per_token": 1.0})
    out, err = capsys.readouterr()
    assert out == "", "what is printed is for pipes; progress goes beside it"
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(30, 101, 10)]
    assert lines[0] == "step 30/100  loss 1.250  12,346 tokens/s  70 s left"
    assert lines[-1].endswith(" 0 s left")


def test_what_a_line_has_where_it_is_known(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(Steps(1, 1, [], 1), at(0), True, RUN) as report:
        report.show(row(1, None, **{"mfu/palm": 0.4123}))
    assert capsys.readouterr().err == "step 1/1  loss not finite  12,346 tokens/s  MFU 41.2 %  0 s left\n"


def test_time_left_goes_by_samples(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps of 1 sample, then ten of 3: a second per sample, 40 in all; resumed behind 5."""
    steps = Steps(40, 1, [(10, 1)], 3)
    with ProgressReport(steps, at(5), True, RUN) as report:
        for step in range(6, 21):
            clock[0] += steps.batch_at(steps.samples_before(step - 1))
            report.show(row(step))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["12/20", "16/20", "20/20"]
    assert [line.rpartition("  ")[2] for line in lines] == ["24 s left", "12 s left", "0 s left"]


def test_only_rank_0_is_heard(clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressReport(Steps(1, 1, [], 1), at(0), False, RUN) as report:
        report.say("a word")
        clock[0] += 100
        report.show(row(1))
        assert report._drawer is None
    assert capsys.readouterr() == ("", "")


def test_what_the_panel_shows(clock: list[float], tmp_path: Path) -> None:
    report = ProgressReport(Steps(100, 1, [], 1), at(20), True, tmp_path, attempt=3)
    assert (report.standing().phase, report.standing().saved_step, report.standing().saved_seconds_ago) == ("start", 20, None)
    rows = [{"attempt": 3, "phase": "first_step"}, {"attempt": 3, "phase": "save"}]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + '{"attempt": 3, "pha')
    clock[0] += 10
    report.show(row(40, 2.0, **{"memory/host_bytes": 1e9}))
    report.show({"step": 40, "tokens_seen": 40, "checkpoint/kind": "durable"})
    clock[0] += 5
    report.show(row(50, None, **{"memory/allocated_bytes": 2e9, "mfu/palm": 0.4}))
    now = report.standing()
    assert (now.name, now.attempt, now.phase) == (tmp_path.name, 3, "save")
    assert (now.step, now.total_steps, now.tokens, now.total_tokens) == (50, 100, 50, 100)
    assert (now.losses, now.tokens_per_second, now.mfu, now.memory_bytes) == ((2.0,), 12345.6, 0.4, 2e9)
    assert (now.seconds_left, now.saved_step, now.saved_seconds_ago) == (25.0, 40, 5.0)
    assert ProgressReport(Steps(100, 1, [], 1), at(20), True, tmp_path, attempt=4).standing().phase == "start", "it is another attempt's"


def test_what_telling_costs(tmp_path: Path) -> None:
    """Nothing is drawn by the one who tells. A fifth of a millisecond is 0.2 % of a step of 100 ms; a median asks for no idle machine."""
    report = ProgressReport(Steps(10**6, 1, [], 1), at(0), True, tmp_path)
    report._drawer = progress.threading.Thread()
    seconds: list[float] = []
    for step in range(1, 2001):
        told = row(step, **{f"norm/weights/{layer}": 1.0 for layer in range(100)})
        began = time.perf_counter()
        report.show(told)
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 200e-6


@contextmanager
def panel(folder: Path, **kinds: Any) -> Generator[Terminal, None, None]:
    with open_terminal("-m", "tests.pretrain.watch.told", str(folder), **kinds) as terminal:
        yield terminal


def of_panel(screen: str) -> list[str]:
    """The lines of the one panel, without its border."""
    lines = screen.splitlines()
    (top,) = (number for number, line in enumerate(lines) if line.startswith("╭"))
    (bottom,) = (number for number, line in enumerate(lines) if line.startswith("╰"))
    return [lines[top].strip("╭─╮ "), *(line.strip("│ ") for line in lines[top + 1 : bottom])]


def drawn(*words: str) -> Callable[[Terminal], bool]:
    """Whether the words are seen, in or above a panel that is drawn to its end."""
    return lambda seen: all(word in seen.screen.text for word in words) and seen.screen.text.rstrip().endswith("╯")


def test_a_panel_in_a_terminal(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    with panel(run) as terminal:
        terminal.wait_for("starting")
        for command in ("enter step", "step 25", "say held out [b]well[/b]", "print a library's word", "saved 25", "step 30"):
            terminal.tell(command)
        terminal.wait(drawn("checkpoint 25, ", "training", "step 30/"))
        title, bar, progress_line, *facts = of_panel(terminal.screen.text)
        assert title == "mine · attempt 2 · training"
        assert set(bar) <= set("━╸╺ ") and len(bar) > 80
        assert re.fullmatch(r"30\.0 %   960 of 3\.20k tokens   \d+ s left", progress_line)
        assert facts[0] == "step 30/100   loss 4.400 █▁   12.3k tokens/s   MFU 41.2 %   memory 61.2 GB"
        assert re.fullmatch(r"checkpoint 25, \d+ s ago", facts[1])
        above = terminal.screen.text.partition("╭")[0]
        assert sorted(above.split("\n")[:2]) == ["a library's word", "held out [b]well[/b]"]
        terminal.tell("enter save")
        terminal.wait_for("attempt 2 · saving")
        terminal.resize(40)
        terminal.tell("say it is narrow now")
        terminal.wait_for("it is narrow now")
        for step in range(31, 99):
            terminal.tell(f"step {step}")
        terminal.wait(drawn("98/100"))
        lines = terminal.screen.text.partition("it is narrow now\n")[2].splitlines()
        assert max(map(len, lines)) == 40 and "memory 61.2 GB" in terminal.screen.text
        terminal.tell("say the last word")
        terminal.tell("end")
        assert "the last word" in terminal.wait_for_the_end()
    assert terminal.raw.rfind("\x1b[?25l") < terminal.raw.rfind("\x1b[?25h"), "the cursor is shown"
    assert of_panel(terminal.screen.text)[0].startswith("mine · attempt 2") and COLOUR.search(terminal.raw)


def test_no_colour_where_none_is_wanted(tmp_path: Path) -> None:
    with panel(tmp_path, NO_COLOR="1") as terminal:
        terminal.tell("step 30")
        terminal.wait_for("step 30/100")
        assert not COLOUR.search(terminal.raw)


@pytest.mark.parametrize("kind", ["dumb", ""])
def test_a_terminal_that_cannot_draw_gets_lines(tmp_path: Path, kind: str) -> None:
    with panel(tmp_path, TERM=kind) as terminal:
        terminal.tell("say a word")
        terminal.tell("step 100")
        terminal.tell("end")
        assert terminal.wait_for_the_end().splitlines()[0] == "a word"
    assert "\x1b" not in terminal.raw and "step 100/100  loss 3.000  12,346 tokens/s  MFU 41.2 %  0 s left" in terminal.raw


def test_a_terminal_that_closes_ends_nothing(tmp_path: Path) -> None:
    with panel(tmp_path) as terminal:
        terminal.wait_for("starting")
        terminal.close()
        for step in range(30, 90):
            terminal.tell(f"step {step}")
            terminal.tell("say a word")
            time.sleep(0.02)  # so that it is drawn into nothing
        terminal.tell("end")
        assert terminal.program.wait(60) == 0


def test_a_terminal_that_takes_nothing_stops_nothing(tmp_path: Path) -> None:
    """As after Ctrl-S: nobody reads, and what is written waits. The run goes on; its end waits for two seconds."""
    with panel(tmp_path) as terminal:
        terminal.wait_for("starting")
        terminal.tell("flood")  # far more than a terminal keeps
        deadline = time.monotonic() + 60
        while not (tmp_path / "said").exists():
            assert time.monotonic() < deadline, "it waits for the terminal"
            time.sleep(0.02)
