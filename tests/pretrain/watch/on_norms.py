"""What one rank does in the test of norms; called by `run_on_ranks`, arguments and results are JSON."""

from typing import Any

import torch

from pretrain.engine.gradients import loss_scale, owned_gradients
from pretrain.engine.setup import construct_model, initialize_engine
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from pretrain.start import count_parameters
from pretrain.train import gradient_norm, owned_weights
from pretrain.watch.norms import Norms
from tests.training import this_rank, tiny_config

MICRO_STEPS = 2


def measure(dataset: str, runs: str, cases: dict[str, dict[str, str]]) -> dict[str, Any]:
    """One step of each case on all ranks; its norms, the global one that DeepSpeed tells, and how many gradients this rank had."""
    layout, result = this_rank(), {}
    for name, overrides in cases.items():
        config = tiny_config(dataset, runs, model__dropout="0.0", **overrides)
        engine = initialize_engine(config, layout, construct_model(config, layout))
        norms, num_owned = Norms(engine.param_names.values(), layout.device), 0
        for micro_step in range(MICRO_STEPS):
            tokens_BT = micro_batch(layout.rank, micro_step)
            loss = engine(tokens_BT, tokens_BT)
            engine.backward(loss * layout.data_size / num_targets(layout.data_size), scale_wrt_gas=False)
            if micro_step + 1 == MICRO_STEPS:
                owned = list(owned_gradients(engine))
                num_owned = sum(elements.numel() for _, elements in owned)
                norms.see_gradients(owned, loss_scale(engine))
            engine.step()
        found = norms.read(owned_weights(engine, layout))
        again = norms.read(owned_weights(engine, layout))  # no gradient was seen since
        result[name] = {
            "norms": found,
            "without": sorted(set(found) - set(again)),
            "told": gradient_norm(engine),
            "num_owned": num_owned,
            "num_parameters": count_parameters(engine),
            "weights": norms_of({key: value.float() for key, value in whole_weights(engine).items()}),
            "loss_scale": loss_scale(engine),
        }
    return result


def micro_batch(rank: int, micro_step: int) -> torch.Tensor:
    """(2, 32) tokens, others on each rank and in each micro-step."""
    return (torch.arange(64) * (3 + rank + 2 * micro_step) + 17 * rank).view(2, 32) % 300


def num_targets(num_ranks: int) -> int:
    """Of the step, over all ranks."""
    return num_ranks * MICRO_STEPS * 64


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The weights that the model computes with, put together."""
    from deepspeed import zero

    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def norms_of(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """By layer as the names have them, reckoned another way: all elements of a layer in one vector."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.split(".")[0]
        layers.setdefault(layer, []).append(tensor.double().flatten())
    return {layer: float(torch.cat(parts).norm()) for layer, parts in layers.items()}


def gradients_alone(dataset: str, runs: str, num_ranks: int) -> dict[str, float]:
    """Of one model in fp32 that is fed the whole batch at once, in this process."""
    config = tiny_config(dataset, runs, model__dropout="0.0", precision="fp32")
    model = Decoder(config.model)
    initialize_weights(model, model.section, config.run.seed)
    tokens_BT = torch.cat([micro_batch(rank, micro_step) for rank in range(num_ranks) for micro_step in range(MICRO_STEPS)])
    (model(tokens_BT, tokens_BT) / num_targets(num_ranks)).backward()
    return norms_of({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
