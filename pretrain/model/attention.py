"""Fused causal attention, inside documents where asked, and the cache of keys and values that generation keeps.

In: queries, keys and values per head, and which places see which. Out: the weighted values per head. The decoder
receives this function as an argument, so that another one (over several ranks) can take its place.

Shapes: B batch, T tokens (queries), S tokens that may be looked at (keys; S >= T), N query heads,
K key and value heads (K divides N), H features per head.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Visible: TypeAlias = torch.Tensor | BlockMask
"""Which place sees which, the same for every layer and head: a boolean mask (B, 1, T, T), or FlexAttention's mask of blocks."""


class Attend(Protocol):
    """What the decoder calls: the T queries stand at the last T of the S positions, and none sees a later one.

    `visible`, made once for all layers by `visible_inside_documents`, narrows further what they see; then S = T.
    """

    def __call__(
        self, query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, value_BSKH: torch.Tensor, *, visible: Visible | None, dropout: float
    ) -> torch.Tensor:
        """Return the attended values, (B, T, N, H), in the dtype of the queries."""
        ...


def visible_inside_documents(documents_BT: torch.Tensor, head_width: int, dropout: float) -> Visible:
    """What each place sees in a row of several documents: itself and the earlier places of its own document's number.

    On CUDA a mask of blocks (Dong et al. 2024, FlexAttention): whole blocks of other documents are skipped, and no
    (T, T) array exists. Its kernel knows no dropout and no heads below 16 features; there, and on other devices, a
    boolean mask, T x T bytes for each row of the batch.
    """
    if documents_BT.is_cuda and dropout == 0 and head_width >= 16:
        return blocks_inside_documents(documents_BT)
    return (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]).tril()


def blocks_inside_documents(documents_BT: torch.Tensor) -> BlockMask:
    """The same as a mask of blocks, on any device (FlexAttention has no backward on the CPU)."""

    def sees(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (documents_BT[row, query] == documents_BT[row, key])

    batch_size, num_tokens = documents_BT.shape
    return _compiled(create_block_mask)(sees, batch_size, None, num_tokens, num_tokens, device=documents_BT.device)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, once for all layers and models; without it both functions of FlexAttention hold (T, T) arrays."""
    return torch.compile(function, dynamic=False)


def causal_attention(
    query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, value_BSKH: torch.Tensor, *, visible: Visible | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H), over this and earlier positions) V (Vaswani et al. 2017, section 3.2.1).

    Query t stands at position S - T + t. With K < N, query heads n * N/K to (n + 1) * N/K - 1 share key
    head n (grouped queries, Ainslie et al. 2023). `visible` is all that is seen, where it is given (S = T).
    `dropout` is the share of attention weights dropped, always: whoever calls passes 0 outside training.

    Returns: (B, T, N, H), same dtype as the queries. Raises ValueError when S < T, and for dropout with a mask of blocks.
    """
    num_queries, num_keys = query_BTNH.shape[1], key_BSKH.shape[1]
    if num_keys < num_queries:
        raise ValueError(f"found {num_queries} queries but only {num_keys} keys; every query needs at least its own position's key")
    query_BNTH, key_BKSH, value_BKSH = (x.transpose(1, 2) for x in (query_BTNH, key_BSKH, value_BSKH))
    grouped = query_BTNH.shape[2] != key_BSKH.shape[2]
    if isinstance(visible, BlockMask):
        if dropout:
            raise ValueError("FlexAttention knows no dropout; make the mask with visible_inside_documents, which is told of it")
        attend = _compiled(flex_attention)
        return attend(query_BNTH, key_BKSH, value_BKSH, block_mask=visible, enable_gqa=grouped).transpose(1, 2)
    # `is_causal` lines up the FIRST query with the first key, which is right only for equal lengths. A
    # single query stands last and sees everything; several after a cached beginning need a mask of their own.
    equal_lengths = num_queries == num_keys
    mask = visible
    if mask is None and not equal_lengths and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BTNH.device).tril(num_keys - num_queries)
    attended_BNTH = F.scaled_dot_product_attention(
        query_BNTH,
        key_BKSH,
        value_BKSH,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=equal_lengths and mask is None,
        enable_gqa=grouped,
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
