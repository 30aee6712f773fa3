"""A run in the terminal: one live panel with what is said above it; plain lines where there is no terminal.

In: rows of `metrics.jsonl` as rank 0 writes them, the end of `timeline.jsonl`, lines to say. Out: text on standard error. What is told
here is only kept; a thread draws it, twice a second, so that a terminal that is slow, stopped (Ctrl-S) or gone keeps no step waiting.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from configs.steps import Steps
from pretrain.state import TrainState
from pretrain.watch.panel import TREND_VALUES, Standing
from pretrain.watch.tail import read_tail

LINE_EVERY_SECONDS = 10.0
DRAW_EVERY_SECONDS = 0.5
TIMELINE_BYTES = 1 << 10
"""Its last rows."""
CLOSE_SECONDS = 2.0
"""A terminal that takes nothing is given up then."""


class ProgressReport:
    """Shows steps as they pass, on rank 0. Use as a context manager."""

    def __init__(self, steps: Steps, state: TrainState, visible: bool, folder: Path, attempt: int = 1) -> None:
        """state: where the attempt begins. visible: whether this rank shows anything. folder: of the run, whose timeline has the phase."""
        self._steps, self._start, self._visible, self._folder, self._attempt = steps, state, visible, folder, attempt
        self._row: dict[str, Any] = {"step": state.step, "tokens_seen": state.tokens_seen}
        self._losses: deque[float] = deque(maxlen=TREND_VALUES)
        self._saved: tuple[int, float | None] | None = (state.step, None) if state.step else None
        self._began = self._said = time.monotonic()
        self._seconds_left: float | None = None
        self._waiting: deque[str] = deque()
        self._ended = threading.Event()
        self._drawer: threading.Thread | None = None

    def show(self, row: Mapping[str, Any]) -> None:
        """Any row of `metrics.jsonl`: of a logged step, of a save; of others nothing is shown."""
        if self._visible and "tokens_per_second" in row:
            self._show_step(row)
        elif self._visible and "checkpoint/kind" in row:
            self._saved = (row["step"], time.monotonic())

    def _show_step(self, row: Mapping[str, Any]) -> None:
        self._row = {**self._row, **row}
        if "loss" in row:
            self._losses.append(row["loss"])
        now, total_steps = time.monotonic(), self._steps.total_steps
        start, here, end = (self._steps.samples_before(step) for step in (self._start.step, row["step"], total_steps))
        self._seconds_left = (now - self._began) / max(1, here - start) * (end - here)
        if self._drawer is None and (now - self._said >= LINE_EVERY_SECONDS or row["step"] == total_steps):
            self._said = now
            self.say(f"step {row['step']}/{total_steps}  {_line(row)}  {self._seconds_left:.0f} s left")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._visible:
            return
        if self._drawer is not None and self._drawer.is_alive() and not self._ended.is_set():
            self._waiting.append(text)
        else:
            _print(text)

    def standing(self) -> Standing:
        """What the panel shows now."""
        row, now = self._row, time.monotonic()
        timeline = read_tail(self._folder / "timeline.jsonl", TIMELINE_BYTES)
        memory = row.get("memory/allocated_bytes", row.get("memory/host_bytes"))
        saved_step, saved_time = self._saved or (None, None)
        return Standing(
            name=self._folder.name,
            attempt=self._attempt,
            phase=next((past["phase"] for past in reversed(timeline) if past.get("attempt") == self._attempt and "phase" in past), "start"),
            step=row["step"],
            total_steps=self._steps.total_steps,
            tokens=row["tokens_seen"],
            total_tokens=self._steps.total_tokens,
            losses=tuple(self._losses),
            seconds_left=self._seconds_left,
            tokens_per_second=row.get("tokens_per_second"),
            mfu=row.get("mfu/palm"),
            memory_bytes=memory,
            saved_step=saved_step,
            saved_seconds_ago=now - saved_time if saved_time is not None else None,
        )

    def _draw(self) -> None:
        """Until the end: the panel, and above it what was said meanwhile."""
        with suppress(Exception, SystemExit):  # a terminal that is gone is no reason to stop training; rich ends by SystemExit
            console = Console(stderr=True)
            with Live(console=console, get_renderable=self.standing, auto_refresh=False) as live:
                console.show_cursor(True)  # a rank that is killed leaves the cursor as it was
                while not self._ended.wait(DRAW_EVERY_SECONDS):
                    self._draw_once(live)
                self._draw_once(live)
        while self._waiting:
            _print(self._waiting.popleft())

    def _draw_once(self, live: Live) -> None:
        if self._waiting:
            lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
            live.console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        else:
            live.refresh()

    def __enter__(self) -> "ProgressReport":
        self._began = self._said = time.monotonic()  # what came before was not training
        if self._visible and _is_terminal():
            self._drawer = threading.Thread(target=self._draw, name="panel", daemon=True)
            self._drawer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._drawer is not None:
            self._drawer.join(CLOSE_SECONDS)


def _line(row: Mapping[str, Any]) -> str:
    """A logged step in words."""
    loss = f"loss {row['loss']:.3f}" if "loss" in row else "loss not finite"
    mfu = f"  MFU {100 * row['mfu/palm']:.1f} %" if "mfu/palm" in row else ""
    return f"{loss}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"


def _is_terminal() -> bool:
    """Whether standard error is a terminal that lines can be drawn over in."""
    with suppress(Exception):  # it may be closed
        return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    return False


def _print(text: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that closed, a pipe that ended, a file that was closed
        print(text, file=sys.stderr, flush=True)
