"""Who owns which key of DeepSpeed's configuration.

A run file's `deepspeed:` section is DeepSpeed's own JSON, word for word. The keys below are set from
elsewhere or would undo what this project promises; they are refused with the key to use instead.
Everything that is not listed passes through untouched.
"""

import json
from typing import Any, cast

# dotted DeepSpeed key -> what to use instead. `pretrain/engine/setup.py` sets those that name a key of ours.
OWNED_KEYS: dict[str, str] = {
    "train_batch_size": "training.global_batch_samples",
    "train_micro_batch_size_per_gpu": "training.micro_batch_samples",
    "gradient_accumulation_steps": "training.global_batch_samples (accumulation follows from it and the ranks)",
    "gradient_clipping": "optimizer.clip_norm",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision (gradients are accumulated in fp32)",
    "communication_data_type": "precision (gradients are reduced in fp32)",
    "seq_parallel_communication_data_type": "precision (gradients are reduced in fp32)",
    "elasticity": "parallel.processes (a checkpoint is read at any number of ranks as it is)",
    "optimizer": "optimizer.* (the loop owns it)",
    "scheduler": "schedule.* (the learning rate is a pure function of tokens)",
    "data_efficiency": "training.* (the data order is a pure function of the manifest and the seed)",
    "curriculum_learning": "training.* (the data order is a pure function of the manifest and the seed)",
    "checkpoint.load_universal": "nothing: a checkpoint is read at any ZeRO stage and number of ranks as it is",
    "zero_optimization.round_robin_gradients": "nothing: with it DeepSpeed maps slices to the wrong parameters (measured on 0.19.8)",
    "zero_optimization.elastic_checkpoint": "nothing: a checkpoint is read at any number of ranks as it is",
    "sequence_parallel_size": "nothing yet: this version runs data-parallel ranks only",
    "tensor_parallel": "nothing yet: this version runs data-parallel ranks only",
    "steps_per_print": "watch.log_every_steps",
    "wall_clock_breakdown": "nothing: its timers synchronise the device each step",
    "wandb": "watch.wandb",
    "tensorboard": "watch.* (metrics.jsonl holds every value)",
    "comet": "watch.* (metrics.jsonl holds every value)",
    "csv_monitor": "watch.* (metrics.jsonl holds every value)",
}


def check_deepspeed_section(section: dict[str, Any]) -> None:
    """Raise ValueError for a key that is owned elsewhere, naming the key to use instead, and for what JSON cannot hold."""
    try:
        json.dumps(section, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"holds what DeepSpeed's JSON cannot: {error}") from None
    if not isinstance(section.get("zero_optimization") or {}, dict):
        raise ValueError("deepspeed.zero_optimization is a section of DeepSpeed's keys, such as {overlap_comm: true}")
    for dotted, instead in OWNED_KEYS.items():
        here: Any = section
        for part in dotted.split("."):
            if not isinstance(here, dict) or part not in here:
                break
            here = cast("dict[str, Any]", here)[part]
        else:
            raise ValueError(f"deepspeed.{dotted} is not set here; use {instead}")
