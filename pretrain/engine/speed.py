"""What makes a step fast, or small, without the model's knowledge: compiled layers, recomputed activations, fp8.

In: a model whose layers are `model.blocks`, the section `performance`. Out: the same model, computed otherwise.

Each layer's `forward` is replaced on the instance, and not the layer: the hooks by which ZeRO-3 gathers its weights stay
outside of what is compiled or computed again, and names of parameters stay what they are.
"""

import functools
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configs.errors import UserError
from configs.schema import PerformanceSection, RunConfig
from pretrain.model.attention import takes_blocks

LARGEST_NUMBER_OF_GRAPHS = 64
"""Of one function: training and evaluation, each of a mixture's sequence lengths. Beyond it torch would fall back to eager."""


def activation_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What is computed in, where that is not the dtype of the weights.

    A CPU without matrix units for bf16 takes 1.6 to 1.9 times as long for a product of bf16 matrices as for one of fp32 (RESULTS.md):
    there bf16 weights are cast where they are used, and everything else stays in fp32.
    """
    if device.type == "cpu" and precision == "bf16" and not torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage]
        return torch.float32
    return None


def compiles(section: PerformanceSection, device: torch.device) -> bool:
    """Whether layers and loss are compiled on this device."""
    return section.compile if section.compile is not None else device.type == "cuda"


def announce_compiling(config: RunConfig, device: torch.device) -> str:
    """What is compiled in the first step, to be said before it, as that takes a while; empty where nothing is."""
    parts = [
        *(["layers and loss"] if compiles(config.performance, device) else []),
        *(["Muon's steps"] if config.optimizer.kind == "muon" else []),  # by DeepSpeed
    ]
    return f"; {' and '.join(parts)} are compiled in the first step" if parts else ""


def choose_attention(config: RunConfig, device: torch.device) -> str:
    """Choose the kernels of attention before the first forward; returns which, and why, in a sentence.

    The decoder takes FlexAttention's blocks or PyTorch's own attention (`pretrain.model.attention.takes_blocks`); of the latter's flash
    kernels the newest that is installed computes it here: flash-attention 4 or 3, else the one that PyTorch brings along.
    """
    model = config.model
    wants = [
        *(["documents kept apart"] if config.training.separate_documents else []),
        *([f"a window of {model.sliding_window}"] if model.sliding_window is not None else []),
        *(["prefixes"] if config.objective.kind == "prefix" else []),
    ]
    masked = f" with a mask ({', '.join(wants)})" if wants else ", causal"
    if device.type != "cuda":
        kind = "step by step for attention_softcap" if model.attention_softcap is not None else "PyTorch's fused kernel"
        return f"attention on {device.type}: {kind}{masked}"
    if takes_blocks(device, model.features_per_head, model.dropout) and (wants or model.attention_softcap is not None):
        return f"attention: FlexAttention, compiled; whole blocks are skipped ({', '.join(wants) or 'causal, with attention_softcap'})"
    why = f": FlexAttention knows no dropout and no heads below 16 features, found {model.dropout:g} and {model.features_per_head}"
    return f"attention: PyTorch's {_newest_flash_attention()}{masked}{why if wants else ''}"


def _newest_flash_attention() -> str:
    """Let PyTorch use the newest flash-attention that is installed (where it can: torch 2.11 or newer); its name."""
    names = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    for name in sorted(names, reverse=True):
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
        except Exception:  # not installed, or not for this GPU: each says it in its own way
            continue
        return f"fused kernel with {name}"
    return "fused kernel (cuDNN or flash)"


def prepare_compiler(section: PerformanceSection, device: torch.device) -> None:
    """Say where compiled code is kept; before anything is compiled. Raises UserError on a CPU without a C++ compiler."""
    if not compiles(section, device):
        return
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"performance.compile is true, but there is no C++ compiler {compiler!r}; install one, or set it to false.")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", section.compile_folder())
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(section.compile_folder(), "triton"))  # noqa: PTH118
    torch._dynamo.config.recompile_limit = LARGEST_NUMBER_OF_GRAPHS  # pyright: ignore[reportPrivateUsage]


def speed_up(model: nn.Module, section: PerformanceSection, device: torch.device) -> None:
    """Replace the layers' `forward` as `section` asks. A model of the user's own without `blocks` is left as it is, and refused
    where that was asked for (UserError)."""
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        if section.compile or section.activation_checkpointing or section.fp8:
            raise UserError(
                "model.implementation has no `blocks` that performance.compile, activation_checkpointing and fp8 could work on; "
                "give it that list of layers, or remove the three."
            )
        return
    if section.fp8:
        use_fp8(blocks, device)
    for block in blocks:
        if section.activation_checkpointing is not None:
            block.forward = recompute(block.forward, section.activation_checkpointing == "selective")
        if compiles(section, device):
            block.forward = torch.compile(block.forward, dynamic=False)


def recompute(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    """`forward`, of which the backward pass computes again what was not kept (Chen et al. 2016; selective: Korthikanti et al. 2022)."""
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_products_and_attention)
        # It warns of operations in place, of which there are none here.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    return functools.partial(checkpoint, forward, **how)


def keep_products_and_attention(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    """What is dear to compute is kept; the rest is elementwise and cheap."""
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (
        *("mm", "addmm", "bmm"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}


def use_fp8(blocks: nn.Module, device: torch.device) -> None:
    """The layers' linear maps in fp8 with scales of their own for each tensor (torchao). Raises UserError where that cannot be."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("performance.fp8 needs a GPU with fp8 units (compute capability 8.9 or more); set it to false.")
    try:
        from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("performance.fp8 needs torchao: pip install torchao.") from None
    convert_to_float8_training(blocks, module_filter_fn=_fits_fp8)


def _fits_fp8(module: nn.Module, _name: str) -> bool:
    """fp8 units take matrices whose sides are multiples of 16."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
