"""How much memory a rank takes: of its device at most since the last look, of its host at this moment."""

import os

import psutil
import torch


class Memory:
    """Of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process(os.getpid())

    def look(self) -> dict[str, int]:
        """`memory/host_bytes` (resident), and of a GPU `memory/allocated_bytes` (in tensors) and `memory/reserved_bytes` (from the driver),
        each the peak since the last look."""
        found = {"memory/host_bytes": self._process.memory_info().rss}
        if self._device.type == "cuda":
            peaks = torch.cuda.memory_stats(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            found["memory/allocated_bytes"] = peaks["allocated_bytes.all.peak"]
            found["memory/reserved_bytes"] = peaks["reserved_bytes.all.peak"]
        return found
