"""What is not finite changes no weight, at every stage.

DeepSpeed skips a step whose gradient norm is not finite, on all ranks alike, wherever it has an optimizer of its own; at stage 0 in fp32
it has none and would poison the weights (0.19.8; tests/pretrain/engine/test_finite.py looks at every stage).
"""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine


def spread_not_finite(scale: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """The factor of a loss in the backward pass: `scale` (0-dim), or NaN where the loss is not finite, though its gradient might be.

    From the gradient it reaches every rank, by the reduction that happens anyway: nobody has to ask.
    """
    return scale + 0.0 * loss.detach()


def skip_what_is_not_finite(engine: DeepSpeedEngine) -> None:
    """Make a stage 0 engine's `step` change nothing where a gradient is not finite. At other stages it does that already."""
    optimizer: Any = engine.optimizer
    if hasattr(optimizer, "overflow"):
        return
    apply = optimizer.step

    def step() -> None:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # of what was reduced: the same on every rank
        optimizer.overflow = not bool(torch.isfinite(norm))  # the engine reads it
        if not optimizer.overflow:
            apply()

    optimizer.overflow, optimizer.step = False, step
