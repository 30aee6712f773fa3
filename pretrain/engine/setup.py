"""Run configuration -> `deepspeed.initialize`.

In: a `RunConfig`, a `Layout`, a model. Out: DeepSpeed's own engine, not wrapped. The user's `deepspeed:` section is
passed on word for word; the keys below are ours (`configs/deepspeed_keys.py` refuses them there).

| model | optimizer class DeepSpeed chooses | gradients |
| --- | --- | --- |
| bf16, stage 1 | BF16_Optimizer | fp32, unsharded, reduced in one piece at the boundary |
| bf16, stage 2 | DeepSpeedZeroOptimizer | fp32, sharded |
| fp32, stage 1 or 2 | DeepSpeedZeroOptimizer | fp32 |
| any, stage 3 | DeepSpeedZeroOptimizer_Stage3 | fp32, sharded |
| fp32, stage 0 | none: torch's own | fp32 |
"""

import contextlib
import copy
import io
import logging
import os
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine

from configs.schema import RunConfig
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.parallel import Layout

LARGEST_BUCKET = 500_000_000
"""Elements; DeepSpeed's own default."""


def deepspeed_config(config: RunConfig, num_data_ranks: int, num_parameters: int) -> dict[str, Any]:
    """The configuration DeepSpeed is given. Raises ValueError when the batch does not divide over the ranks."""
    settings = copy.deepcopy(config.deepspeed)
    zero = settings["zero_optimization"] = settings.get("zero_optimization") or {}  # null: a heading with nothing below
    zero["stage"] = config.parallel.zero_stage
    if config.run.deterministic:
        zero["overlap_comm"] = False
    # It allocates its buckets whole: gigabytes, cleared at each step, for a model of a few thousand parameters.
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(bucket, min(LARGEST_BUCKET, num_parameters))
    settings |= {
        "train_batch_size": config.training.global_batch_samples,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_samples,
        "gradient_accumulation_steps": config.training.accumulation(num_data_ranks),
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    # Torch's own AdamW is not on DeepSpeed's list of optimizers tested with ZeRO; our resume tests are its test.
    settings.setdefault("zero_allow_untested_optimizer", True)
    if config.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return settings


def initialize_engine(config: RunConfig, layout: Layout, model: torch.nn.Module) -> DeepSpeedEngine:
    """The engine for a model whose weights are set. Collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use past its own logger
        engine, *_ = deepspeed.initialize(
            model=model.to(layout.device),
            optimizer=build_optimizer(model, config.optimizer),
            config=deepspeed_config(config, layout.data_size, sum(parameter.numel() for parameter in model.parameters())),
        )
    return engine
