"""Which ranks are together: the one place that asks.

In: the environment that the supervisor (or any torch launcher) set. Out: a `Layout`. Today every rank holds
other data; sequence and tensor parallel ranks will share data with their neighbours, and then only this file
changes: everything else asks for `data_rank` and `data_size`, never for the world.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as distributed

# Longer than the longest phase in which one rank works alone (hashing or writing its part of a checkpoint).
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Layout:
    """This rank's place. The data ranks are those among which the global batch is divided."""

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    device: torch.device

    def total_over_data_ranks(self, value: float) -> torch.Tensor:
        """Sum of one number over the data ranks: a collective; a 0-dim tensor in float64 that the host does not wait for."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total

    def sum_over_data_ranks(self, value: float) -> float:
        """The same as a number, for which the host waits."""
        return float(self.total_over_data_ranks(value).item())

    def gather(self, value: Any) -> list[Any]:
        """A value of each data rank, on all of them (a blocking collective; what is sent is pickled)."""
        values: list[Any] = [None] * self.data_size
        distributed.all_gather_object(values, value)
        return values


def initialize_layout() -> Layout:
    """Join the process group (nccl with GPUs, gloo without) and take this rank's device."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        _do_without_compiled_collectives()
    deepspeed.init_distributed(backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return Layout(rank, world_size, data_rank=rank, data_size=world_size, device=device)


def _do_without_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU's first run.

    They serve `inference_all_reduce` only (deepspeed/comm/torch.py, 0.19.8); building them takes half a minute, needs
    a compiler, and a killed build leaves a lock on which every later run waits for ever.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
