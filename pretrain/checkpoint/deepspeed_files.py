"""DeepSpeed's own checkpoints (`engine.save_checkpoint`, ZeRO stages 1 to 3), read as slices by name.

In: a folder of them, written by any number of ranks. Out: one rank's weights and moments after the other, in the form of a commit. Nothing
is gathered, and DeepSpeed is not imported: where its files name its classes, stand-ins without any code are made (checked on 0.19.8). A
file that names others is a pickle that could run anything, and is opened only if the caller says that it is trusted.
"""

import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from pretrain.checkpoint.image import Image
from pretrain.checkpoint.index import BUFFER, WEIGHT

OPTIMIZER_FILE = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
MOMENTS = {"exp_avg", "exp_avg_sq"}
"""Of Adam, by the names that torch and DeepSpeed have for them."""
TRUST = "--run-its-pickle"
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _Fields:
    """Stands in for a class of DeepSpeed: what its instances hold, and nothing that they do."""


class _Stage(int):
    """Stands in for DeepSpeed's ZeroStageEnum, made of a number."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _stage_of(kind: type, name: str) -> int:
    """Stands in for `getattr`, by which Python 3.11.0 to 3.11.3 write the member of an enumeration down. Nothing else is looked up."""
    if kind is not _Stage or name not in _STAGES:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {name!r}")
    return _STAGES[name]


STAND_INS: dict[str, Any] = {
    "builtins.getattr": _stage_of,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.utils.tensor_fragment.fragment_address": _Fields,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Fields,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Fields,
}


class DeepSpeedFiles:
    """A checkpoint of DeepSpeed's. `image` gives one rank after the other, in the order of ranks, each once."""

    def __init__(self, folder: Path, tag: str | None = None, trusted: bool = False) -> None:
        """folder: what `save_checkpoint` was given, or the folder of a tag. tag: None takes the one that `latest` names.

        Raises UserError for what is no checkpoint of stages 1 to 3, lacks a rank, or is a pickle that asks for trust.
        """
        self.folder = _find(folder, tag)
        self._trusted = trusted
        self._files = _optimizer_files(self.folder)
        self.num_ranks = len(self._files)
        about = self._load(_model_file(self.folder))
        first = self._optimizer(min(self._files))
        self.zero_stage = int(first.get("zero_stage", 1))  # BF16_Optimizer, which is of stage 1, does not say
        count = first.get("partition_count", about.get("dp_world_size"))
        self._check_ranks(max(count) if isinstance(count, (list, tuple)) else count)
        if any(padding for group in first.get("param_alignment_paddings") or () for padding in group):
            raise UserError(f"{self.folder} was written with zero_optimization.parameter_alignment, which is not read; save it without.")
        try:
            self.step, self.skipped_steps = int(about["global_steps"]), int(about["skipped_steps"])
            self._groups: list[dict[str, tuple[int, ...]]] = [
                {name: tuple(shape) for name, shape in group.items()} for group in about["param_shapes"]
            ]
            self.buffers: dict[str, torch.Tensor] = {name: about["module"][name] for name in about["buffer_names"]}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{_model_file(self.folder)} is not as DeepSpeed's stages 1 to 3 write it ({type(error).__name__}: {error})."
            ) from None
        self.shapes = {name: shape for group in self._groups for name, shape in group.items()}
        """Of every parameter that was trained."""
        self.settings = [{key: value for key, value in group.items() if key != "params"} for group in _torch_state(first)["param_groups"]]
        """Of each group of the optimizer."""
        section = about.get("ds_config") or {}
        self.precision = next((name for name in ("bf16", "fp16") if (section.get(name) or {}).get("enabled")), "fp32")
        self._filled: dict[str, int] = defaultdict(int)

    def image(self, rank: int, groups: list[dict[str, Any]], random: dict[str, Any]) -> Image:
        """A rank's part, as a rank of ours writes it. Raises UserError for an optimizer that is not Adam, and for a file that is broken.

        groups: of the optimizer that will go on with it; random: generators, as `describe_random_state` says them.
        """
        state = self._optimizer(rank)
        tensors: dict[str, torch.Tensor] = {}
        parameters: dict[str, dict[str, Any]] = {}
        try:
            found = self._of_stage_3(state, rank) if self.zero_stage == 3 else self._of_stages_1_and_2(state)
            for name, (start, kinds, step) in found.items():
                if kinds.keys() - {WEIGHT} != MOMENTS:
                    raise UserError(
                        f"{self._files[rank]}: the optimizer keeps {sorted(kinds.keys() - {WEIGHT}) or 'nothing'} of {name}, wanted "
                        f"{sorted(MOMENTS)}: only Adam and AdamW are read, after their first step. Begin with the weights alone instead."
                    )
                parameters[name] = {"shape": list(self.shapes[name]), "scalars": {"step": float(step)}}
                tensors |= {f"{kind}|{name}|{start}": values.float().contiguous() for kind, values in kinds.items()}
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self._files[rank]} is not as DeepSpeed's stage {self.zero_stage} writes it ({type(error).__name__}: {error})."
            ) from None
        buffers = self.buffers if rank == 0 else {}
        tensors |= {f"{BUFFER}|{name}|0": buffer.reshape(-1).contiguous() for name, buffer in buffers.items()}
        scaler = vars(state["loss_scaler"]) if state.get("dynamic_loss_scale") else {}
        about = {
            "parameters": parameters,
            "buffers": {name: list(buffer.shape) for name, buffer in buffers.items()},
            "groups": groups,
            "loss_scale": {key: scaler[key] for key in SCALER if key in scaler},
            "random": random,
        }
        return Image(rank, tensors, about)

    def _of_stages_1_and_2(self, state: Mapping[str, Any]) -> dict[str, tuple[int, dict[str, torch.Tensor], float]]:
        """Each group is one row of parameters, cut into equal parts: a parameter's parts come in the order of ranks."""
        found: dict[str, tuple[int, dict[str, torch.Tensor], float]] = {}
        base = _torch_state(state)
        for number, mapping in enumerate(state["param_slice_mappings"]):
            group = base["param_groups"][number]
            moments = base["state"].get(group["params"][0], {})
            flat = state["single_partition_of_fp32_groups"][number]
            for name, place in mapping.items():
                kinds = {kind: values.view(-1).narrow(0, place.start, place.numel) for kind, values in _elementwise(flat, moments).items()}
                found[name] = (self._filled[name], kinds, moments.get("step", group.get("step", 0)))
                self._filled[name] += place.numel
        return found

    def _of_stage_3(self, state: Mapping[str, Any], rank: int) -> dict[str, tuple[int, dict[str, torch.Tensor], float]]:
        """Each parameter is cut into equal parts, the last one padded; those of a sub-group lie one after the other."""
        found: dict[str, tuple[int, dict[str, torch.Tensor], float]] = {}
        base = _torch_state(state)
        numbers = [number for group in base["param_groups"] for number in group["params"]]
        steps = {number: group.get("step", 0) for group in base["param_groups"] for number in group["params"]}
        for number, flat, shapes in zip(numbers, state["fp32_flat_groups"], self._groups, strict=True):
            moments, offset = base["state"].get(number, {}), 0
            for name, shape in shapes.items():
                share = -(-prod(shape) // self.num_ranks)
                start = rank * share
                count = min(share, prod(shape) - start)
                if count > 0:
                    kinds = {kind: values.view(-1).narrow(0, offset, count) for kind, values in _elementwise(flat, moments).items()}
                    found[name] = (start, kinds, moments.get("step", steps[number]))
                offset += share
        return found

    def _optimizer(self, rank: int) -> dict[str, Any]:
        found = self._load(self._files[rank]).get("optimizer_state_dict")
        if not isinstance(found, dict):
            raise UserError(f"{self._files[rank]} holds no state of a ZeRO optimizer.")
        return found

    def _check_ranks(self, wanted: object) -> None:
        """All are there. Raises UserError, naming the first file that is missing."""
        have = set(self._files)
        if missing := sorted(set(range(int(wanted) if isinstance(wanted, int) else len(have))) - have):
            name = self._files[min(have)].name.replace(f"_rank_{min(have)}_mp", f"_rank_{missing[0]}_mp")
            raise UserError(f"{self.folder} was written by {wanted} ranks and lacks {name}; copy the files of every node into one folder.")

    def _load(self, path: Path) -> dict[str, Any]:
        """A file's content, its tensors mapped. Raises UserError."""
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
                found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            if not self._trusted:
                named = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise UserError(
                    f"{path} holds more than tensors, numbers and what DeepSpeed itself writes{f' ({named[1]})' if named else ''}: opening "
                    f"it could run any code of whoever wrote it. If you wrote it yourself, and nobody could change it since, add {TRUST}."
                ) from None
            try:
                found = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            except Exception as error:  # it may run anything
                raise UserError(f"{path} cannot be opened here ({type(error).__name__}: {error}).") from None
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no mapping, so it is not of a DeepSpeed checkpoint.")
        return found


def _find(folder: Path, tag: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; wanted one that DeepSpeed's save_checkpoint wrote.")
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(errors="replace").strip()
    found = folder if tag is None else folder / tag
    if tag is not None and (Path(tag).name != tag or not found.is_dir()):
        tags = ", ".join(sorted(path.parent.name for path in folder.glob("*/*_model_states.pt"))[:8]) or "none"
        raise UserError(f"{folder} has no checkpoint {tag!r}; its tags: {tags}.")
    if not any(found.glob("*_model_states.pt")):
        tags = sorted({path.parent.name for path in found.glob("*/*_model_states.pt")})
        raise UserError(
            f"{found} holds no *_model_states.pt, so it is no checkpoint of DeepSpeed's."
            + (f" Choose one with --tag: {', '.join(tags[:8])}." if tags else "")
        )
    return found


def _model_file(folder: Path) -> Path:
    """What rank 0 says of the model: below stage 3 there is one for all."""
    return min(folder.glob("*_model_states.pt"), key=lambda path: (not path.name.startswith("mp_rank_00"), len(path.name), path.name))


def _optimizer_files(folder: Path) -> dict[int, Path]:
    matches = {path: match for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    if parallel := [path.name for path, match in matches.items() if int(match[3])]:
        raise UserError(f"{folder / parallel[0]} is a part of a model cut by tensor parallelism; only data-parallel runs are read.")
    if not matches:
        raise UserError(
            f"{folder} holds no *_optim_states.pt: it was written at stage 0, whose moments carry no names, or is not whole. Stages 1, 2 "
            "and 3 are read; load it with DeepSpeed at stage 1 and save it again."
        )
    return dict(sorted((int(match[2]), path) for path, match in matches.items()))


def _torch_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's optimizer inside DeepSpeed's says of itself."""
    found = state.get("optimizer_state_dict", state.get("base_optimizer_state"))
    if not isinstance(found, dict) or "param_groups" not in found:
        raise UserError("the optimizer's state is of DeepSpeed's elastic form, which is not read; save it without elastic_checkpoint.")
    return found


def _elementwise(flat: torch.Tensor, moments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights and what the optimizer keeps of each element; the moments may end in padding that the weights lack."""
    return {WEIGHT: flat} | {key: value for key, value in moments.items() if torch.is_tensor(value) and value.dim()}
