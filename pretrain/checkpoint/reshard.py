"""Proof that an engine holds what a commit holds, whatever the layouts of the two.

In: an engine that was filled, the commit. Out: how much was compared, or a defect that names the parameter. Nothing is gathered: of each
weight and moment both sides compute a sum of integers that depends on every bit and its place and not on who holds it, so that a rank looks
at its own slices, and at a share of the commit in pieces.
"""

from collections import defaultdict
from math import prod
from typing import Any

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from pretrain.checkpoint.blocks import DamageError
from pretrain.checkpoint.fragments import HYPER_PARAMETERS, OwnedSlice, check_slices, owned_slices, torch_optimizer
from pretrain.checkpoint.index import WEIGHT, FragmentIndex
from pretrain.checkpoint.verify import Commit

PIECE_ELEMENTS = 1 << 22
_FIRST, _SECOND = -0x61C8864680B583EB, -0x4B47D0C5E8A7B1A9
"""Odd, their bits mixed: each product modulo 2^64 is a permutation."""

Sums = dict[tuple[str, str], tuple[int, int]]
"""By kind and parameter: the sum modulo 2^64, and how many elements are in it."""


def position_sum(values: torch.Tensor, start: int) -> int:
    """Sum modulo 2^64 over elements [start, start + n) of a tensor, in any order and any split: values is fp32, shape [n].

    Each element's bits and place are mixed to 64 bits, so that neither another value nor another place leaves the sum as it was.
    """
    total = 0
    for first in range(0, values.numel(), PIECE_ELEMENTS):
        piece = values[first : first + PIECE_ELEMENTS]
        bits = piece.contiguous().view(torch.int32).long()
        places = torch.arange(start + first, start + first + piece.numel(), device=piece.device)
        mixed = (bits + places * _FIRST) * _SECOND
        mixed = (mixed ^ (mixed >> 29)) * _FIRST
        total += int((mixed ^ (mixed >> 32)).sum())
    return total % 2**64


@torch.no_grad()
def verify_resharding(engine: DeepSpeedEngine, commit: Commit, with_moments: bool = True) -> str:
    """Compare all that the engine holds with the commit, bit for bit. Collective. Returns a line that says what was compared.

    Raises RuntimeError, naming the parameter, where they differ, on every rank; DamageError where the commit has become unreadable.
    """
    check_slices(engine)
    problems: list[str] = []
    wanted: Sums = {}
    try:
        with FragmentIndex(commit) as index:
            wanted = _sums_of_files(index, with_moments)
            problems = _other_settings(engine, index) if with_moments else []
    except DamageError as error:
        problems = [str(error)]
    found = _total(_sums_of_engine(engine, with_moments))
    wanted = _total(wanted)
    problems += [f"{kind} of {name}" for kind, name in sorted(found.keys() | wanted.keys()) if not _same(found, wanted, (kind, name))]
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, problems)
    if different := sorted({problem for one in told for problem in one}):
        raise RuntimeError(f"what was read of {commit.folder} is not what the engine holds: {'; '.join(different[:3])}")
    num_parameters, num_elements = len({name for _, name in wanted}), sum(count for _, count in wanted.values())
    return f"resharded and verified: {num_elements:,} numbers of {num_parameters} parameters are the commit's, bit for bit"


def _same(found: Sums, wanted: Sums, key: tuple[str, str]) -> bool:
    """Where every rank holds a whole parameter, all of them are summed: as many times what the commit holds once."""
    (have, num_found), (want, num_wanted) = found.get(key, (0, 0)), wanted.get(key, (0, 0))
    copies = num_found // num_wanted if num_wanted else 0
    return copies in (1, distributed.get_world_size()) and num_found == copies * num_wanted and have == copies * want % 2**64


def _sums_of_engine(engine: DeepSpeedEngine, with_moments: bool) -> Sums:
    """Of what this rank holds."""
    optimizer, sums = torch_optimizer(engine), defaultdict[tuple[str, str], tuple[int, int]](lambda: (0, 0))
    for piece in owned_slices(engine):
        moments = _moments(optimizer, piece) if with_moments else {}
        for kind, tensor in {WEIGHT: piece.flat, **moments}.items():
            total, count = sums[kind, piece.parameter]
            values = piece.of(tensor).float()
            sums[kind, piece.parameter] = ((total + position_sum(values, piece.start)) % 2**64, count + piece.count)
    return dict(sums)


def _moments(optimizer: torch.optim.Optimizer, piece: OwnedSlice) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of each element."""
    state: dict[str, Any] = optimizer.state.get(piece.flat, {})
    return {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.dim() and value.numel() == piece.flat.numel()}


def _sums_of_files(index: FragmentIndex, with_moments: bool) -> Sums:
    """Of this rank's share of the commit's tensors."""
    keys = [(kind, name) for name in sorted(index.shapes) for kind in sorted(index.kinds(name)) if with_moments or kind == WEIGHT]
    sums: Sums = {}
    for kind, name in keys[distributed.get_rank() :: distributed.get_world_size()]:
        size = prod(index.shapes[name])
        pieces = ((first, min(PIECE_ELEMENTS, size - first)) for first in range(0, size, PIECE_ELEMENTS))
        total = sum(position_sum(index.read(kind, name, first, count).float(), first) for first, count in pieces)
        sums[kind, name] = (total % 2**64, size)
    return sums


def _total(mine: Sums) -> Sums:
    """Over all ranks."""
    gathered: list[Sums] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    sums = defaultdict[tuple[str, str], tuple[int, int]](lambda: (0, 0))
    for one in gathered:
        for key, (total, count) in one.items():
            sums[key] = ((sums[key][0] + total) % 2**64, sums[key][1] + count)
    return dict(sums)


def _other_settings(engine: DeepSpeedEngine, index: FragmentIndex) -> list[str]:
    """Steps of this rank's parameters, and groups, that are not the commit's.

    What the run file has changed of a group is not looked for here: `check_groups` holds every group to the run file.
    """
    optimizer, problems = torch_optimizer(engine), list[str]()
    for piece in owned_slices(engine):
        state = optimizer.state.get(piece.flat, {})
        for key, value in index.scalars[piece.parameter].items():
            if key not in state or float(state[key]) != value:
                problems.append(f"{key} of {piece.parameter} is {state.get(key)} instead of {value}")
    names = [group.get("name") for group in optimizer.param_groups]
    if names != [group.get("name") for group in index.groups]:
        problems.append(f"its groups are {names} instead of {[group.get('name') for group in index.groups]}")
    for group, known in zip(optimizer.param_groups, index.groups, strict=False):
        if missing := [key for key in known if key in HYPER_PARAMETERS and key not in group]:
            problems.append(f"the group {known.get('name')!r} lacks {missing}")
    return problems
