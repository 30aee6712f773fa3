"""Between DeepSpeed's engine and slices by name: what a rank writes, and how an engine is filled from any commit.

Each rank writes the fp32 weight and the optimizer's moments of the parameter slices it owns. A slice's key is `kind|parameter|start`; it is
one row of elements of the flattened parameter. Low-precision weights are not written: they are the fp32 weights, rounded.

What we read of DeepSpeed's insides is listed in `owned_slices`, `prepare_weights` and `refresh_weights` and nowhere else
(checked on 0.19.8; tests/pretrain/checkpoint/test_fragments.py holds a contract for each stage).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from pretrain.checkpoint.image import Image
from pretrain.checkpoint.index import BUFFER, WEIGHT, FragmentIndex

HEADER_BYTES = 1 << 20
"""Room for what is said beside the elements; where it is more, the arena grows."""
COMPARED_AT_ONCE = 1 << 17
"""Elements, on a CPU."""
HYPER_PARAMETERS = ("name", "peak_lr", "weight_decay", "betas", "eps", "momentum")


@dataclass(frozen=True)
class OwnedSlice:
    """A run of elements of one flattened parameter that this rank holds in fp32."""

    parameter: str
    shape: tuple[int, ...]
    start: int
    """First element, counted in the flattened parameter."""
    count: int
    flat: torch.Tensor
    """The fp32 tensor that holds it (of a frozen parameter: itself); also its key in the optimizer's state."""
    offset: int
    """Where it begins in `flat`."""
    live: torch.Tensor | None
    """The elements that the model computes with, shape [count], where they are not these."""
    is_whole: bool = False
    """Whether every rank holds it, so that each writes a share."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice's elements of `flat`, or of a moment of the same shape (a view, shape [count])."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def torch_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers, whose `state` holds the moments."""
    optimizer = _wrapper(engine)
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _wrapper(engine: DeepSpeedEngine) -> Any:
    """DeepSpeed's own optimizer, whose insides no type describes."""
    return engine.optimizer


def _module(engine: DeepSpeedEngine) -> nn.Module:
    return cast(nn.Module, engine.module)


def owned_slices(engine: DeepSpeedEngine) -> list[OwnedSlice]:
    """Every slice this rank holds. At stage 0 each rank holds everything; frozen parameters lie whole below stage 3."""
    optimizer, names = _wrapper(engine), engine.param_names
    slices: list[OwnedSlice] = []
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for sub_group, parameters in enumerate(optimizer.fp16_groups):
            flat = optimizer.fp32_partitioned_groups_flat[sub_group]
            for parameter in parameters:
                _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = optimizer._get_param_partition_rank(parameter) * share
                count = min(share, parameter.ds_numel - start)  # the last rank's share may end in padding
                if count > 0:
                    live = parameter.ds_tensor.detach().view(-1)[:count]
                    slices.append(OwnedSlice(names[parameter], tuple(parameter.ds_shape), start, count, flat, offset, live))
    elif stage in (1, 2):
        bf16_optimizer = hasattr(optimizer, "bf16_groups")
        groups = optimizer.bf16_groups if bf16_optimizer else optimizer.bit16_groups
        flats = optimizer.fp32_groups_flat_partition if bf16_optimizer else optimizer.single_partition_of_fp32_groups
        for parameters, flat in zip(groups, flats, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping  # None where this rank owns nothing of the parameter
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    live = parameter.detach().view(-1)[low.start : low.start + low.numel]
                    slices.append(OwnedSlice(names[parameter], tuple(parameter.shape), low.start, low.numel, flat, high.start, live))
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                slices.append(OwnedSlice(names[parameter], tuple(parameter.shape), 0, parameter.numel(), parameter, 0, None, True))
    return slices + [_frozen_slice(engine, name, one) for name, one in _module(engine).named_parameters() if not one.requires_grad]


def owned_bytes(engine: DeepSpeedEngine) -> int:
    """What a save of this rank takes at most with an optimizer of two moments, for all that it holds alone."""
    share = engine.world_size if engine.zero_optimization_stage() == 0 else 1
    return sum(3 * 4 * piece.count for piece in owned_slices(engine)) // share + HEADER_BYTES


def _frozen_slice(engine: DeepSpeedEngine, name: str, parameter: Any) -> OwnedSlice:
    if engine.zero_optimization_stage() < 3:
        return OwnedSlice(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, None, True)
    share = parameter.ds_tensor.ds_numel
    start = min(engine.global_rank * share, parameter.ds_numel)
    count = min(share, parameter.ds_numel - start)
    return OwnedSlice(name, tuple(parameter.ds_shape), start, count, parameter.ds_tensor, 0, None)


def _persistent_buffers(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state; equal on all ranks, as far as training is concerned."""
    kept = _module(engine).state_dict().keys()
    return {name: buffer for name, buffer in _module(engine).named_buffers() if name in kept}


def check_slices(engine: DeepSpeedEngine) -> None:
    """That the weights the model computes with are these slices, rounded. Raises RuntimeError, naming the parameter.

    A DeepSpeed whose insides mean something else than we take them for (`round_robin_gradients` of 0.19.8 does) would otherwise write a
    checkpoint of something else than was trained, and nobody would see it before it is loaded.
    """
    slices = [piece for piece in owned_slices(engine) if piece.live is not None]
    equal = [_equal_bits(piece.of(piece.flat), piece.live) for piece in slices if piece.live is not None]
    if equal and not bool(torch.stack(equal).all()):  # one wait for the device
        wrong = [piece.parameter for piece, same in zip(slices, equal, strict=True) if not same]
        raise RuntimeError(
            f"the fp32 weights that DeepSpeed holds for {', '.join(wrong[:3])} are not those of the model, rounded; a checkpoint would "
            "hold other weights than were trained. Nothing is saved. An option in the section `deepspeed:` may be the cause."
        )


def _equal_bits(master: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Whether `live` is `master`, rounded; on an accelerator not yet known when this returns."""
    integers = {4: torch.int32, 2: torch.int16}[live.element_size()]
    if live.device.type != "cpu":
        return (master.to(live.device, live.dtype).view(integers) == live.view(integers)).all()
    parts = zip(master.split(COMPARED_AT_ONCE), live.split(COMPARED_AT_ONCE), strict=True)  # of which the rounded copy stays in the cache
    return torch.tensor(all(torch.equal(one.to(live.dtype).view(integers), other.view(integers)) for one, other in parts))


def image_of(engine: DeepSpeedEngine, rank: int, world_size: int, extra: dict[str, Any]) -> Image:
    """What this rank writes: views of the engine's own tensors. `extra` goes into the JSON. Not a collective."""
    optimizer = torch_optimizer(engine)
    tensors: dict[str, torch.Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for piece in owned_slices(engine):
        moments = optimizer.state.get(piece.flat, {})
        scalars = {key: float(value) for key, value in moments.items() if not torch.is_tensor(value) or value.dim() == 0}
        parameters[piece.parameter] = {"shape": list(piece.shape), "scalars": scalars}
        elementwise = {
            key: value for key, value in moments.items() if torch.is_tensor(value) and value.numel() == piece.flat.numel() and value.dim()
        }
        low, high = 0, piece.count
        if piece.is_whole:
            low, high = piece.count * rank // world_size, piece.count * (rank + 1) // world_size
        if high > low:
            for kind, tensor in {WEIGHT: piece.flat, **elementwise}.items():
                tensors[f"{kind}|{piece.parameter}|{piece.start + low}"] = piece.of(tensor)[low:high].float()
    buffers = _persistent_buffers(engine) if rank == 0 else {}
    tensors |= {f"{BUFFER}|{name}|0": buffer.detach().reshape(-1) for name, buffer in buffers.items()}
    about = {
        "parameters": parameters,
        "buffers": {name: list(buffer.shape) for name, buffer in buffers.items()},
        "groups": [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in optimizer.param_groups],
        "loss_scale": _loss_scale(engine),
    }
    return Image(rank, tensors, about | extra)


def _loss_scale(engine: DeepSpeedEngine) -> dict[str, float]:
    """Where fp16's scale of the loss stands; nothing with other precisions."""
    scaler = getattr(_wrapper(engine), "loss_scaler", None) if engine.fp16_enabled() else None
    return {key: getattr(scaler, key) for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis") if hasattr(scaler, key)}


def prepare_weights(engine: DeepSpeedEngine) -> None:
    """Before `read_fragments`: at stage 3 every parameter is cut into its parts. Collective."""
    if engine.zero_optimization_stage() == 3:
        _wrapper(engine).checkpoint_event_prologue()


@torch.no_grad()
def read_fragments(engine: DeepSpeedEngine, index: FragmentIndex, with_moments: bool = True) -> None:
    """Fill what this rank holds of fp32 weights, moments and buffers; `refresh_weights` then derives the rest. Not a collective.

    with_moments: false leaves the optimizer, and fp16's scale of the loss, as they are.
    Raises DamageError where a file is not what was committed: the engine is then half filled, and has to be filled from another commit.
    Raises ValueError when the commit's parameters are not the model's.
    """
    model = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _module(engine).named_parameters()}
    buffers = _persistent_buffers(engine)
    wanted = model | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    if (found := index.shapes | index.buffers) != wanted:
        different = sorted(set(found.items()) ^ set(wanted.items()))[:4]
        raise ValueError(f"{index.folder} holds other parameters than the model has, for example {different}")
    optimizer = torch_optimizer(engine)
    trained = {name for name, parameter in _module(engine).named_parameters() if parameter.requires_grad}
    for piece in owned_slices(engine):
        index.fill(piece.of(piece.flat), WEIGHT, piece.parameter, piece.start)
        if piece.parameter not in trained or not with_moments:
            continue
        state = optimizer.state[piece.flat]
        for kind in sorted(index.kinds(piece.parameter) - {WEIGHT}):
            if kind not in state:
                state[kind] = torch.zeros_like(piece.flat, requires_grad=False)
            index.fill(piece.of(state[kind]), kind, piece.parameter, piece.start)
        for key, value in index.scalars[piece.parameter].items():
            state[key] = torch.tensor(value, dtype=torch.float32, device=piece.flat.device)
    for name, buffer in buffers.items():
        buffer.copy_(index.read_whole(BUFFER, name))
    for key, value in index.loss_scale.items() if with_moments and _loss_scale(engine) else ():
        setattr(_wrapper(engine).loss_scaler, key, value)


@torch.no_grad()
def refresh_weights(engine: DeepSpeedEngine) -> None:
    """Live (low-precision) weights := fp32 weights, on every rank, the way DeepSpeed itself does it after a step. Collective."""
    optimizer = _wrapper(engine)
    if engine.zero_optimization_stage() == 3:
        for sub_group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            low = optimizer.fp16_partitioned_groups_flat[sub_group]
            low.data.copy_(flat.data)
            parts = optimizer.fp16_partitioned_groups[sub_group]
            for part, updated in zip(parts, optimizer.unflatten(low, parts), strict=True):
                part.data = updated.data
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage() in (1, 2):
        optimizer._link_all_hp_params()
        # DeepSpeed links moments once, at the first step, and group by group: without the reset, later groups stay unlinked.
        optimizer._hp_optimizer_states_linked = False
        optimizer.update_lp_params()
        optimizer._lazy_init_hp_params_optimizer_state()
