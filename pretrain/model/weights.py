"""Where weights begin: each parameter's initial value, a pure function of its name, shape and the run's seed.

In: a model whose weights are unset. Out: the same model, filled.
"""

import functools
import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from configs.model_section import ModelSection
from pretrain.model.decoder import Decoder
from pretrain.model.weights_file import imported_weights


def initialize_weights(model: nn.Module, section: ModelSection, seed: int) -> None:
    """Fill every parameter, in place, with `initial_weight` of its name: the only place where weights begin.

    Equal for every order of construction, device, ZeRO stage and number of ranks, because each parameter is
    drawn on its own, on the CPU, in fp32, and cast at the end. Under ZeRO-3, which leaves parameters empty,
    engine/ asks `first_weights` with the full shapes instead. Raises ValueError for a model on the meta device.
    """
    weight = first_weights(section, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device, which holds no values; call model.to_empty(device=...) first")
            parameter.copy_(weight(name, parameter.shape))


def first_weights(section: ModelSection, seed: int) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """What gives the first value of each parameter, by its name and shape, in fp32 on the CPU: drawn, or imported.

    Raises UserError where `initial_weights` names a folder that holds none, and when one is asked for that it does not hold.
    """
    if section.initial_weights is not None:
        return imported_weights(section.initial_weights).read
    return functools.partial(initial_weight, section=section, seed=seed)


def initial_weight(name: str, shape: tuple[int, ...], section: ModelSection, seed: int) -> torch.Tensor:
    """The initial value of the parameter `name`, fp32 on the CPU: a pure function of its arguments.

    Matrices are normal(0, initial_deviation); with `depth_scaled_initialization` those that write into the residual stream are
    divided by sqrt(2 x layers), so that its variance does not grow with depth (GPT-2, Radford et al. 2019, section
    2.3). Single numbers and vectors (scales of norms) are 1, biases 0.
    """
    if len(shape) <= 1:
        return torch.zeros(shape) if name.rpartition(".")[2] == "bias" else torch.ones(shape)
    into_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    deviation = section.initial_deviation
    if into_residual and section.depth_scaled_initialization:
        deviation /= math.sqrt(2 * section.num_layers)
    # NumPy's generator, because PyTorch's on the CPU has 32 bits of seed: too few for a seed per name.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    values = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(deviation)


def parameter_count(section: ModelSection) -> int:
    """Numbers the model learns, exactly; a tied head counts once. Built on the meta device: no memory, for any size."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(section).parameters())
