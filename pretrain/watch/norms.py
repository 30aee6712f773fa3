"""Norms of weights and gradients, of the whole model and of each layer: whether one part of it learns otherwise than the rest.

In: slices of parameters that this rank holds, by name, gradients between the last backward pass and the step, weights behind it. Out: the
same norms on every rank, by one small all-reduce; whatever the ZeRO stage, no parameter is put together for it.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch
import torch.distributed as distributed

Slices = Iterable[tuple[str, torch.Tensor]]
"""Names of parameters, and elements of them."""


def layer_of(parameter: str) -> str:
    """`blocks.3.attention.query.weight` -> `blocks.3`; outside of the layers the module: `final_norm.weight` -> `final_norm`."""
    parts = parameter.split(".")
    before = list(takewhile(lambda part: not part.isdigit(), parts))
    if len(before) < len(parts):
        return ".".join(parts[: len(before) + 1])
    return ".".join(parts[:-1] or parts)


class Norms:
    """Of one step: `see_gradients`, then `read`."""

    def __init__(self, parameters: Iterable[str], device: torch.device) -> None:
        """parameters: names of all of the model's, in the same order on all ranks."""
        self._layers: Sequence[str] = list(dict.fromkeys(map(layer_of, parameters)))
        self._device = device
        self._gradients: torch.Tensor | None = None

    def see_gradients(self, owned: Slices, scale: float | None) -> None:
        """Remember how large the gradients are. owned: of this rank. scale: that they carry (fp16's), None: 1."""
        self._gradients = self._sum_squares(owned) / (scale or 1.0) ** 2

    def read(self, owned: Slices) -> dict[str, float]:
        """`parameter_norm`, `norm/weights/LAYER`, `norm/gradients/LAYER` of what was seen last, those that are finite. Collective.

        owned: the weights that this rank holds; the ranks together hold each once.
        """
        weights = self._sum_squares(owned)
        gradients = torch.zeros_like(weights) if self._gradients is None else self._gradients
        both = torch.stack([weights, gradients])
        distributed.all_reduce(both)
        (weight_squares, gradient_squares), has_gradients = both.tolist(), self._gradients is not None
        self._gradients = None
        found = {"parameter_norm": math.sqrt(sum(weight_squares))}
        found |= {f"norm/weights/{layer}": math.sqrt(square) for layer, square in zip(self._layers, weight_squares, strict=True)}
        if has_gradients:
            found |= {f"norm/gradients/{layer}": math.sqrt(square) for layer, square in zip(self._layers, gradient_squares, strict=True)}
        return {name: norm for name, norm in found.items() if math.isfinite(norm)}

    @torch.no_grad()
    def _sum_squares(self, owned: Slices) -> torch.Tensor:
        """Of each layer, in float64."""
        places = {layer: place for place, layer in enumerate(self._layers)}
        sums = torch.zeros(len(places), dtype=torch.float64, device=self._device)
        for name, elements in owned:
            norm = torch.linalg.vector_norm(elements, dtype=torch.float32)
            sums[places[layer_of(name)]] += norm.to(sums.device, torch.float64).square()
        return sums
