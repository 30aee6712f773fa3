"""Fused causal attention, inside documents and windows where asked, and the cache of keys and values that generation keeps.

In: queries, keys and values per head, and which places see which. Out: the weighted values per head. The decoder
receives this function as an argument, so that another one (over several ranks, or one that writes down what it saw) can take its place.

Shapes: B batch, T tokens (queries), S tokens that may be looked at (keys; S >= T), N query heads,
K key and value heads (K divides N), H features per head.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Visible: TypeAlias = torch.Tensor | BlockMask
"""Which place sees which, the same for every layer and head: a boolean mask (B or 1, 1, T, S), or FlexAttention's mask of blocks."""


class Attend(Protocol):
    """What the decoder calls: the T queries stand at the last T of the S positions.

    `visible`, made once for all layers by `make_visible`, is all that is seen; None: each place sees itself and all earlier ones.
    """

    def __call__(
        self,
        query_BTNH: torch.Tensor,
        key_BSKH: torch.Tensor,
        value_BSKH: torch.Tensor,
        *,
        visible: Visible | None,
        dropout: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return the attended values, (B, T, N, H), in the dtype of the queries."""
        ...


@dataclass(frozen=True)
class Sight:
    """What narrows or widens what a place sees, besides that it sees itself and what is before it."""

    documents_BS: torch.Tensor | None = None
    """The number of each place's document; nothing of another number is seen."""
    prefix_BS: torch.Tensor | None = None
    """Places (True) of a prefix: those of one document see each other in both directions, whatever the window."""
    window: int | None = None
    """How many places are seen, itself included."""
    padding_B: torch.Tensor | None = None
    """So many places at the beginning of each row are no text, and are seen by nobody but themselves."""

    def sees(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a place sees another, for any shapes that broadcast: indices of rows and positions -> booleans."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.prefix_BS is not None:
            seen = seen | (self.prefix_BS[row, query] & self.prefix_BS[row, key])
        if self.documents_BS is not None:
            seen = seen & (self.documents_BS[row, query] == self.documents_BS[row, key])
        if self.padding_B is not None:
            seen = seen & (key >= self.padding_B[row]) | (key == query)
        return seen


def make_visible(
    sight: Sight, batch_size: int, num_queries: int, num_keys: int, device: torch.device, *, by_blocks: bool
) -> Visible | None:
    """What each place sees, for all layers; None where that is itself and all earlier ones.

    by_blocks: as FlexAttention's mask of blocks (Dong et al. 2024), in which whole blocks are skipped and no (T, T) array exists;
    else a boolean mask of T x S bytes a row.
    """
    window = sight.window if sight.window is not None and sight.window < num_keys else None
    sight = Sight(sight.documents_BS, sight.prefix_BS, window, sight.padding_B)
    if sight == Sight():
        return None
    if by_blocks:

        def sees(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return sight.sees(row, query + (num_keys - num_queries), key)

        return _compiled(create_block_mask)(sees, batch_size, None, num_queries, num_keys, device=device)
    rows_B11 = torch.arange(batch_size, device=device)[:, None, None]
    places_1S = torch.arange(num_keys, device=device)[None]
    return sight.sees(rows_B11, places_1S[:, num_keys - num_queries :, None], places_1S[:, None])[:, None]


def takes_blocks(device: torch.device, head_width: int, dropout: float) -> bool:
    """Whether FlexAttention computes it: on CUDA; it knows no dropout, no heads below 16 features, and on the CPU no backward."""
    return device.type == "cuda" and dropout == 0 and head_width >= 16


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, once for all layers and models; without it both functions of FlexAttention hold (T, T) arrays."""
    return torch.compile(function, dynamic=False)


@functools.cache
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """FlexAttention's form of a softcap; one function for each cap, so that it is compiled once."""

    def cap(score: torch.Tensor, *_place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def causal_attention(
    query_BTNH: torch.Tensor,
    key_BSKH: torch.Tensor,
    value_BSKH: torch.Tensor,
    *,
    visible: Visible | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H), over what is visible) V (Vaswani et al. 2017, section 3.2.1).

    Query t stands at position S - T + t. With K < N, query heads n * N/K to (n + 1) * N/K - 1 share key
    head n (grouped queries, Ainslie et al. 2023). `visible` is all that is seen; None: this and earlier positions.
    `dropout` is the share of attention weights dropped, always: whoever calls passes 0 outside training.
    `softcap`: scores s become c tanh(s / c) (Gemma 2, 2024); without a mask of blocks that costs T x S scores of every head.

    Returns: (B, T, N, H), same dtype as the queries. Raises ValueError when S < T, and for dropout with a mask of blocks.
    """
    num_queries, num_keys = query_BTNH.shape[1], key_BSKH.shape[1]
    if num_keys < num_queries:
        raise ValueError(f"found {num_queries} queries but only {num_keys} keys; every query needs at least its own position's key")
    query_BNTH, key_BKSH, value_BKSH = (x.transpose(1, 2) for x in (query_BTNH, key_BSKH, value_BSKH))
    grouped = query_BTNH.shape[2] != key_BSKH.shape[2]
    if isinstance(visible, BlockMask):
        if dropout:
            raise ValueError("FlexAttention knows no dropout; takes_blocks, which is told of it, says when to make a boolean mask")
        attend, cap = _compiled(flex_attention), None if softcap is None else _capped(softcap)
        return attend(query_BNTH, key_BKSH, value_BKSH, score_mod=cap, block_mask=visible, enable_gqa=grouped).transpose(1, 2)
    # `is_causal` lines up the FIRST query with the first key, which is right only for equal lengths. A
    # single query stands last and sees everything; several after a cached beginning need a mask of their own.
    equal_lengths = num_queries == num_keys
    mask = visible
    if mask is None and (softcap is not None or not equal_lengths) and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BTNH.device).tril(num_keys - num_queries)
    if softcap is not None:
        return _capped_attention(query_BNTH, key_BKSH, value_BKSH, mask, dropout, softcap).transpose(1, 2)
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


def _capped_attention(
    query_BNTH: torch.Tensor, key_BKSH: torch.Tensor, value_BKSH: torch.Tensor, mask: torch.Tensor | None, dropout: float, softcap: float
) -> torch.Tensor:
    """The same step by step, for scores that no fused kernel at hand can cap; softmax in fp32."""
    key_BNSH, value_BNSH = (x.repeat_interleave(query_BNTH.shape[1] // x.shape[1], dim=1) for x in (key_BKSH, value_BKSH))
    scores_BNTS = (query_BNTH @ key_BNSH.mT).float() / math.sqrt(query_BNTH.shape[-1])
    scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    if mask is not None:
        scores_BNTS = scores_BNTS.masked_fill(~mask, -math.inf)
    weights_BNTS = F.dropout(scores_BNTS.softmax(dim=-1).to(value_BNSH.dtype), dropout)
    return weights_BNTS @ value_BNSH


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

    def __init__(self, num_layers: int, num_positions: int, padding_B: torch.Tensor | None = None) -> None:
        self.num_positions = num_positions
        self.padding_B = padding_B
        """So many places at the beginning of each row are no text; positions are counted from behind them. None: none."""
        self.length = 0
        """Positions filled so far, padding included; the decoder advances it once all layers have been extended."""
        self.layers = [LayerCache(num_positions) for _ in range(num_layers)]
