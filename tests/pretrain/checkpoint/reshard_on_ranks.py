"""What one rank does in the tests of resharding; called by `run_on_ranks`."""

from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.fragments import owned_slices, torch_optimizer
from pretrain.checkpoint.reshard import verify_resharding
from pretrain.checkpoint.verify import read_commit
from pretrain.engine.setup import construct_model, initialize_engine
from tests.training import load, this_rank, tiny_config


def verify_and_spoil(dataset: str, runs: str, commit: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """A commit is read into an engine of each case and verified; then again with one thing changed on the last rank."""
    layout, result = this_rank(), {}
    written = read_commit(Path(commit))

    def verdict(**how: bool) -> str:
        try:
            return verify_resharding(engine, written, **how)
        except RuntimeError as error:
            return str(error)

    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, **overrides)
        engine = initialize_engine(config, layout, construct_model(config, layout))
        result[name] = {"before": verdict()[:40]}
        load(engine, written)
        result[name] |= {"read": verdict(), "weights alone": verdict(with_moments=False)}
        is_last = layout.rank == layout.world_size - 1
        piece = next(piece for piece in owned_slices(engine) if piece.parameter == "final_norm.weight" or not is_last)
        state = torch_optimizer(engine).state[piece.flat]
        values = piece.of(state["exp_avg"])
        before = values.clone()
        if is_last:
            values[0], values[1] = before[1], before[0]
        result[name]["two swapped"] = verdict()
        values.copy_(before)
        if is_last:
            values.view(torch.int32)[3] ^= 1
        result[name] |= {"a bit": verdict(), "a bit of what is not looked at": verdict(with_moments=False)}
        values.copy_(before)
        if is_last:
            state["step"] += 1
        result[name]["a step"] = verdict()
        if is_last:
            state["step"] -= 1
        result[name]["put back"] = verdict()
    return result
