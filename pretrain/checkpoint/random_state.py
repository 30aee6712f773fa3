"""The random generators of a process, as JSON: python, numpy, torch, each device.

Training draws nothing from them (dropout and data order are functions of the step), so a run resumes exactly at any
number of ranks; they are kept for whatever else draws, and restored where the rank existed before.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed


def describe_random_state() -> dict[str, Any]:
    """This process's generators, as JSON."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}},
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else None,
    }


def restore_random_state(folder: Path, world_size: int) -> None:
    """Restore this rank's generators from a verified commit; at another world size they are left as they are."""
    if world_size != distributed.get_world_size():
        return
    state = json.loads((folder / f"rank_{distributed.get_rank():05d}.json").read_text())["random"]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))
