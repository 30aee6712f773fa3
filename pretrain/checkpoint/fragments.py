"""What is written: slices of parameters by name. What is read: any range of them, at any stage and world size.

Each rank writes the fp32 weight and the optimizer's moments of the parameter slices it owns as one safetensors
file, with a JSON beside it. A slice's key is `kind|parameter|start`; it is one row of float32 from the
flattened parameter. Low-precision weights are not written: they are the fp32 weights, rounded.

What we read of DeepSpeed's insides is listed in `owned_slices` and `_refresh_weights` and nowhere else
(checked on 0.19.8; tests/pretrain/checkpoint/test_fragments.py holds a contract for each stage).
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open

if TYPE_CHECKING:  # reading a checkpoint needs no DeepSpeed
    from deepspeed import DeepSpeedEngine

WEIGHT = "weight"


@dataclass(frozen=True)
class OwnedSlice:
    """A run of elements of one flattened parameter that this rank holds in fp32."""

    parameter: str
    shape: tuple[int, ...]
    start: int
    """First element, counted in the flattened parameter."""
    count: int
    flat: torch.Tensor
    """The fp32 tensor that holds it; also its key in the optimizer's state."""
    offset: int
    """Where it begins in `flat`."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice's elements of `flat`, or of a moment of the same shape (a view, shape [count])."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def torch_optimizer(engine: "DeepSpeedEngine") -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers, whose `state` holds the moments."""
    optimizer = _wrapper(engine)
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _wrapper(engine: "DeepSpeedEngine") -> Any:
    """DeepSpeed's own optimizer, whose insides no type describes."""
    return engine.optimizer


def owned_slices(engine: "DeepSpeedEngine") -> list[OwnedSlice]:
    """Every slice this rank holds. At stage 0 each rank holds everything."""
    optimizer, names = _wrapper(engine), engine.param_names
    slices: list[OwnedSlice] = []
    if engine.zero_optimization_stage() == 3:
        for sub_group, parameters in enumerate(optimizer.fp16_groups):
            flat = optimizer.fp32_partitioned_groups_flat[sub_group]
            for parameter in parameters:
                _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = optimizer._get_param_partition_rank(parameter) * share
                count = min(share, parameter.ds_numel - start)  # the last rank's share may end in padding
                if count > 0:
                    slices.append(OwnedSlice(names[parameter], tuple(parameter.ds_shape), start, count, flat, offset))
    elif engine.zero_optimization_stage() in (1, 2):
        bf16_optimizer = hasattr(optimizer, "bf16_groups")
        groups = optimizer.bf16_groups if bf16_optimizer else optimizer.bit16_groups
        flats = optimizer.fp32_groups_flat_partition if bf16_optimizer else optimizer.single_partition_of_fp32_groups
        for parameters, flat in zip(groups, flats, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping  # None where this rank owns nothing of the parameter
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    slices.append(OwnedSlice(names[parameter], tuple(parameter.shape), low.start, low.numel, flat, high.start))
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                slices.append(OwnedSlice(names[parameter], tuple(parameter.shape), 0, parameter.numel(), parameter, 0))
    return slices


def write_fragments(
    engine: "DeepSpeedEngine", folder: Path, rank: int, world_size: int, extra: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write this rank's `rank_R.safetensors` and `rank_R.json` into `folder`, synced. Not a collective.

    The body is streamed slice by slice and hashed on the way (the safetensors library writes only from whole
    dictionaries in memory). `extra` goes into the JSON. Returns file name -> {bytes, sha256}. Raises OSError.
    """
    state = torch_optimizer(engine).state
    tensors: list[tuple[str, torch.Tensor]] = []
    parameters: dict[str, dict[str, Any]] = {}
    for piece in owned_slices(engine):
        moments = state.get(piece.flat, {})
        scalars = {key: float(value) for key, value in moments.items() if not torch.is_tensor(value) or value.dim() == 0}
        parameters[piece.parameter] = {"shape": list(piece.shape), "scalars": scalars}
        elementwise = {
            key: value for key, value in moments.items() if torch.is_tensor(value) and value.numel() == piece.flat.numel() and value.dim()
        }
        low, high = 0, piece.count
        if engine.zero_optimization_stage() == 0:  # everyone holds everything: each writes its share
            low, high = piece.count * rank // world_size, piece.count * (rank + 1) // world_size
        if high > low:
            for kind, tensor in {WEIGHT: piece.flat, **elementwise}.items():
                tensors.append((f"{kind}|{piece.parameter}|{piece.start + low}", piece.of(tensor)[low:high]))
    name = f"rank_{rank:05d}"
    files = {f"{name}.safetensors": _write_safetensors(folder / f"{name}.safetensors", tensors)}
    text = json.dumps({"rank": rank, "world_size": world_size, "parameters": parameters, **extra}, indent=1).encode()
    files[f"{name}.json"] = _write_hashed(folder / f"{name}.json", iter([text]))
    return files


def _write_safetensors(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    header, position = {}, 0
    for key, tensor in tensors:
        size = tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes]:
        yield struct.pack("<Q", len(text)) + text
        for _, tensor in tensors:
            yield tensor.float().cpu().numpy().tobytes()

    return _write_hashed(path, parts())


def _write_hashed(path: Path, parts: Iterator[bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


class FragmentIndex:
    """Where each range of each parameter lies in a committed folder (already verified). Reads no tensor until asked."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when a parameter has a gap or an overlap."""
        self._places: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        num_files = json.loads((folder / "rank_00000.json").read_text())["world_size"]
        for rank in range(num_files):  # not whatever lies there: a stray file is no part of the checkpoint
            described = folder / f"rank_{rank:05d}.json"
            content = json.loads(described.read_text())
            for parameter, known in content["parameters"].items():
                self.shapes[parameter] = tuple(known["shape"])
                self.scalars[parameter] = known["scalars"]
            path = described.with_suffix(".safetensors")
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    kind, parameter, start = key.split("|")
                    count = file.get_slice(key).get_shape()[0]
                    self._places.setdefault((kind, parameter), []).append((int(start), count, path, key))
        for (kind, parameter), places in self._places.items():
            places.sort(key=lambda place: place[0])
            position = 0
            for start, count, path, _ in places:
                if start != position:
                    raise ValueError(
                        f"{path}: {kind} of {parameter} has {'a gap' if start > position else 'an overlap'} at element {position}"
                    )
                position += count
            if position != torch.Size(self.shapes[parameter]).numel():
                raise ValueError(f"{folder}: {kind} of {parameter} ends at element {position}, its shape is {self.shapes[parameter]}")

    @property
    def kinds(self) -> set[str]:
        """What is stored: `weight` and the names of the optimizer's moments."""
        return {kind for kind, _ in self._places}

    def read(self, kind: str, parameter: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of a flattened parameter, float32, shape [count]. KeyError if it is not stored."""
        result = torch.empty(count)
        for first, length, path, key in self._places[(kind, parameter)]:
            low, high = max(first, start), min(first + length, start + count)
            if low < high:
                with safe_open(path, "pt") as file:
                    result[low - start : high - start] = file.get_slice(key)[low - first : high - first]
        return result

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter whole, fp32: what a single-device model loads."""
        return {
            parameter: self.read(WEIGHT, parameter, 0, torch.Size(shape).numel()).view(shape) for parameter, shape in self.shapes.items()
        }


@torch.no_grad()
def read_fragments(engine: "DeepSpeedEngine", folder: Path) -> None:
    """Fill the engine's fp32 weights and moments from a verified commit, then derive the live weights. Collective.

    Raises ValueError when the commit's parameters are not the model's.
    """
    index, optimizer = FragmentIndex(folder), torch_optimizer(engine)
    slices = owned_slices(engine)
    model = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in cast(torch.nn.Module, engine.module).named_parameters()
    }
    if index.shapes != model:
        different = sorted(set(index.shapes.items()) ^ set(model.items()))[:4]
        raise ValueError(f"{folder} holds other parameters than the model has, for example {different}")
    if engine.zero_optimization_stage() == 3:
        _wrapper(engine).checkpoint_event_prologue()
    for piece in slices:
        piece.of(piece.flat).copy_(index.read(WEIGHT, piece.parameter, piece.start, piece.count))
        state = optimizer.state[piece.flat]
        for kind in sorted(index.kinds - {WEIGHT}):
            if kind not in state:
                state[kind] = torch.zeros_like(piece.flat, requires_grad=False)
            piece.of(state[kind]).copy_(index.read(kind, piece.parameter, piece.start, piece.count))
        for key, value in index.scalars[piece.parameter].items():
            state[key] = torch.tensor(value, dtype=torch.float32, device=piece.flat.device)
    _refresh_weights(engine)


def _refresh_weights(engine: "DeepSpeedEngine") -> None:
    """Live (low-precision) weights := fp32 weights, on every rank, the way DeepSpeed itself does it after a step."""
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


def state_hash(folder: Path) -> str:
    """SHA-256 over every weight, moment and step of a commit, by name: the same for every stage and world size."""
    index, digest = FragmentIndex(folder), hashlib.sha256()
    for parameter in sorted(index.shapes):
        shape = index.shapes[parameter]
        digest.update(f"{parameter}{shape}{sorted(index.scalars[parameter].items())}".encode())
        for kind in sorted(index.kinds):
            digest.update(kind.encode() + index.read(kind, parameter, 0, torch.Size(shape).numel()).numpy().tobytes())
    return digest.hexdigest()
