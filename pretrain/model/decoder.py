"""The decoder-only Transformer, for one device: Llama's form, GPT-2's form, and what lies between.

In: tokens (B, T), and labels when there is something to learn. Out: logits (B, T, V), or the summed loss.
Scaling is applied from outside (engine/). Three things here are shaped by DeepSpeed's ZeRO-3, which
gathers a module's parameters only around that module's own forward, and by its `.bfloat16()`:
- a parameter is used only inside the forward of the module that owns it, a tied head's table included;
- tables of angles are no parameters and no buffers: they are computed outside of any constructor, in
  float64, kept in fp32, and nothing that casts or empties a model can reach them;
- constructors leave weights unset (NaN); `initialize_weights` alone fills them, by name and seed.

Shapes: B batch, T tokens, D model width, N query heads, K key and value heads, H features per head,
F feed-forward width, V vocabulary, P positions, h = H/2 rotating pairs.
"""

import hashlib
import math
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import ModelSection
from pretrain.model.attention import Attend, KeyValueCache, LayerCache, Visible, causal_attention, visible_inside_documents
from pretrain.model.loss import summed_cross_entropy


class Decoder(nn.Module):
    """A decoder-only Transformer, pre-norm: Llama (Touvron et al. 2023) to GPT-2 (Radford et al. 2019).

    `attend` computes the attention of every layer; see `attention.Attend`. Weights are unset until
    `initialize_weights` or a checkpoint fills them.
    """

    def __init__(self, section: ModelSection, attend: Attend = causal_attention) -> None:
        super().__init__()
        self.section = section
        self.token_table = TokenTable(section.vocabulary_size, section.width)
        self.position_table = PositionTable(section.largest_context, section.width) if section.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(section, attend) for _ in range(section.num_layers))
        self.final_norm = _norm(section, section.width)
        self.head = None if section.tied_head else TokenTable(section.vocabulary_size, section.width)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        *,
        documents_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
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

        Raises ValueError for shapes that do not fit, for more positions than `largest_context`, and for documents
        or positions with a cache; a position out of range is an IndexError on the CPU, on CUDA a device-side assertion.
        """
        section = self.section
        start = 0 if cache is None else cache.length
        end = start + tokens_BT.shape[-1]
        if tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
            raise ValueError(f"tokens have the shape {tuple(tokens_BT.shape)}; wanted (batch, tokens), at least one of each")
        for name, given_BT in (("labels", labels_BT), ("documents", documents_BT), ("positions", positions_BT)):
            if given_BT is not None and given_BT.shape != tokens_BT.shape:
                raise ValueError(f"{name} have the shape {tuple(given_BT.shape)}, tokens {tuple(tokens_BT.shape)}; they must be equal")
        if cache is not None and not (documents_BT is None and positions_BT is None):
            raise ValueError("a cache holds one document per row, counted from 0; with it documents_BT and positions_BT must be None")
        if end > section.largest_context:
            raise ValueError(f"the sequence reaches {end} tokens, model.largest_context is {section.largest_context}")

        positions = slice(start, end) if positions_BT is None else positions_BT
        x_BTD = self.token_table("look_up", tokens_BT)
        if self.position_table is not None:
            x_BTD = x_BTD + self.position_table(positions)
        elif section.positions == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4: otherwise the sinusoids drown small embeddings.
            table_PD = sinusoidal_table(section.largest_context, section.width, tokens_BT.device)
            x_BTD = (x_BTD * math.sqrt(section.width) + rows_at(positions, table_PD)).to(x_BTD.dtype)
        x_BTD = F.dropout(x_BTD, section.dropout, self.training)

        rotation = visible = None
        if section.positions == "rope":
            cosine_Ph, sine_Ph = rotary_tables(section.largest_context, section.features_per_head, section.rope_theta, tokens_BT.device)
            rotation = rows_at(positions, cosine_Ph), rows_at(positions, sine_Ph)
        if documents_BT is not None:
            visible = visible_inside_documents(documents_BT, section.features_per_head, section.dropout if self.training else 0.0)
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

    def __init__(self, vocabulary_size: int, width: int) -> None:
        super().__init__()
        self.weight = _unset(vocabulary_size, width)

    def forward(self, use: Literal["look_up", "logits", "loss"], x: torch.Tensor, labels_BT: torch.Tensor | None = None) -> torch.Tensor:
        """look_up: x = tokens_BT -> (B, T, D). logits: x = x_BTD -> (B, T, V). loss: x = x_BTD and labels -> scalar fp32."""
        if use == "look_up":
            return F.embedding(x, self.weight)
        if use == "logits":
            return F.linear(x, self.weight)
        if labels_BT is None:
            raise ValueError("a loss needs labels")
        return summed_cross_entropy(x.flatten(0, 1), self.weight, labels_BT.flatten())


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
        self.attention_norm = _norm(section, section.width)
        self.attention = Attention(section, attend)
        self.feed_forward_norm = _norm(section, section.width)
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
        attended_BTD = self.attention(self.attention_norm(x_BTD), rotation, visible, cache, start)
        x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
        return x_BTD + F.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)), self.dropout, self.training)


class Attention(nn.Module):
    """Queries, keys and values per head, normalised (Qwen3) and rotated if asked, attended, and mixed again."""

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
        self.query_norm = nn.RMSNorm(self.head_width, section.norm_epsilon) if section.qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_width, section.norm_epsilon) if section.qk_norm else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        visible: Visible | None,
        cache: LayerCache | None,
        start: int,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D). Arguments as in `Block`."""
        query_BTNH = self.query(x_BTD).unflatten(-1, (-1, self.head_width))
        key_BTKH = self.key(x_BTD).unflatten(-1, (-1, self.head_width))
        value_BTKH = self.value(x_BTD).unflatten(-1, (-1, self.head_width))
        if self.query_norm is not None and self.key_norm is not None:
            query_BTNH, key_BTKH = self.query_norm(query_BTNH), self.key_norm(key_BTKH)
        if rotation is not None:
            query_BTNH, key_BTKH = rotate(query_BTNH, *rotation), rotate(key_BTKH, *rotation)
        if cache is not None:
            key_BTKH, value_BTKH = cache.extend(start, key_BTKH, value_BTKH)
        dropout = self.dropout if self.training else 0.0
        attended_BTNH = self.attend(query_BTNH, key_BTKH, value_BTKH, visible=visible, dropout=dropout)
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
    """PyTorch's, but it draws no weights of its own (which would be thrown away, and takes minutes for 8B)."""

    def reset_parameters(self) -> None:
        """Mark the weights as unset; see `initialize_weights`."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)


def _unset(*shape: int) -> nn.Parameter:
    """A parameter nobody has filled yet: NaN, so that it cannot be mistaken for one that is."""
    return nn.Parameter(torch.full(shape, math.nan))


def _norm(section: ModelSection, width: int) -> nn.Module:
    """PyTorch's own norms: both take bf16 and compute their statistics in fp32."""
    if section.norm == "rmsnorm":
        return nn.RMSNorm(width, section.norm_epsilon)
    return nn.LayerNorm(width, section.norm_epsilon, bias=section.biases)


# Positions ---------------------------------------------------------------------------------------------


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
def rotary_tables(num_positions: int, head_width: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (P, h) each, fp32, of the angles position x theta^(-i / h); kept per device."""
    angles_Ph = _angles(num_positions, head_width // 2, theta)
    return _constant(np.cos(angles_Ph), device), _constant(np.sin(angles_Ph), device)


@lru_cache(maxsize=16)
def sinusoidal_table(num_positions: int, width: int, device: torch.device) -> torch.Tensor:
    """The fixed positions of Vaswani et al. 2017, section 3.5, (P, D), fp32: sines in even columns, cosines in odd ones."""
    angles = _angles(num_positions, (width + 1) // 2, 10_000.0)
    return _constant(np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(num_positions, -1)[:, :width], device)


def _angles(num_positions: int, num_frequencies: int, theta: float) -> npt.NDArray[np.float64]:
    """position x theta^(-i / num_frequencies), in float64: in bf16 position 257 would already be 256."""
    frequencies = theta ** (-np.arange(num_frequencies, dtype=np.float64) / num_frequencies)
    return np.outer(np.arange(num_positions, dtype=np.float64), frequencies)


def _constant(values: npt.NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """`values` in fp32 on `device`, fit for training even when first asked for while evaluating."""
    with torch.inference_mode(False):
        return torch.from_numpy(values.astype(np.float32)).to(device)


# Weights -----------------------------------------------------------------------------------------------


def initialize_weights(model: Decoder, seed: int) -> None:
    """Fill every parameter, in place, with `initial_weight` of its name: the only place where weights begin.

    Equal for every order of construction, device, ZeRO stage and number of ranks, because each parameter is
    drawn on its own, on the CPU, in fp32, and cast at the end. Under ZeRO-3, which leaves parameters empty,
    engine/ calls `initial_weight` with the full shapes instead. Raises ValueError for a model on the meta device.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device, which holds no values; call model.to_empty(device=...) first")
            parameter.copy_(initial_weight(name, parameter.shape, model.section, seed))


def initial_weight(name: str, shape: tuple[int, ...], section: ModelSection, seed: int) -> torch.Tensor:
    """The initial value of the parameter `name`, fp32 on the CPU: a pure function of its arguments.

    Matrices are normal(0, initial_deviation); those that write into the residual stream are divided by
    sqrt(2 x layers), so that its variance does not grow with depth (GPT-2, Radford et al. 2019, section
    2.3). Scales of norms are 1, biases 0.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    into_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    deviation = section.initial_deviation / (math.sqrt(2 * section.num_layers) if into_residual else 1.0)
    # NumPy's generator, because PyTorch's on the CPU has 32 bits of seed: too few for a seed per name.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    values = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(deviation)


def parameter_count(section: ModelSection) -> int:
    """Numbers the model learns, exactly; a tied head counts once. Built on the meta device: no memory, for any size."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(section).parameters())
