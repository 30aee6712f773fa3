"""Where a token stands: rotations of queries and keys (RoPE), and the fixed sinusoids of the first Transformer.

In: positions, a head's width. Out: tables of angles, and vectors turned by them. Tables are no parameters and no buffers: they are
computed outside of any constructor, in float64, kept in fp32, and nothing that casts or empties a model can reach them.

Shapes: B batch, T tokens, N heads, H features per head, h = H/2 rotating pairs, P positions, D model width.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from configs.model_section import RopeScalingSection


def rows_at(positions: slice | torch.Tensor, table_PD: torch.Tensor) -> torch.Tensor:
    """The rows of a table with one row per position: (T, D) for a slice, (B, T, D) for positions_BT."""
    # F.embedding and not an index: its gradient is added up in a fixed order, and it refuses negative positions.
    return table_PD[positions] if isinstance(positions, slice) else F.embedding(positions, table_PD)


def rotate(x_BTNH: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn feature pair (i, i + h) of each head by its position's angle (RoFormer, Su et al. 2021).

    Cosines and sines are (T, h), or (B, T, h) where every row has positions of its own.
    Pairs are half a head apart, as in Llama's Hugging Face weights. Computed in fp32, returned in the
    dtype of `x_BTNH`. A score of two rotated vectors depends on the distance of their positions only.
    """
    first_BTNh, second_BTNh = x_BTNH.float().chunk(2, dim=-1)
    cosine_T1h, sine_T1h = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    turned = first_BTNh * cosine_T1h - second_BTNh * sine_T1h, second_BTNh * cosine_T1h + first_BTNh * sine_T1h
    return torch.cat(turned, dim=-1).to(x_BTNH.dtype)


@lru_cache(maxsize=16)
def rotary_tables(
    num_positions: int, head_width: int, theta: float, scaling: RopeScalingSection | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (P, h) each, fp32, of the angles position x frequency; kept per device."""
    frequencies_h, magnitude = rotary_frequencies(head_width, theta, scaling)
    angles_Ph = _angles(num_positions, frequencies_h)
    return _constant(np.cos(angles_Ph) * magnitude, device), _constant(np.sin(angles_Ph) * magnitude, device)


def rotary_frequencies(head_width: int, theta: float, scaling: RopeScalingSection | None) -> tuple[npt.NDArray[np.float64], float]:
    """Radians per position of each rotating pair, (h,), theta^(-i / h) before scaling; and what cosines and sines are multiplied by.

    linear: Chen et al. 2023. llama3: Dubey et al. 2024, as in Meta's llama-models, `apply_scaling`. yarn: Peng et al. 2023, sections
    3.2 to 3.4, with the borders of its ramp rounded outwards as in the authors' code.
    """
    frequencies_h = _frequencies(head_width // 2, theta)
    if scaling is None:
        return frequencies_h, 1.0
    slow_h = frequencies_h / scaling.factor
    turns_h = scaling.original_context * frequencies_h / (2 * math.pi)  # within the original context
    if scaling.kind == "linear":
        return slow_h, 1.0
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept_h = np.clip((turns_h - low) / (high - low), 0.0, 1.0)
        return kept_h * frequencies_h + (1 - kept_h) * slow_h, 1.0

    def pair_that_turns(times: float) -> float:
        return head_width * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_width - 1)
    kept_h = 1 - np.clip((np.arange(head_width // 2) - first) / max(last - first, 0.001), 0.0, 1.0)
    magnitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return kept_h * frequencies_h + (1 - kept_h) * slow_h, magnitude


@lru_cache(maxsize=16)
def sinusoidal_table(num_positions: int, width: int, device: torch.device) -> torch.Tensor:
    """The fixed positions of Vaswani et al. 2017, section 3.5, (P, D), fp32: sines in even columns, cosines in odd ones."""
    angles = _angles(num_positions, _frequencies((width + 1) // 2, 10_000.0))
    return _constant(np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(num_positions, -1)[:, :width], device)


def _frequencies(num_frequencies: int, theta: float) -> npt.NDArray[np.float64]:
    return theta ** (-np.arange(num_frequencies, dtype=np.float64) / num_frequencies)


def _angles(num_positions: int, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """position x frequency, in float64: in bf16 position 257 would already be 256."""
    return np.outer(np.arange(num_positions, dtype=np.float64), frequencies)


def _constant(values: npt.NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """`values` in fp32 on `device`, fit for training even when first asked for while evaluating."""
    with torch.inference_mode(False):
        return torch.from_numpy(values.astype(np.float32)).to(device)
