"""Run configuration -> `deepspeed.initialize`.

In: a `RunConfig`, a `Layout`, a model. Out: DeepSpeed's own engine, not wrapped. The user's `deepspeed:` section is
passed on word for word; the keys below are ours (`configs/deepspeed_keys.py` refuses them there).

| model | optimizer class DeepSpeed chooses | gradients |
| --- | --- | --- |
| bf16, stage 1 | BF16_Optimizer | fp32, unsharded, reduced in one piece at the boundary |
| bf16, stage 2 | DeepSpeedZeroOptimizer | fp32, sharded |
| fp16, stage 1 or 2 | DeepSpeedZeroOptimizer, with its loss scaler | fp32, at stage 2 sharded |
| fp32, stage 1 or 2 | DeepSpeedZeroOptimizer | fp32 |
| any, stage 3 | DeepSpeedZeroOptimizer_Stage3 | fp32, sharded |
| fp32, stage 0 | none: torch's own, or MuonWithAuxAdam as it is | fp32 |

Muon needs whole matrices of gradients, reduced and clipped: the first and the last row have them, the others refuse it (optimizer.py).
"""

import contextlib
import copy
import functools
import io
import logging
import os
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine, zero
from deepspeed.utils import set_z3_leaf_modules

from configs.schema import RunConfig
from pretrain.engine.optimizer import build_optimizer, check_groups
from pretrain.engine.parallel import Layout
from pretrain.engine.speed import activation_dtype, compiles, prepare_compiler, speed_up
from pretrain.model.build import build_model, choose_loss
from pretrain.model.weights import first_weights, initialize_weights

LARGEST_BUCKET = 500_000_000
"""Elements; DeepSpeed's own default."""


def deepspeed_config(config: RunConfig, num_data_ranks: int, num_parameters: int) -> dict[str, Any]:
    """The configuration DeepSpeed is given. Raises ValueError when the batch does not divide over the ranks."""
    settings = copy.deepcopy(config.deepspeed)
    sharding = settings["zero_optimization"] = settings.get("zero_optimization") or {}  # null: a heading with nothing below
    sharding["stage"] = config.parallel.zero_stage
    if config.run.deterministic:
        sharding["overlap_comm"] = False
    # It allocates its buckets whole: gigabytes, cleared at each step, for a model of a few thousand parameters.
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        sharding.setdefault(bucket, min(LARGEST_BUCKET, num_parameters))
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
    if config.precision != "fp32":
        settings |= {config.precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if config.optimizer.offload:
        pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        sharding["offload_optimizer"] = pinned | (sharding.get("offload_optimizer") or {})
    return settings


def construct_model(config: RunConfig, layout: Layout, with_weights: bool = True) -> torch.nn.Module:
    """The run's model with its first weights, the same at every ZeRO stage and number of ranks. Collective.

    At stage 3 a parameter is cut into the ranks' parts as soon as it is made, so that no rank ever holds the whole model.
    with_weights: false leaves them unset, for a checkpoint to fill.
    """
    compiled, memory_bytes = compiles(config.performance, layout.device), config.performance.loss_memory_bytes
    loss = choose_loss(config.objective, compiled=compiled, memory_bytes=memory_bytes)
    dtype = activation_dtype(config.precision, layout.device)
    build = functools.partial(build_model, config.model, config.objective, loss=loss, activation_dtype=dtype)
    if config.parallel.zero_stage < 3:
        model = build()
        if with_weights:
            initialize_weights(model, config.model, config.run.seed)
        return model
    settings = deepspeed_config(config, layout.data_size, LARGEST_BUCKET)
    settings = {key: settings[key] for key in ("zero_optimization", config.precision) if key in settings}
    with _silence(), zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1, **settings}):
        model = build()
    if not with_weights:
        return model
    weight = first_weights(config.model, config.run.seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0):
            if layout.rank == 0:
                parameter.copy_(weight(name, tuple(parameter.shape)))
    return model


def initialize_engine(config: RunConfig, layout: Layout, model: torch.nn.Module) -> DeepSpeedEngine:
    """The engine for a model whose weights are set. Collective."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = model.to(layout.device)
    prepare_compiler(config.performance, layout.device)
    speed_up(model, config.performance, layout.device)
    if config.parallel.zero_stage == 3 and (blocks := getattr(model, "blocks", None)):
        set_z3_leaf_modules(model, list({type(block) for block in blocks}))  # gathered whole, once, outside of what is compiled
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    with _silence():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            config=deepspeed_config(config, layout.data_size, num_parameters),
        )
    check_groups(engine.optimizer, config.optimizer)
    if (config.deepspeed.get("compile") or {}).get("deepcompile"):
        engine.compile()  # DeepCompile: DeepSpeed compiles the whole model, with its own gathering and prefetching in the graph
    return engine


def set_global_batch(engine: DeepSpeedEngine, num_samples: int) -> None:
    """Tell DeepSpeed how many samples the next step learns from, between two steps; its accumulation follows."""
    if engine.train_batch_size() != num_samples:
        engine.set_train_batch_size(num_samples)
        engine.micro_steps = 0  # it updates the weights where this count divides by the accumulation


def _silence() -> contextlib.AbstractContextManager[object]:
    """DeepSpeed prints its memory use past its own logger."""
    return contextlib.redirect_stdout(io.StringIO())
