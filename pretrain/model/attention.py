"""Fused causal attention, and the cache of keys and values that generation keeps.

In: queries, keys and values per head. Out: the weighted values per head. The decoder receives this
function as an argument, so that another one (inside documents, over several ranks) can take its place.

Shapes: B batch, T tokens (queries), S tokens that may be looked at (keys; S >= T), N query heads,
K key and value heads (K divides N), H features per head.
"""

from typing import Protocol

import torch
import torch.nn.functional as F


class Attend(Protocol):
    """What the decoder calls: the T queries stand at the last T of the S positions, and none sees a later one."""

    def __call__(self, query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, value_BSKH: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """Return the attended values, (B, T, N, H), in the dtype of the queries."""
        ...


def causal_attention(query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, value_BSKH: torch.Tensor, *, dropout: float = 0.0) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H), over this and earlier positions) V (Vaswani et al. 2017, section 3.2.1).

    Query t stands at position S - T + t. With K < N, query heads n * N/K to (n + 1) * N/K - 1 share key
    head n (grouped queries, Ainslie et al. 2023). `dropout` is the share of attention weights dropped,
    always: whoever calls passes 0 outside training.

    Returns: (B, T, N, H), same dtype as the queries. Raises ValueError when S < T.
    """
    num_queries, num_keys = query_BTNH.shape[1], key_BSKH.shape[1]
    if num_keys < num_queries:
        raise ValueError(f"found {num_queries} queries but only {num_keys} keys; every query needs at least its own position's key")
    # `is_causal` lines up the FIRST query with the first key, which is right only for equal lengths. A
    # single query stands last and sees everything; several after a cached beginning need a mask of their own.
    equal_lengths = num_queries == num_keys
    mask_TS = None
    if not equal_lengths and num_queries > 1:
        mask_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BTNH.device).tril(num_keys - num_queries)
    attended_BNTH = F.scaled_dot_product_attention(
        query_BTNH.transpose(1, 2),
        key_BSKH.transpose(1, 2),
        value_BSKH.transpose(1, 2),
        attn_mask=mask_TS,
        dropout_p=dropout,
        is_causal=equal_lengths,
        enable_gqa=query_BTNH.shape[2] != key_BSKH.shape[2],
    )
    return attended_BNTH.transpose(1, 2)


class LayerCache:
    """Keys and values of one layer for up to `num_positions` positions; memory is taken at the first use."""

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions
        self.key_BPKH: torch.Tensor | None = None
        self.value_BPKH: torch.Tensor | None = None

    def extend(self, start: int, key_BTKH: torch.Tensor, value_BTKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T positions from `start` on; return all keys and values so far, (B, start + T, K, H) each.

        Raises ValueError when the cache is full.
        """
        end = start + key_BTKH.shape[1]
        if end > self.num_positions:
            raise ValueError(f"the cache holds {self.num_positions} positions, {end} are needed; make a larger cache")
        if self.key_BPKH is None or self.value_BPKH is None:
            batch_size, _, num_heads, head_width = key_BTKH.shape
            self.key_BPKH = key_BTKH.new_empty(batch_size, self.num_positions, num_heads, head_width)
            self.value_BPKH = value_BTKH.new_empty(batch_size, self.num_positions, num_heads, head_width)
        self.key_BPKH[:, start:end] = key_BTKH
        self.value_BPKH[:, start:end] = value_BTKH
        return self.key_BPKH[:, :end], self.value_BPKH[:, :end]


class KeyValueCache:
    """What generation remembers of the tokens already read, so that each new token costs one position.

    Bytes once in use: 2 x layers x B x num_positions x K x H x bytes per element. For use without gradients.
    """

    def __init__(self, num_layers: int, num_positions: int) -> None:
        self.num_positions = num_positions
        self.length = 0
        """Positions filled so far; the decoder advances it once all layers have been extended."""
        self.layers = [LayerCache(num_positions) for _ in range(num_layers)]
