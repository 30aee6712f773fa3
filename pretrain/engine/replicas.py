"""Whether all ranks hold the same weights. Silent corruption of one rank's memory is found by nothing else.

In: an engine of stage 0, 1 or 2, where every rank holds every weight, and the fp32 slices from which they are derived. Out: nothing, or a
`CorruptReplicaError` that names the rank, its host and the parameter, the same on every rank.
"""

import os
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from pretrain.engine.parallel import Layout

ELEMENTS_AT_ONCE = 1 << 24
"""Of a weight: their bits are summed as 64-bit integers."""


class CorruptReplicaError(RuntimeError):
    """A rank's weights are not what they should be. To try again would learn from them."""


@torch.no_grad()
def compare_replicas(engine: DeepSpeedEngine, slices: Iterable[tuple[str, int, torch.Tensor]], layout: Layout) -> None:
    """Compare every weight with those of the other ranks. Collective, and the host waits. Raises CorruptReplicaError.

    slices: what this rank holds in fp32 of each parameter: (name, first element, elements of shape [count]). At stages 1 and 2 each element
    is held by one rank, and what it rounds to is what every rank should have; at stage 0 the most frequent is right.
    """
    weights = dict(cast(torch.nn.Module, engine.module).named_parameters())
    names = list(weights)
    sums_P = torch.stack([sum_of_bits(weights[name].detach().view(-1), 0) for name in names])
    all_RP = [torch.empty_like(sums_P) for _ in range(layout.world_size)]
    distributed.all_gather(all_RP, sums_P)
    sums_RP = torch.stack(all_RP)
    right_P = sums_RP.mode(dim=0).values
    if engine.zero_optimization_stage() > 0:
        derived = {name: torch.zeros_like(sums_P[0]) for name in names}
        for name, start, elements in slices:
            derived[name] += sum_of_bits(elements.to(weights[name].dtype), start).to(sums_P.device)
        derived_P = torch.stack([derived[name] for name in names])
        distributed.all_reduce(derived_P)
        is_trained_P = torch.tensor([weights[name].requires_grad for name in names], device=sums_P.device)
        right_P = torch.where(is_trained_P, derived_P, right_P)  # a frozen one is derived from nothing
    wrong_RP = (sums_RP != right_P).cpu()
    if not wrong_RP.any():
        return
    hosts = layout.gather(os.uname().nodename)
    ranks = [f"rank {rank} on {hosts[rank]} ({_name([names[place] for place in row.nonzero().flatten().tolist()])})"
             for rank, row in enumerate(wrong_RP) if row.any()]  # fmt: skip
    undecided = engine.zero_optimization_stage() == 0 and layout.world_size == 2
    raise CorruptReplicaError(
        f"weights differ between ranks, or from what they were derived from: {'; '.join(ranks)}"
        + (", or the other one: two ranks of stage 0 cannot tell" if undecided else "")
        + ". Memory or a link of that machine is not to be trusted: look at it (`pretrain doctor`), or start without it. Nothing was "
        "committed; the same command goes on from the newest checkpoint."
    )


def sum_of_bits(elements: torch.Tensor, start: int) -> torch.Tensor:
    """Sum over the elements' bits, as integers, each times an odd number of its place, modulo 2**64 (0-dim, int64).

    The order of the additions does not matter. One changed bit, or two elements that were swapped, always change it.
    elements: shape [count], of 2 or 4 bytes each; start: the place of the first.
    """
    bits = elements.view(torch.int16 if elements.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=elements.device)
    for first in range(0, bits.numel(), ELEMENTS_AT_ONCE):
        part = bits[first : first + ELEMENTS_AT_ONCE].long()
        total += (part * (2 * torch.arange(start + first, start + first + part.numel(), device=part.device) + 1)).sum()
    return total


def _name(parameters: list[str]) -> str:
    return ", ".join(parameters[:3]) + (f" and {len(parameters) - 3} others" if len(parameters) > 3 else "")
