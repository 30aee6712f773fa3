"""A run in the terminal: a bar with loss, tokens per second and time left; lines where there is no terminal."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0


class ProgressReport:
    """Shows steps as they pass, on rank 0. Use as a context manager."""

    def __init__(self, total_steps: int, done_steps: int, visible: bool, samples_before: Callable[[int], int] = int) -> None:
        """samples_before: how many samples are seen before a step, as time left goes by them; int: all steps are of one size."""
        self._samples_before = samples_before
        self._total, self._start, self._visible = total_steps, done_steps, visible
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if visible and sys.stderr.isatty():
            columns = (
                TextColumn("step {task.fields[step]}/{task.fields[total_steps]}"),
                BarColumn(None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            total, done = samples_before(total_steps), samples_before(done_steps)
            self._task = self._bar.add_task("", total=total, completed=done, step=done_steps, total_steps=total_steps)

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A step has passed."""
        if not self._visible:
            return
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._samples_before(step), step=step, description=text)
        elif time.monotonic() - self._said >= LINE_EVERY_SECONDS or step == self._total:
            self._said = time.monotonic()
            start, here, end = (self._samples_before(done) for done in (self._start, step, self._total))
            left = (self._said - self._began) / max(1, here - start) * (end - here)
            self.say(f"step {step}/{self._total}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._visible:
            return
        with suppress(OSError):  # a terminal that closed, a pipe that ended: no reason to stop training
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressReport":
        self._began = self._said = time.monotonic()  # what came before was not training
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
