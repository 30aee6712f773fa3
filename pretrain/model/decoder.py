"""The decoder-only Transformer, for one device: Llama's form, GPT-2's form, and what lies between.

In: tokens (B, T), and labels when there is something to learn. Out: logits (B, T, V), or the summed loss.
Scaling is applied from outside (engine/). Three things here are shaped by DeepSpeed's ZeRO-3, which
gathers a module's parameters only around that module's own forward, and by its `.bfloat16()`:
- a parameter is used only inside the forward of the module that owns it, a tied head's table included;
- tables of angles are no parameters and no buffers (positions.py);
- constructors leave weights unset (NaN); weights.py alone fills them, by name and seed.

Shapes: B batch, T tokens, D model width, N query heads, K key and value heads, H features per head,
F feed-forward width, V vocabulary, P positions, h = H/2 rotating pairs.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from configs.model_section import ModelSection
from pretrain.model.attention import Attend, KeyValueCache, LayerCache, Sight, Visible, causal_attention, make_visible, takes_blocks
from pretrain.model.loss import SummedLoss, summed_cross_entropy
from pretrain.model.positions import rotary_tables, rotate, rows_at, sinusoidal_table


class Decoder(nn.Module):
    """A decoder-only Transformer: Llama (Touvron et al. 2023) to GPT-2 (Radford et al. 2019).

    `attend` computes the attention of every layer, `loss` what training minimises (evaluation is always plain cross-entropy), `block`
    makes a layer; see `attention.Attend`, `loss.SummedLoss` and `Block`. `activation_dtype` is what is computed in, where that is not
    the weights' own dtype: each weight is cast where it is used. Weights are unset until `initialize_weights` or a
    checkpoint fills them.
    """

    def __init__(
        self,
        section: ModelSection,
        attend: Attend = causal_attention,
        loss: SummedLoss = summed_cross_entropy,
        block: Callable[[ModelSection, Attend], nn.Module] | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.section = section
        self.activation_dtype = activation_dtype
        self.token_table = TokenTable(section, loss)
        self.position_table = PositionTable(section.largest_context, section.width) if section.positions == "learned" else None
        self.blocks = nn.ModuleList((block or Block)(section, attend) for _ in range(section.num_layers))
        self.final_norm = make_norm(section, section.width)
        self.head = None if section.tied_head else TokenTable(section, loss)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        *,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        prefix_BT: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits (B, T, V) in the weights' dtype; with labels, the loss summed over valid targets (scalar, fp32, nats).

        Tokens and labels are int32 or int64; labels_BT[b, t] is what should follow tokens_BT[b, t], -100
        where nothing is to be learnt. With a `cache` the tokens continue those it holds, and are added to
        it. With `last_only` the logits are those of the last position, (B, 1, V).

        A row may hold several documents, one after the other. `documents_BT`, integers that never fall along a
        row: the number of the document of each place, which sees nothing of another number; None: a row is one
        document. `positions_BT`, integers: where each place stands, 0 to largest_context - 1; None: counted along
        the row. Neither implies the other: documents may be kept apart without counting each from 0.
        `prefix_BT`, booleans: places that see each other in both directions, each document's for themselves.

        Raises ValueError for shapes that do not fit, for more positions than `largest_context`, for documents or positions with a
        cache, and for a prefix with a cache that is not empty; a position out of range is an IndexError on the CPU, on CUDA a
        device-side assertion.
        """
        section = self.section
        start = 0 if cache is None else cache.length
        end = start + tokens_BT.shape[-1]
        if tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
            raise ValueError(f"tokens have the shape {tuple(tokens_BT.shape)}; wanted (batch, tokens), at least one of each")
        for name, given_BT in (("labels", labels_BT), ("documents", documents_BT), ("positions", positions_BT), ("prefix", prefix_BT)):
            if given_BT is not None and given_BT.shape != tokens_BT.shape:
                raise ValueError(f"{name} have the shape {tuple(given_BT.shape)}, tokens {tuple(tokens_BT.shape)}; they must be equal")
        if cache is not None and not (documents_BT is None and positions_BT is None):
            raise ValueError("a cache holds one document per row, counted from 0; with it documents_BT and positions_BT must be None")
        if start and prefix_BT is not None:
            raise ValueError(f"the cache holds {start} positions already, which a prefix behind them would have to see; give it first")
        if end > section.largest_context:
            raise ValueError(f"the sequence reaches {end} tokens, model.largest_context is {section.largest_context}")

        positions = slice(start, end) if positions_BT is None else positions_BT
        padding_B = None if cache is None else cache.padding_B
        if padding_B is not None:
            positions = (torch.arange(start, end, device=tokens_BT.device) - padding_B[:, None]).clamp(min=0)
        x_BTD = self.token_table("look_up", tokens_BT)
        if self.activation_dtype is not None:
            x_BTD = x_BTD.to(self.activation_dtype)
        if self.position_table is not None:
            x_BTD = x_BTD + self.position_table(positions).to(x_BTD.dtype)
        elif section.positions == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4: otherwise the sinusoids drown small embeddings.
            table_PD = sinusoidal_table(section.largest_context, section.width, tokens_BT.device)
            x_BTD = (x_BTD * math.sqrt(section.width) + rows_at(positions, table_PD)).to(x_BTD.dtype)
        x_BTD = F.dropout(x_BTD, section.dropout, self.training)

        rotation = None
        if section.positions == "rope":
            scaling: Any = section.rope_scaling  # hashable, like every frozen section, which the type checker does not know
            tables_Ph = rotary_tables(section.largest_context, section.features_per_head, section.rope_theta, scaling, tokens_BT.device)
            rotation = rows_at(positions, tables_Ph[0]), rows_at(positions, tables_Ph[1])
        dropout = section.dropout if self.training else 0.0
        # With a cache each token has another number of keys, and a mask of blocks would be compiled anew for each of them.
        by_blocks = cache is None and takes_blocks(tokens_BT.device, section.features_per_head, dropout)
        sight = Sight(documents_BT, prefix_BT, section.sliding_window, padding_B)
        visible = make_visible(sight, len(tokens_BT), end - start, end, tokens_BT.device, by_blocks=by_blocks)
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotation, visible, None if cache is None else cache.layers[index], start)
        if cache is not None:
            cache.length = end

        x_BTD = self.final_norm(x_BTD[:, -1:] if last_only and labels_BT is None else x_BTD)
        head = self.token_table if self.head is None else self.head
        return head("logits", x_BTD) if labels_BT is None else head("loss", x_BTD, labels_BT)


class TokenTable(nn.Module):
    """One row of D features per token: looked up at the bottom, or compared with what comes out at the top.

    Both uses, and the loss, are in this forward, so that a tied table is gathered for each of them.
    """

    def __init__(self, section: ModelSection, loss: SummedLoss) -> None:
        super().__init__()
        self.weight = _unset(section.vocabulary_size, section.width)
        self.softcap = section.logit_softcap
        self.loss = loss

    def forward(self, use: Literal["look_up", "logits", "loss"], x: torch.Tensor, labels_BT: torch.Tensor | None = None) -> torch.Tensor:
        """look_up: x = tokens_BT -> (B, T, D). logits: x = x_BTD -> (B, T, V). loss: x = x_BTD and labels -> scalar fp32."""
        if use == "look_up":
            return F.embedding(x, self.weight)
        if use == "logits":
            logits_BTV = F.linear(x, self.weight.to(x.dtype))
            return logits_BTV if self.softcap is None else self.softcap * torch.tanh(logits_BTV / self.softcap)
        if labels_BT is None:
            raise ValueError("a loss needs labels")
        loss = self.loss if self.training else summed_cross_entropy
        return loss(x.flatten(0, 1), self.weight, labels_BT.flatten(), softcap=self.softcap)


class PositionTable(nn.Module):
    """Learned positions (GPT-2): one row of D features per position."""

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.weight = _unset(num_positions, width)

    def forward(self, positions: slice | torch.Tensor) -> torch.Tensor:
        """The rows of `positions`, as in `rows_at`."""
        return rows_at(positions, self.weight)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, section: ModelSection, attend: Attend) -> None:
        super().__init__()
        self.dropout = section.dropout
        self.norms_before = section.norm_placement == "before"
        self.attention_norm = make_norm(section, section.width)
        self.attention = Attention(section, attend)
        self.feed_forward_norm = make_norm(section, section.width)
        self.feed_forward = SwiGLU(section) if section.feed_forward == "swiglu" else GELU(section)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        visible: Visible | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D).

        `rotation`: cosines and sines, as in `rotate`; `visible`: as in `Attend`; `start`: the first token's place in the cache.
        """
        if self.norms_before:
            attended_BTD = self.attention(self.attention_norm(x_BTD), rotation, visible, cache, start)
            x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
            return x_BTD + F.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)), self.dropout, self.training)
        attended_BTD = self.attention_norm(self.attention(x_BTD, rotation, visible, cache, start))
        x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
        return x_BTD + F.dropout(self.feed_forward_norm(self.feed_forward(x_BTD)), self.dropout, self.training)


class Attention(nn.Module):
    """Queries, keys and values per head, normalised (Qwen3, OLMo-2) and rotated if asked, attended, and mixed again."""

    def __init__(self, section: ModelSection, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.dropout = section.dropout
        self.head_width = section.features_per_head
        query_width, key_width = section.num_heads * self.head_width, section.kv_heads * self.head_width
        self.query = Linear(section.width, query_width, section.biases)
        self.key = Linear(section.width, key_width, section.biases)
        self.value = Linear(section.width, key_width, section.biases)
        self.output = Linear(query_width, section.width, section.biases)
        self.softcap = section.attention_softcap
        self.norms_heads = section.qk_norm == "head"
        norm_widths = (self.head_width, self.head_width) if self.norms_heads else (query_width, key_width)
        self.query_norm = RMSNorm(norm_widths[0], section.norm_epsilon) if section.qk_norm else None
        self.key_norm = RMSNorm(norm_widths[1], section.norm_epsilon) if section.qk_norm else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        visible: Visible | None,
        cache: LayerCache | None,
        start: int,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D). Arguments as in `Block`."""
        query, key = self.query(x_BTD), self.key(x_BTD)
        if self.query_norm is not None and self.key_norm is not None and not self.norms_heads:
            query, key = self.query_norm(query), self.key_norm(key)
        query_BTNH, key_BTKH = query.unflatten(-1, (-1, self.head_width)), key.unflatten(-1, (-1, self.head_width))
        value_BTKH = self.value(x_BTD).unflatten(-1, (-1, self.head_width))
        if self.query_norm is not None and self.key_norm is not None and self.norms_heads:
            query_BTNH, key_BTKH = self.query_norm(query_BTNH), self.key_norm(key_BTKH)
        if rotation is not None:
            query_BTNH, key_BTKH = rotate(query_BTNH, *rotation), rotate(key_BTKH, *rotation)
        if cache is not None:
            key_BTKH, value_BTKH = cache.extend(start, key_BTKH, value_BTKH)
        dropout = self.dropout if self.training else 0.0
        attended_BTNH = self.attend(query_BTNH, key_BTKH, value_BTKH, visible=visible, dropout=dropout, softcap=self.softcap)
        return self.output(attended_BTNH.flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.gate = Linear(section.width, section.feed_forward_width, section.biases)
        self.up = Linear(section.width, section.feed_forward_width, section.biases)
        self.down = Linear(section.feed_forward_width, section.width, section.biases)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class GELU(nn.Module):
    """down(gelu(up(x))), with the tanh approximation that GPT-2 was trained with (Hendrycks & Gimpel 2016)."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.up = Linear(section.width, section.feed_forward_width, section.biases)
        self.down = Linear(section.feed_forward_width, section.width, section.biases)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Linear(nn.Linear):
    """PyTorch's, in the dtype of what comes in; it draws no weights of its own (which would be thrown away, and takes minutes for 8B)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)  # pyright: ignore[reportUnnecessaryComparison]
        return F.linear(input, self.weight.to(input.dtype), bias)

    def reset_parameters(self) -> None:
        """Mark the weights as unset; see weights.py."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)


def _unset(*shape: int) -> nn.Parameter:
    """A parameter nobody has filled yet: NaN, so that it cannot be mistaken for one that is."""
    return nn.Parameter(torch.full(shape, math.nan))


def make_norm(section: ModelSection, width: int) -> nn.Module:
    """The norm that was chosen: both take bf16 and compute their statistics in fp32."""
    if section.norm == "rmsnorm":
        return RMSNorm(width, section.norm_epsilon)
    return LayerNorm(width, section.norm_epsilon, bias=section.biases)


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in the dtype of what comes in (Zhang & Sennrich 2019)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, in the dtype of what comes in (Ba et al. 2016)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)  # pyright: ignore[reportUnnecessaryComparison]
        return F.layer_norm(input, self.normalized_shape, self.weight.to(input.dtype), bias, self.eps)
