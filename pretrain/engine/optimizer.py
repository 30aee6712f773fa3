"""What changes the weights: parameter groups, AdamW or Muon, and the learning rate as a pure function of tokens.

No scheduler is given to DeepSpeed: it would count steps, freeze on a skipped one, and come back out of a
checkpoint over a new configuration. The loop sets the rate of every group before each step.
"""

import math
from typing import Any

import torch
from torch import nn

from configs.functions import calling, load_function
from configs.schema import OptimizerSection, ScheduleSection, TrainingSection


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Matrices, which are decayed, and vectors (norm scales, biases), which are not; with Muon the matrices of the layers apart.

    Each group knows its name and its own peak learning rate.
    """
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}  # ds_shape: ZeRO-3 has cut it
    groups: dict[str, dict[str, Any]] = {
        "hidden matrices": {"peak_lr": section.muon_peak_lr, "weight_decay": section.weight_decay},
        "matrices": {"peak_lr": section.peak_lr, "weight_decay": section.weight_decay},
        "vectors": {"peak_lr": section.peak_lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "matrices" if len(shapes[name]) >= 2 else "vectors"
            if section.kind == "muon" and kind == "matrices" and name.startswith("blocks."):
                kind = "hidden matrices"
            groups[kind].setdefault("params", []).append(parameter)
    return [{"name": name, "lr": group["peak_lr"], **group} for name, group in groups.items() if "params" in group]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), torch's fused form, on CPU and GPU alike; what else `section.kind` names.

    Raises UserError for an import path that leads nowhere, and for what the user's own function raises.
    """
    groups = parameter_groups(model, section)
    adam: dict[str, Any] = {"betas": (section.beta1, section.beta2), "eps": section.epsilon}
    if section.kind == "adamw" and section.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # imported here: it is compiled when it is made

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **adam)
    if section.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adam)
    if section.kind == "muon":
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # imported here: it compiles its kernels

        for group in groups:
            group["use_muon"] = group["name"] == "hidden matrices"
            group |= {"momentum": section.muon_momentum} if group["use_muon"] else adam
        return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True, **adam})
    function, _ = load_function(section.kind)
    with calling("optimizer.kind", section.kind, "groups, section"):
        return function(groups, section)


def rate_share(tokens_seen: int, training: TrainingSection, schedule: ScheduleSection) -> float:
    """The learning rate after `tokens_seen` tokens of a run of whole steps, as a share of its peak.

    warmup_stable_decay (Hu et al. 2024, MiniCPM): linear rise, plateau, linear fall over `decay_tokens`.
    cosine (Loshchilov & Hutter 2017): linear rise, then half a cosine down to the end.
    """
    total_tokens = training.steps.total_tokens
    if tokens_seen < schedule.warmup_tokens:
        return tokens_seen / schedule.warmup_tokens
    if schedule.kind == "cosine":
        falling = max(1, total_tokens - schedule.warmup_tokens)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (tokens_seen - schedule.warmup_tokens) / falling)))
    else:
        falling = (
            schedule.decay_tokens if schedule.decay_tokens is not None else min(total_tokens // 5, total_tokens - schedule.warmup_tokens)
        )
        share = min(1.0, max(0.0, (total_tokens - tokens_seen) / falling)) if falling else 1.0
    return schedule.final_ratio + (1 - schedule.final_ratio) * share


def set_learning_rate(optimizer: Any, share: float) -> None:
    """Give every group of an optimizer (or of DeepSpeed's wrapper of it) that share of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def check_groups(optimizer: Any, section: OptimizerSection, share: float = 1.0) -> None:
    """That every group of an optimizer holds what the configuration says: its decay, its peak and that share of it as its rate, its betas
    and epsilon, or its momentum. Of a user's own optimizer: decay and peak. Raises RuntimeError, naming the group and what differs.
    """
    for group in optimizer.param_groups:
        name = group["name"]
        peak = section.muon_peak_lr if name == "hidden matrices" else section.peak_lr
        wanted: dict[str, Any] = {"peak_lr": peak, "weight_decay": 0.0 if name == "vectors" else section.weight_decay}
        if ":" not in section.kind:
            wanted["lr"] = peak * share
            is_muon = section.kind == "muon" and name == "hidden matrices"
            wanted |= {"momentum": section.muon_momentum} if is_muon else {"betas": (section.beta1, section.beta2), "eps": section.epsilon}
        found = {key: tuple(value) if isinstance(value := group.get(key), list) else value for key in wanted}
        if different := {key: (found[key], wanted[key]) for key in wanted if found[key] != wanted[key]}:
            rows = ", ".join(f"{key} {has!r} instead of {should!r}" for key, (has, should) in different.items())
            raise RuntimeError(f"the optimizer holds the group {name!r} with other settings than it was given: {rows}")
