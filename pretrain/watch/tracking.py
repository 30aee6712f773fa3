"""Weights & Biases as a view of `metrics.jsonl`, for which training never waits.

In: rows, as they are written down. Out: the same rows in the W&B run of the folder, alerts, artifacts. Everything that may wait for a
server happens in one thread behind a bounded queue: a row costs the loop one `put`. Rows beyond the bound are dropped and counted, for
`pretrain wandb sync` sends what is missing. The end waits for the thread a minute at most; whatever happens here, the run goes on.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import wandb

from configs.redaction import redact
from configs.schema import RunConfig
from pretrain.watch.artifacts import CHECKPOINTS, log_checkpoints, log_description
from pretrain.watch.metrics import METRICS_FILE, read_rows
from pretrain.watch.replay import missing_rows, read_history, read_offline
from pretrain.watch.stop_tag import watch_stop_tag
from pretrain.watch.wandb_run import Mode, add_segment, choose_mode, open_run, read_segments, run_id, wandb_step_of, without_secrets

ROWS_WAITING = 10_000
"""In memory, while the server does not answer: some ten megabytes."""
END_SECONDS = 60.0
"""What the end of an attempt may take in all. What is not sent by then is in `metrics.jsonl`, for `pretrain wandb sync`."""
CAUSE_CHARACTERS = 300


class Began(NamedTuple):
    """Where an attempt stands as it begins."""

    attempt: int
    step: int
    """The one it goes on from."""
    num_rows: int
    """Of `metrics.jsonl`, up to that step."""
    last_row: dict[str, Any] | None
    cause: str | None
    """Why the attempt before ended; None: there was none."""
    goes_back: bool
    """Whether steps behind this one have been shown before."""
    commits: tuple[str, ...]
    """Folder names; those that are there already are old news."""


class Tracker:
    """Rows, alerts and the end of an attempt, on their way to W&B."""

    def __init__(self, config: RunConfig, folder: Path, began: Began, mode: Mode, say: Callable[[str], None]) -> None:
        """Begins to open the run, and returns."""
        self._config, self._folder, self._began, self._say = config, folder, began, say
        self._queue: queue.Queue[dict[str, Any] | bool] = queue.Queue(ROWS_WAITING)
        """Rows; at last whether the attempt failed."""
        self._num_rows = began.num_rows
        self._num_dropped = 0
        self._is_over = threading.Event()
        """Nothing is sent any more."""
        self._thread = threading.Thread(target=self._work, args=(mode,), name="Weights & Biases", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Show a row that was just added to `metrics.jsonl`. Returns at once."""
        numbered = {**row, "row": self._num_rows}
        self._num_rows += 1
        try:
            self._queue.put_nowait(numbered)
        except queue.Full:
            self._num_dropped += 1

    def end(self, failed: bool) -> None:
        """Send what waits and close the run, for as long as `END_SECONDS` allow. What is left is said."""
        deadline = time.monotonic() + END_SECONDS
        try:
            self._queue.put(failed, timeout=END_SECONDS)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        late = self._thread.is_alive()
        self._is_over.set()
        if late:
            end_service()
        if late or self._num_dropped:
            what = "has not answered in time" if late else f"was not shown {self._num_dropped} rows"
            self._say(
                f"Weights & Biases {what}; metrics.jsonl holds every value: `pretrain wandb sync {self._folder}` sends what is missing."
            )

    def _work(self, mode: Mode) -> None:
        """The thread: all that may take long, one after the other."""
        opened = self._open(mode)
        if opened is None:
            self._is_over.set()
            while not isinstance(self._queue.get(), bool):  # so that nobody takes them for late
                pass
            return
        run, first_step = opened
        if self._began.cause is not None:
            self._alert_restart(run)
        with not_the_runs("was not given the run's description"):
            log_description(run, self._config, self._folder)
        known, last_step = set(self._began.commits), self._began.step
        while not isinstance(item := self._queue.get(), bool):
            last_step = max(last_step, item["step"])
            with not_the_runs("refused a row"):
                run.log(without_secrets(item), step=first_step + item["row"] - self._began.num_rows)
            self._alert(run, item)
            if "checkpoint/kind" in item:
                with not_the_runs("was not told of a checkpoint"):
                    log_checkpoints(run, self._config, self._folder, known)
        with not_the_runs("could not be closed"):
            log_checkpoints(run, self._config, self._folder, known)
            if not item and last_step >= self._config.training.total_steps:
                run.alert("Finished", f"{self._name} is done: {last_step:,} steps.", level="INFO")
            run.finish(exit_code=1 if item else 0)

    @property
    def _name(self) -> str:
        return self._config.run.name or self._folder.name

    def _open(self, mode: Mode) -> "tuple[wandb.Run, int] | None":
        """The run, and the W&B step of the attempt's first row; None (which is said) where there is none to be had."""
        ways: list[tuple[Mode, int | None]] = [(mode, None), ("offline", None)] if mode == "online" else [(mode, None)]
        if mode == "online" and (kept := self._rewind_to()) is not None:
            ways.insert(0, (mode, kept))
        for way, (how, rewind_to) in enumerate(ways):
            try:
                run = open_run(self._config, self._folder, how, rewind_to)
                if how == "online":
                    watch_stop_tag(run, self._folder, self._say)
                return run, self._begin_segment(run, how)
            except Exception as error:
                left = [one for one, _ in ways[way + 1 :]]
                if not left:
                    self._tell(f"Weights & Biases could not be started ({_line(error)}); metrics.jsonl holds every value.")
                elif left[0] == "offline":
                    self._tell(f"Weights & Biases could not be reached ({_line(error)}); this attempt is recorded offline.")
        return None

    def _rewind_to(self) -> int | None:
        """W&B's step of the last row that is kept, where others behind it have been shown."""
        row = self._began.last_row
        if not self._began.goes_back or row is None:
            return None
        return wandb_step_of(read_segments(self._folder), row["attempt"], self._began.num_rows - 1)

    def _begin_segment(self, run: "wandb.Run", mode: Mode) -> int:
        """Send what a kill kept earlier attempts from sending, and mark where this one begins. Returns W&B's step of its first row."""
        began, missing = self._began, list[dict[str, Any]]()
        if began.num_rows:
            with not_the_runs("could not say what it has"):
                history = read_history(self._config, self._folder) if mode == "online" else read_offline(self._folder)
                missing = missing_rows(read_rows(self._folder / METRICS_FILE)[: began.num_rows], history)
        for number, row in enumerate(missing):
            run.log(without_secrets(row), step=run.starting_step + number)
        marker = run.starting_step + len(missing)
        marked = {"step": began.step, "attempt": began.attempt, "segment/attempt": began.attempt, "segment/from_step": began.step}
        run.log({**marked, **({"segment/cause": began.cause} if began.cause is not None else {})}, step=marker)
        add_segment(self._folder, began.attempt, began.num_rows, marker + 1, mode)
        return marker + 1

    def _alert_restart(self, run: "wandb.Run") -> None:
        cause = self._began.cause or ""
        title = "Stalled, and restarted" if "silent for" in cause else "Restarted"
        with not_the_runs("refused an alert"):
            run.alert(title, f"{self._name} goes on from step {self._began.step:,}, attempt {self._began.attempt}. {cause}", level="WARN")

    def _alert(self, run: "wandb.Run", row: dict[str, Any]) -> None:
        """Tell a person of what is wrong in a row."""
        with not_the_runs("refused an alert"):
            if "spike/step" in row:
                text = f"{self._name}, step {row['spike/step']:,}: loss {row['spike/loss']:.4f}, {row['spike/z']:.1f} deviations high."
                run.alert("Loss spike", text, level="WARN")
            if "skip/step" in row and not row.get("skip/is_scale_search"):
                text = f"{self._name}, step {row['skip/step']:,}: its update was not applied, for it was not finite."
                run.alert("Not finite (NaN)", text, level="WARN")

    def _tell(self, text: str) -> None:
        if not self._is_over.is_set():
            self._say(text)


def start_tracking(config: RunConfig, folder: Path, attempt: int, step: int, say: Callable[[str], None]) -> Tracker | None:
    """Begin to show an attempt that goes on from `step`; `metrics.jsonl` is cut back to it. None where W&B is disabled. Returns at once."""
    mode = choose_mode(config)
    if mode == "disabled":
        return None
    if mode == "offline" and config.watch.wandb == "online":
        say("watch.wandb is online, but no API key is configured or WANDB_MODE differs: recorded offline, for `pretrain wandb sync`.")
    try:
        run_id(folder)  # now, so that the first checkpoint has it
        return Tracker(config, folder, _where(folder, attempt, step), mode, say)
    except OSError as error:
        say(f"Weights & Biases could not be started ({error}); metrics.jsonl holds every value.")
        return None


def track(tracker: Tracker | None, row: dict[str, Any]) -> None:
    """Show a row of `metrics.jsonl`. Returns at once."""
    if tracker is not None:
        tracker.log(row)


def end_tracking(tracker: Tracker | None, failed: bool) -> None:
    """Close the run, in a minute at most."""
    if tracker is not None:
        tracker.end(failed)


def end_service() -> None:
    """End W&B's own process: what it would still send later could meet what the next attempt, or a `sync`, sends under the same id."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()


@contextmanager
def not_the_runs(what: str) -> Generator[None]:
    """An error in here is not the run's."""
    try:
        yield
    except Exception:
        logging.getLogger(__name__).warning("Weights & Biases %s", what, exc_info=True)


def _where(folder: Path, attempt: int, step: int) -> Began:
    lines = (folder / METRICS_FILE).read_bytes().splitlines() if (folder / METRICS_FILE).is_file() else []
    ended = [row for row in _read_lines(folder / "attempts.jsonl") if "attempt" in row]
    before = ended[-1] if ended else {}
    cause = redact(str(before.get("cause")))[:CAUSE_CHARACTERS] if ended else None
    last = json.loads(lines[-1]) if lines else None
    commits = tuple(path.name for path in (folder / CHECKPOINTS).glob("step-*"))
    return Began(attempt, step, len(lines), last, cause, (before.get("last_step") or 0) > step, commits)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _line(error: Exception) -> str:
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])
