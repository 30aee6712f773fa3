"""Parts of the decoder as their papers have them, slow and in float64 if the inputs are: what the real ones are compared with."""

import math
from typing import Any

import torch


def plain_attention(
    query_BTNH: torch.Tensor,
    key_BSKH: torch.Tensor,
    value_BSKH: torch.Tensor,
    *,
    visible: Any = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(c tanh(Q K^T / sqrt(H) / c)) V in float64, one query head at a time, queries at the end of the keys; called like `Attend`."""
    (_, num_queries, num_heads, head_width), num_keys = query_BTNH.shape, key_BSKH.shape[1]
    hidden_TS = torch.arange(num_keys) > torch.arange(num_keys - num_queries, num_keys)[:, None]
    hidden = hidden_TS if visible is None else ~visible[:, 0]
    assert dropout == 0
    heads = []
    for head in range(num_heads):
        kv_head = head * key_BSKH.shape[2] // num_heads
        query_BTH, key_BSH, value_BSH = (t.double() for t in (query_BTNH[:, :, head], key_BSKH[:, :, kv_head], value_BSKH[:, :, kv_head]))
        scores_BTS = query_BTH @ key_BSH.transpose(1, 2) / math.sqrt(head_width)
        scores_BTS = scores_BTS if softcap is None else softcap * (scores_BTS / softcap).tanh()
        heads.append(scores_BTS.masked_fill(hidden, -math.inf).softmax(-1) @ value_BSH)
    return torch.stack(heads, dim=2)


def rotate_by_pairs(x_BTNH: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """The rotation of each pair (i, i + h) as a product with a 2 x 2 matrix, in the dtype of `x_BTNH`."""
    matrix = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2).to(x_BTNH.dtype).unsqueeze(-4)
    return (matrix @ x_BTNH.unflatten(-1, (2, -1)).mT.unsqueeze(-1)).squeeze(-1).mT.flatten(-2)
