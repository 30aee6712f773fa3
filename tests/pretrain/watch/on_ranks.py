"""What one rank does in the tests of this room; called by `run_on_ranks`, arguments and results are JSON."""

import atexit
import math
import os
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as distributed

from pretrain.data.batches import MicroBatch
from pretrain.engine.parallel import Layout
from pretrain.watch.evaluate import evaluate
from pretrain.watch.verdicts import Verdicts


def hear_verdicts() -> dict[str, Any]:
    """Three steps: as usual, a stop asked of rank 1 only and both have written, a NaN on rank 0 only; one not applied alike.

    Then an evaluation."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    layout = Layout(rank, world_size, rank, world_size, torch.device("cpu"))
    verdicts, heard = Verdicts(layout), []
    for step, losses, stop in ((1, (1.0, 2.0), False), (2, (2.0, 3.0), rank == 1), (3, (float("nan"), 1.0), False)):
        verdicts.add(torch.tensor(losses[rank]))
        verdicts.send(step, torch.tensor(4.0), stop, save_written=step == 2, applied=step != 3)
        heard.append(str(verdicts.read(now=False)))
    heard.append(str(verdicts.read(now=True)))
    verdicts.send(4, torch.tensor(4.0), False, save_written=False, applied=rank == 0)
    try:
        heard.append(str(verdicts.read(now=True)))
    except RuntimeError as error:
        heard.append(str(error))

    class Model(torch.nn.Module):
        def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor, **_: torch.Tensor | None) -> torch.Tensor:
            return labels_BT.sum().float()

    nats = ((1, 5), (2, 6)) if rank == 0 else ((3, 7), (4, 8))
    batches = [MicroBatch(torch.zeros(1, 1), torch.tensor([[value]]), num_valid) for value, num_valid in nats]
    found = evaluate(Model(), batches, 100, layout.sum_over_data_ranks)
    # Nothing is left to do: without it the interpreter's end aborts now and then (a thread of torch that nobody joined).
    atexit.register(os._exit, 0)
    return {"heard": heard, "held_out": asdict(found), "bits_per_byte": 10 / math.log(2) / 100}
