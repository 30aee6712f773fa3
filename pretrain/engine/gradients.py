"""The gradients of a step, and what DeepSpeed knows of them.

In: an engine between `backward` and `step` of the last micro-step, when gradients are reduced and not yet clipped; behind `step` they are
gone. Out: of every parameter the part that this rank holds. What we read of DeepSpeed's insides for it is listed in `owned_gradients` and
nowhere else (checked on 0.19.8; tests/pretrain/watch/test_norms.py holds a contract for each stage).
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_local_grad


def owned_gradients(engine: DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter's name and the elements of its gradient that this rank holds, flat; with fp16 times the scale of the loss.

    The ranks together hold every element once; at stage 0, where all hold everything, it is rank 0 that has them.
    """
    stage, module = engine.zero_optimization_stage(), cast(torch.nn.Module, engine.module)
    parameters: list[tuple[str, Any]] = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    for name, parameter in parameters:
        if stage == 3:
            share = parameter.ds_tensor.ds_numel
            count = min(share, max(0, parameter.ds_numel - engine.global_rank * share))  # the last rank's share may end in padding
            if count:
                yield name, safe_get_local_grad(parameter).view(-1)[:count]
        elif stage in (1, 2):
            mapping = parameter._hp_mapping  # None where this rank owns nothing of the parameter
            if mapping is not None:
                gradient, mine = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1), mapping.lp_fragment_address
                # In bf16 at stage 1 every rank has the whole gradient.
                yield name, gradient.narrow(0, mine.start, mine.numel) if gradient.numel() == parameter.numel() else gradient
        elif engine.global_rank == 0 and parameter.grad is not None:
            yield name, parameter.grad.view(-1)


def loss_scale(engine: DeepSpeedEngine) -> float | None:
    """What fp16's loss is multiplied with in the backward pass; None with other precisions."""
    optimizer: Any = engine.optimizer
    return float(optimizer.loss_scale) if engine.fp16_enabled() else None
