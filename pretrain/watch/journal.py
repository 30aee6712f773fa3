"""What rank 0 writes down and shows of a run: one row, three places.

In: values of a step. Out: a line of `metrics.jsonl` (the truth), the same row in Weights & Biases, a bar or a line in
the terminal. Other ranks have a silent one, so that the loop asks nobody who it is.
"""

from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.schema import RunConfig
from pretrain.state import TrainState
from pretrain.watch.evaluate import HeldOut
from pretrain.watch.metrics import METRICS_FILE, MetricsLog, Throughput, cut_back
from pretrain.watch.progress import ProgressReport
from pretrain.watch.tracking import end_tracking, start_tracking, track


class Journal:
    """Use as a context manager around the loop; on entry, rows after the resumed step are cut off."""

    def __init__(self, config: RunConfig, folder: Path, attempt: int, state: TrainState, is_writer: bool) -> None:
        """`folder`: the run folder."""
        self._attempt = attempt
        self._progress = ProgressReport(config.training.total_steps, state.step, is_writer)
        self._log = self._tracker = None
        if is_writer:
            cut_back(folder / METRICS_FILE, state.step)
            self._log = MetricsLog(folder / METRICS_FILE)
            self._tracker = start_tracking(config, folder, self._progress.say)
        self._throughput = Throughput(state.tokens_seen)

    def step(self, state: TrainState, loss: float, learning_rate: float, gradient_norm: float | None, seconds_waited: float) -> None:
        """A logged step. loss: the true mean over the global batch, in nats per token; seconds_waited: for data, since the start."""
        rate, data_wait = self._throughput.since_last(state.tokens_seen, seconds_waited)
        self._progress.show(state.step, loss, rate)
        self._write(
            state,
            {
                "loss": loss,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_per_second": rate,
                "data_wait_share": data_wait,
                "skipped_steps": state.skipped_steps,
            },
        )

    def held_out(self, state: TrainState, result: HeldOut) -> None:
        """An evaluation."""
        self.say(f"step {state.step}: held out {result.nats_per_token:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte")
        self._write(state, {f"held_out/{key}": value for key, value in asdict(result).items()})

    def say(self, text: str) -> None:
        """A line in the terminal, from rank 0."""
        self._progress.say(text)

    def _write(self, state: TrainState, values: dict[str, Any]) -> None:
        row = {"step": state.step, "tokens_seen": state.tokens_seen, "attempt": self._attempt, **values}
        if self._log is not None:
            if problem := self._log.write(row):
                self.say(f"WARNING: metrics.jsonl cannot be written ({problem}); its rows wait in memory.")
            track(self._tracker, row)

    def __enter__(self) -> "Journal":
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, trace)
        end_tracking(self._tracker, failed=kind is not None)
