"""What rank 0 writes down and shows of a run: one row, three places.

In: values of a step. Out: a line of `metrics.jsonl` (the truth), the same row in Weights & Biases, a bar or a line in
the terminal. Other ranks have a silent one, so that the loop asks nobody who it is.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from configs.schema import RunConfig
from pretrain.state import TrainState
from pretrain.watch.evaluate import HeldOut
from pretrain.watch.memory import Memory
from pretrain.watch.metrics import METRICS_FILE, MetricsLog, Throughput, cut_back, read_rows
from pretrain.watch.progress import ProgressReport
from pretrain.watch.slow_ranks import Spread
from pretrain.watch.tracking import end_tracking, start_tracking, track
from pretrain.watch.utilisation import Utilisation

CPU = torch.device("cpu")


class Journal:
    """Use as a context manager around the loop; on entry, rows after the resumed step are cut off."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        attempt: int,
        state: TrainState,
        is_writer: bool,
        device: torch.device = CPU,
        num_devices: int = 1,
    ) -> None:
        """`folder`: the run folder. `device`: of this rank; `num_devices`: of all."""
        self._attempt, self._num_devices = attempt, num_devices
        self._progress = ProgressReport(config.training.steps, state, is_writer, folder, attempt)
        self._log = self._tracker = None
        self._path = folder / METRICS_FILE
        if is_writer:
            cut_back(self._path, state.step)
            self._log = MetricsLog(self._path)
            self._tracker = start_tracking(config, folder, attempt, state.step, self._progress.say)
        self._throughput = Throughput(state.tokens_seen)
        self._utilisation, self._memory = Utilisation(config, device, num_devices), Memory(device)

    def step(
        self,
        state: TrainState,
        loss: float,
        learning_rate: float,
        gradient_norm: float | None,
        seconds_waited: float,
        loss_scale: float | None = None,
        step_times: Mapping[str, float] | None = None,
    ) -> None:
        """A logged step. loss: the true mean over the global batch, in nats per token; seconds_waited: for data, since the start;
        loss_scale: of fp16; step_times: `StepClock.means`, since the last logged step."""
        if self._log is None:
            return
        rate, data_wait = self._throughput.since_last(state.tokens_seen, seconds_waited)
        self._write(
            state,
            {
                **({"loss": loss} if math.isfinite(loss) else {}),
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm if gradient_norm is None or math.isfinite(gradient_norm) else None,
                "tokens_per_second": rate,
                "tokens_per_second_per_device": rate / self._num_devices,
                "data_wait_share": data_wait,
                "skipped_steps": state.skipped_steps,
                **({"loss_scale": loss_scale} if loss_scale is not None else {}),
                **(step_times or {}),
                **self._utilisation.shares(rate),
                **self._memory.look(),
            },
        )

    def norms(self, state: TrainState, found: Mapping[str, float]) -> None:
        """Norms of weights and gradients, as `Norms.read` names them."""
        self._write(state, dict(found))

    def held_out(self, state: TrainState, result: HeldOut) -> None:
        """An evaluation."""
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        self.say(f"step {state.step}: held out {result.nats_per_token:.4f} nats per token{bits}")
        of_all = {"held_out": result, **{f"held_out/{name}": of_source for name, of_source in result.sources.items()}}
        values = {
            f"{name}/{key}": getattr(one, key) for name, one in of_all.items() for key in ("nats_per_token", "bits_per_byte", "num_tokens")
        }
        self._write(state, {key: value for key, value in values.items() if value is not None})

    def scores(self, state: TrainState, found: dict[str, float]) -> None:
        """Scores of tasks, by `task/NAME/METRIC`."""
        self.say(f"step {state.step}: " + ", ".join(f"{name.removeprefix('task/')} {value:.4f}" for name, value in found.items()))
        self._write(state, found)

    def ranks(self, state: TrainState, spread: Spread) -> None:
        """How far the ranks lie apart, and which the others wait for."""
        slowest, found = spread.slowest, spread.slow
        row = {
            "slowest": slowest.rank,
            "slowest_node": slowest.node,
            "slowest_ratio": slowest.ratio,
            "median_seconds": spread.median_seconds,
        }
        self._write(state, {f"ranks/{key}": value for key, value in row.items()})
        if not found:
            return
        named = ", ".join(f"rank {one.rank} on {one.node} ({one.ratio:.2f} times, {1000 * one.seconds:.0f} ms a step)" for one in found[:8])
        self.say(f"step {state.step}: slower than the median rank: {named}")
        worst = found[0]
        row = {"rank": worst.rank, "node": worst.node, "ratio": worst.ratio, "seconds": worst.seconds, "num_ranks": len(found)}
        self._write(state, {f"slow_ranks/{key}": value for key, value in row.items()})

    def saved(self, state: TrainState, stall_seconds: float, num_bytes: int, is_durable: bool, problems: Sequence[str]) -> None:
        """A save has begun. stall_seconds: that training waited for it; num_bytes: of all ranks, at most; problems: of it
        or the one before."""
        row = {"stall_seconds": stall_seconds, "bytes": num_bytes, "kind": "durable" if is_durable else "fast"}
        self._write(state, {f"checkpoint/{key}": value for key, value in row.items()})
        for problem in problems:
            self.say(f"WARNING: {problem} Training goes on.")

    def findings(self, state: TrainState, found: Sequence[Any]) -> None:
        """What is wrong with the last steps, each in a row of its own. found: dataclasses of numbers that say themselves (`str`)."""
        for one in found:
            kind = type(one).__name__.lower()
            self.say(str(one))
            self._write(state, {f"{kind}/{key}": value for key, value in asdict(one).items() if math.isfinite(value)})

    def rollbacks(self, state: TrainState, rows: Sequence[dict[str, Any]]) -> None:
        """Rollbacks of the run so far, numbered from 1; those that no row tells of yet are told now."""
        if self._log is None:
            return
        told = {row.get("rollback/number") for row in read_rows(self._path)}
        for number, row in enumerate(rows, start=1):
            if number not in told:
                self._write(state, {"rollback/number": number, **{f"rollback/{key}": value for key, value in row.items()}})

    def losses(self, count: int) -> list[float]:
        """The newest logged losses, at most `count`, oldest first; of every step only where every step is logged. For other ranks: none."""
        return [row["loss"] for row in read_rows(self._path) if "loss" in row][-count:] if self._log is not None else []

    def say(self, text: str) -> None:
        """A line in the terminal, from rank 0."""
        self._progress.say(text)

    def _write(self, state: TrainState, values: dict[str, Any]) -> None:
        row = {"step": state.step, "tokens_seen": state.tokens_seen, "attempt": self._attempt, "time": round(time.time(), 3), **values}
        self._progress.show(row)
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
