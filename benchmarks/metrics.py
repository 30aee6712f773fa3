"""What it costs to write down every step: clocks, verdicts, a row in metrics.jsonl, the timeline; norms of weights where they are due.

Run: .venv/bin/python benchmarks/metrics.py [--quick] [--json]

In: nothing. The loop's own calls around a step whose model is left out: on the host, one rank, two micro-steps, with nothing to wait for.
Each row gives the best of several rounds' medians: what else the machine does only adds to it. The goal is 0.2 % of a step of 100 ms,
or 200 us. With --json one object per row: name, unit, ours, peer, ratio, target, met. There is no peer: what others write down differs.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_SILENT", "true")

import torch
import torch.distributed as distributed

from configs.schema import RunConfig
from pretrain.engine.parallel import Layout
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from pretrain.run.heartbeat import Pulse
from pretrain.state import TrainState
from pretrain.watch.journal import Journal
from pretrain.watch.norms import Norms
from pretrain.watch.slow_ranks import Pace
from pretrain.watch.step_times import StepClock
from pretrain.watch.timeline import Timeline
from pretrain.watch.verdicts import Verdicts

STEP_SECONDS, SHARE = 0.1, 0.002
TARGET_MICROSECONDS = 1e6 * STEP_SECONDS * SHARE
MICRO_STEPS = 2


def main() -> None:
    """Print every row as soon as it is measured."""
    parser = argparse.ArgumentParser(description="What it costs to write down every step.")
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds: some seconds")
    parser.add_argument("--json", action="store_true", help="one object per row")
    options = parser.parse_args()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for one in measure(Path(folder), *((200, 5) if options.quick else (1000, 15))):
            print(json.dumps(one) if options.json else show(one), flush=True)
    distributed.destroy_process_group()


def measure(folder: Path, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Row after row."""
    for name, wandb in (("every step logged", "disabled"), ("the same, with W&B offline", "offline")):
        microseconds = 1e6 * time_logging(folder / wandb, wandb, steps, rounds)
        yield row(name, "us", microseconds, TARGET_MICROSECONDS)
        yield row(f"{name}: of a step of {1e3 * STEP_SECONDS:g} ms", "%", 1e-4 * microseconds / STEP_SECONDS, 100 * SHARE)
    yield row(
        "of which clocks, verdicts, timeline: every step, logged or not", "us", 1e6 * time_unlogged(folder / "unlogged", steps, rounds)
    )
    for size, milliseconds in time_norms(rounds).items():
        yield row(f"norms of the weights of {size:,} parameters, on a processor, where they are due", "ms", milliseconds)


class Loop:
    """What the loop does for its figures in a step, and nothing else."""

    def __init__(self, folder: Path, wandb: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # A peak is given, so that utilisation is reckoned as on a GPU.
        self.config = RunConfig.model_validate({"watch": {"wandb": wandb, "log_every_steps": 1, "device_tflops": 100.0}})
        self.layout, self.state = Layout(0, 1, 0, 1, torch.device("cpu")), TrainState()
        self.verdicts, self.pace, self.clock = Verdicts(self.layout), Pace(self.layout), StepClock(self.layout.device)
        self.timeline = Timeline(folder, 1, 0, Pulse(bytearray(64)), lambda: 0.0, is_writer=True)
        self.journal = Journal(self.config, folder, 1, self.state, True, self.layout.device, 1)
        self.loss, self.num_valid = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def step(self, logged: bool) -> None:
        """One of two micro-steps."""
        self.clock.enter("data_wait")
        self.clock.enter("other")
        for _ in range(MICRO_STEPS):
            self.clock.enter("forward")
            self.timeline.beat()
            self.clock.enter("backward")
            self.clock.enter("optimizer")
            self.clock.enter("other")
            self.verdicts.add(self.loss)
        self.state = self.state.advance(8, 8192, True)
        self.verdicts.send(self.state.step, self.num_valid, False, False, True)
        told = self.verdicts.read(now=logged)
        if spread := self.pace.after_step(self.clock.end_step(0.0)):
            self.journal.ranks(self.state, spread)
        if logged:
            self.journal.step(self.state, told.loss, 3e-4, 1.0, 0.0, None, self.clock.means())
        self.verdicts.news()
        self.timeline.beat("step", self.state.step)


def time_logging(folder: Path, wandb: str, steps: int, rounds: int) -> float:
    """Seconds of a step that is logged."""
    loop = Loop(folder, wandb)
    with loop.journal:
        return best_median(lambda: loop.step(True), steps, rounds)


def time_unlogged(folder: Path, steps: int, rounds: int) -> float:
    """Seconds of a step that is not."""
    loop = Loop(folder, "disabled")
    with loop.journal:
        return best_median(lambda: loop.step(False), steps, rounds)


def time_norms(rounds: int) -> dict[int, float]:
    """Milliseconds by the number of parameters."""
    model = Decoder(RunConfig().model)
    initialize_weights(model, model.section, 1)
    weights = [(name, parameter.detach().flatten()) for name, parameter in model.named_parameters()]
    norms = Norms([name for name, _ in weights], torch.device("cpu"))
    return {sum(one.numel() for _, one in weights): 1e3 * best_median(lambda: norms.read(weights), 3, rounds)}


def best_median(act: Callable[[], object], times: int, rounds: int) -> float:
    """Seconds."""
    medians: list[float] = []
    for _ in range(rounds):
        seconds: list[float] = []
        for _ in range(times):
            began = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return min(medians)


def row(name: str, unit: str, ours: float, target: float | None = None) -> dict[str, Any]:
    """What is reported; a target is a maximum."""
    met = None if target is None else ours <= target
    return {"name": name, "unit": unit, "ours": ours, "peer": None, "ratio": None, "target": target, "met": met}


def show(one: dict[str, Any]) -> str:
    """A row as a line."""
    goal = "" if one["target"] is None else f"  (goal: at most {one['target']:g} {one['unit']}: {'met' if one['met'] else 'missed'})"
    return f"{one['name']}: {one['ours']:.3g} {one['unit']}{goal}"


if __name__ == "__main__":
    main()
