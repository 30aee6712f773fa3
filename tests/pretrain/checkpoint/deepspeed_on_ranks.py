"""What one rank does in the tests of DeepSpeed's files: DeepSpeed's own engine saves, and loads what we wrote.

Called by `run_on_ranks`.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from pretrain.checkpoint.index import FragmentIndex
from pretrain.engine.parallel import Layout
from pretrain.engine.setup import construct_model, initialize_engine
from pretrain.state import TrainState
from tests.training import this_rank, tiny_config, write

STEPS = 3
Bits = dict[str, dict[str, Any]]


def bits_of(commit: Any) -> Bits:
    """Every weight and moment as a text of its bytes, and every scalar, by parameter."""
    with FragmentIndex(commit) as index:
        kinds = {
            name: {kind: index.read_whole(kind, name).view(-1).view(torch.uint8).numpy().tobytes().hex() for kind in index.kinds(name)}
            for name in index.shapes
        }
        return {name: {**kinds[name], **index.scalars[name]} for name in index.shapes}


def learn(engine: DeepSpeedEngine, layout: Layout, num_steps: int, seed: int) -> float:
    """Steps on random tokens, by the engine alone; the last loss."""
    generator = torch.Generator().manual_seed(seed + layout.rank)
    loss = torch.tensor(0.0)
    for _ in range(num_steps * engine.gradient_accumulation_steps()):
        tokens_BT = torch.randint(0, 300, (2, 32), generator=generator)
        loss = engine(tokens_BT, tokens_BT)
        engine.backward(loss / 64, scale_wrt_gas=False)
        engine.step()
    return loss.item()


def save_with_deepspeed(dataset: str, runs: str, out: str, cases: dict[str, dict[str, str]], seed: int) -> dict[str, Any]:
    """Each case learns a little and is saved by DeepSpeed itself, in OUT/NAME; returns the bits of what it then held."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, model__dropout="0.0", **overrides)
        engine = initialize_engine(config, layout, construct_model(config, layout))
        learn(engine, layout, STEPS, seed)
        engine.save_checkpoint(f"{out}/{name}")
        commit = write(engine, Path(out) / f"{name} as slices", layout, TrainState(STEPS))
        result[name] = bits_of(commit) if layout.rank == 0 else {}
    return result


def load_with_deepspeed(dataset: str, runs: str, exported: str, out: str, cases: dict[str, dict[str, str]], seed: int) -> dict[str, Any]:
    """An engine of each case, with other weights and settings, loads EXPORTED by DeepSpeed's universal loader and learns a step.

    Returns the bits that it held in between, its groups' decay, its step and the loss of the step.
    """
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, model__dropout="0.0", run__seed="99", **overrides)
        config = config.model_copy(update={"deepspeed": {**config.deepspeed, "checkpoint": {"load_universal": True}}})  # ours refuses it
        engine = initialize_engine(config, layout, construct_model(config, layout))
        learn(engine, layout, 1, seed + 7)
        path, client_state = engine.load_checkpoint(exported)
        assert path is not None
        bits = bits_of(write(engine, Path(out) / name, layout, TrainState(STEPS)))
        decay = [group["weight_decay"] for group in engine.optimizer.param_groups]
        steps, state = engine.global_steps, client_state["pretrain"]["state"]
        result[name] = {"bits": bits, "decay": decay, "steps": steps, "state": state, "loss": learn(engine, layout, 1, seed)}
    return result
