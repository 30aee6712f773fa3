"""What one rank does in the test of slow ranks; called by `run_on_ranks`, the result is JSON."""

import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as distributed

from pretrain import train as loop
from pretrain.engine.parallel import Layout
from pretrain.model.decoder import Decoder
from pretrain.run.folder import RunFolder
from pretrain.watch.metrics import read_rows
from pretrain.watch.slow_ranks import WINDOW, Pace
from pretrain.watch.step_times import StepClock
from tests.training import StopAfter, hold_lease, this_rank, tiny_config

FORWARD_SECONDS = 0.01


def walk() -> dict[str, Any]:
    """Four times a window and two steps: what was found at which step, if anything."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    layout = Layout(rank, world_size, rank, world_size, torch.device("cpu"))

    def steps(in_forward: Callable[[int], float], for_data: Callable[[int], float]) -> list[Any]:
        """Each forward and each wait for data lasts that much longer on this rank."""
        pace, clock, waited, found = Pace(layout), StepClock(layout.device), 0.0, list[Any]()
        for step in range(1, WINDOW + 3):
            waited += for_data(step)
            for _ in range(2):
                clock.enter("forward")
                time.sleep(FORWARD_SECONDS / 2 + in_forward(step) / 2)
                clock.enter("backward")
            distributed.all_reduce(torch.zeros(1))  # as a backward pass does: the faster rank waits here
            if spread := pace.after_step(clock.end_step(waited)):
                found.append((step, spread.slow, spread.slowest, spread.median_seconds))
        return found

    found = [
        steps(lambda step: 0.0, lambda step: 0.0),
        steps(lambda step: FORWARD_SECONDS * rank, lambda step: 0.0),
        steps(lambda step: 0.0, lambda step: FORWARD_SECONDS * (1 - rank)),
        steps(lambda step: rank * 0.5 * (step % 25 == 0), lambda step: 0.0),
    ]
    return {"node": socket.gethostname(), "found": found}


def train_slowly(dataset: str, runs: str) -> dict[str, Any]:
    """The real loop, a window and two steps, whose forwards take 20 ms longer on rank 1; returns the rows that speak of slow ranks."""
    layout = this_rank()
    config = tiny_config(
        dataset, runs, training__total_tokens=str(256 * (WINDOW + 2)), checkpoint__self_test="false", evaluate__every_steps="null"
    )
    run = RunFolder.of(config)
    if layout.rank == 0:
        hold_lease(run, 1)
    distributed.barrier()
    plain = Decoder.forward

    def forward(self: Decoder, *given: Any, **named: Any) -> Any:
        time.sleep(0.02 * layout.rank)
        return plain(self, *given, **named)

    Decoder.forward = forward  # type: ignore[method-assign]
    outcome = loop.train(config, run, 1, layout, StopAfter(None))
    return {
        "outcome": outcome.kind,
        "rows": [row for row in read_rows(run.path / "metrics.jsonl") if "ranks/slowest" in row or "slow_ranks/rank" in row],
    }
