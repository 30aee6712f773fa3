"""A commit as a folder of DeepSpeed's, for those who go on without this project.

In: a verified commit. Out: OUT/TAG, from which DeepSpeed's `zero_to_fp32` makes the weights, and which an engine of any ZeRO stage from 1
on and any number of ranks loads with `checkpoint: {load_universal: true}`. No engine, GPU or DeepSpeed; one file at a time is in memory.

    OUT/latest, latest_universal             the name of the tag
    OUT/TAG/mp_rank_00_model_states.pt       names, shapes, counters: for stages 1 and 2, and for zero_to_fp32
            zero_pp_rank_0_mp_rank_00_model_states.pt     the same, where stage 3 looks for it
            zero_pp_rank_N_mp_rank_00_optim_states.pt     the fp32 weights in a row, cut: for zero_to_fp32
            zero/NAME/fp32.pt exp_avg.pt exp_avg_sq.pt step.pt      weight and moments of each parameter: for engines
            zero/optimizer_state.pt          what engines read beside them
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from configs.durable import write_file
from configs.errors import UserError
from pretrain.checkpoint.deepspeed_files import MOMENTS
from pretrain.checkpoint.index import BUFFER, WEIGHT, FragmentIndex
from pretrain.checkpoint.verify import Commit

VERSION = "0.19.8"
"""Of the DeepSpeed whose form this is."""
FILE_ELEMENTS = 1 << 28
"""Weights in one file."""
Progress = Callable[[int, int, str], None]
"""Told how many of how many of what are done."""


def export_deepspeed(commit: Commit, out: Path, progress: Progress) -> Path:
    """Fill the folder `out`, read it back and compare every bit. Returns the folder of the tag.

    Raises UserError for an optimizer that is not Adam (DeepSpeed's universal form has places for its moments only) and for parameters that
    are not trained, RuntimeError where what was written is not the commit. Raises OSError.
    """
    with FragmentIndex(commit) as index:
        for name in index.shapes:
            if (found := index.kinds(name) - {WEIGHT}) != MOMENTS:
                raise UserError(
                    f"{commit.folder}: the optimizer keeps {sorted(found) or 'nothing'} of {name}; DeepSpeed's universal form holds Adam's "
                    f"{sorted(MOMENTS)}. Muon's momentum, and parameters that are not trained, have no place in it: use `pretrain export`."
                )
        folder = out / f"global_step{commit.state.step}"
        (folder / "zero").mkdir(parents=True)
        _write_model(commit, index, folder)
        for number, rows in enumerate(pieces := _pieces(index)):
            flat = torch.cat([index.read(WEIGHT, name, start, count) for name, start, count in rows])
            _save(_part(flat, len(pieces)), folder / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt")
        for number, name in enumerate(index.shapes):
            _write_parameter(index, name, folder / "zero" / name)
            progress(number + 1, 2 * len(index.shapes), "parameters")
        for latest in ("latest", "latest_universal"):
            write_file(out / latest, folder.name.encode())
        _prove(index, folder, progress)
    return folder


def _write_model(commit: Commit, index: FragmentIndex, folder: Path) -> None:
    state = commit.state
    about = {
        "module": {name: index.read_whole(BUFFER, name) for name in index.buffers},  # the weights lie elsewhere
        "buffer_names": list(index.buffers),
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in index.shapes.items())],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "optimizer": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "global_steps": state.step,
        "global_samples": state.samples_seen,
        "skipped_steps": state.skipped_steps,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": VERSION,
        "pretrain": {"state": state.to_json(), "groups": index.groups},  # comes back as client state
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(about, folder / name)
    # An engine takes these over into its groups: at stages 1 and 2 by their place, at stage 3 the first one's into all (0.19.8). So only
    # what all groups have in common is given, and to as many groups as there could be: what is a group's own stays as the engine's
    # configuration has it. The learning rate is none of the optimizer's: the loop sets it.
    first, *others = index.groups
    shared = {key: value for key, value in first.items() if all(group.get(key) == value for group in others)}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in shared.items() if key in ("betas", "eps")}
    step = torch.tensor(max(scalars["step"] for scalars in index.scalars.values()))
    optimizer = {
        "param_groups": [settings] * len(index.shapes),
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [settings | {"params": []}]},
        "ds_version": VERSION,
    }
    _save(optimizer, folder / "zero" / "optimizer_state.pt")


def _part(flat: torch.Tensor, num_parts: int) -> dict[str, Any]:
    """What stage 1 writes of one group on one rank, as far as zero_to_fp32 reads it."""
    state = {"zero_stage": 1, "partition_count": num_parts, "single_partition_of_fp32_groups": [flat], "ds_version": VERSION}
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": VERSION}


def _pieces(index: FragmentIndex) -> list[list[tuple[str, int, int]]]:
    """All weights in a row, cut into files: of each, (name, first element, elements)."""
    pieces: list[list[tuple[str, int, int]]] = [[]]
    room = FILE_ELEMENTS
    for name, shape in index.shapes.items():
        start, size = 0, prod(shape)
        while start < size:
            if not room:
                pieces.append([])
                room = FILE_ELEMENTS
            count = min(room, size - start)
            pieces[-1].append((name, start, count))
            start, room = start + count, room - count
    return pieces


def _write_parameter(index: FragmentIndex, name: str, folder: Path) -> None:
    folder.mkdir()
    for kind in sorted(index.kinds(name)):
        _save({"param": index.read_whole(kind, name)}, folder / f"{'fp32' if kind == WEIGHT else kind}.pt")
    _save(torch.tensor(index.scalars[name]["step"]), folder / "step.pt")


def _save(content: object, path: Path) -> None:
    torch.save(content, path)


def _prove(index: FragmentIndex, folder: Path, progress: Progress) -> None:
    """Read everything back, as little at a time as it was written. Raises RuntimeError, naming the file."""
    for number, (path, wanted) in enumerate(_all_values(index, folder)):
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if "optimizer_state_dict" in found:
            found = {"param": found["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]}
        if not torch.equal(found["param"].contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)):
            raise RuntimeError(f"{path} does not hold what the commit holds")
        progress(number + 1, 4 * len(index.shapes), "files read back")


def _all_values(index: FragmentIndex, folder: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    for number, rows in enumerate(_pieces(index)):
        values = torch.cat([index.read(WEIGHT, name, start, count) for name, start, count in rows])
        yield folder / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt", values
    for name in index.shapes:
        for kind in sorted(index.kinds(name)):
            yield folder / "zero" / name / f"{'fp32' if kind == WEIGHT else kind}.pt", index.read_whole(kind, name)
