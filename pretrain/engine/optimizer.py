"""What changes the weights: parameter groups, AdamW, and the learning rate as a pure function of tokens.

No scheduler is given to DeepSpeed: it would count steps, freeze on a skipped one, and come back out of a
checkpoint over a new configuration. The loop sets the rate of every group before each step.
"""

import math
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerSection, ScheduleSection, TrainingSection


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which are decayed, and vectors (norm scales, biases), which are not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), torch's fused form, on CPU and GPU alike."""
    return torch.optim.AdamW(
        parameter_groups(model, section.weight_decay),
        lr=section.peak_lr,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=True,
    )


def learning_rate(tokens_seen: int, training: TrainingSection, optimizer: OptimizerSection, schedule: ScheduleSection) -> float:
    """The rate after `tokens_seen` tokens of a run of whole steps.

    warmup_stable_decay (Hu et al. 2024, MiniCPM): linear rise, plateau, linear fall over `decay_tokens`.
    cosine (Loshchilov & Hutter 2017): linear rise, then half a cosine down to the end.
    """
    total_tokens = training.total_steps * training.tokens_per_step
    if tokens_seen < schedule.warmup_tokens:
        return optimizer.peak_lr * tokens_seen / schedule.warmup_tokens
    if schedule.kind == "cosine":
        falling = max(1, total_tokens - schedule.warmup_tokens)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (tokens_seen - schedule.warmup_tokens) / falling)))
    else:
        falling = (
            schedule.decay_tokens if schedule.decay_tokens is not None else min(total_tokens // 5, total_tokens - schedule.warmup_tokens)
        )
        share = min(1.0, max(0.0, (total_tokens - tokens_seen) / falling)) if falling else 1.0
    return optimizer.peak_lr * (schedule.final_ratio + (1 - schedule.final_ratio) * share)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group of an optimizer (or of DeepSpeed's wrapper of it) the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
