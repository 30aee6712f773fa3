"""A model as a table: its operations in their order, each with shapes, parameters, FLOPs and bytes.

In: a ModelSection and the size of a micro-batch. Out: one row per operation. All is reckoned from the section: there is no model and
no torch, so that the largest one is told in no time.

Axes in rows are letters: B samples, T tokens, D model width, N query heads, K key and value heads, H features per head, F
feed-forward width, V vocabulary, P positions; two letters side by side, as in `B T NH`, are one axis of their product.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from configs.model_section import ModelSection

Axes: TypeAlias = str
"""A shape in letters, such as `B T NH`; empty: a single number."""
Recompute: TypeAlias = Literal["selective", "full"] | None
"""As `performance.activation_checkpointing`."""

STATISTIC_BYTES = 4
"""Means, deviations and logarithms of sums are kept in fp32 in any precision."""


@dataclass(frozen=True)
class Operation:
    """One row: what is done to a micro-batch, in a layer as often as there are layers."""

    name: str
    does: str
    takes: tuple[Axes, ...]
    gives: Axes
    module: str = ""
    """Where its parameters are, such as `blocks.N.attention.query`; empty: it has none."""
    parameters: int = 0
    flops: int = 0
    """Of the forward pass, two for each multiply-add of a matrix product; of attention, for the pairs of places that are seen. All
    else (norms, rotations, sums) is not counted: it takes its time waiting for memory, not computing."""
    output_bytes: int | None = 0
    """Of what it gives, in the run's precision; None: it never lies in memory as a whole."""
    kept_bytes: int = 0
    """Of what waits in memory for the backward pass, each tensor counted where it was made."""
    in_layer: bool = False


@dataclass(frozen=True)
class ModelTable:
    """The operations of a model in their order, for one micro-batch."""

    sizes: dict[str, int]
    """What each letter is here."""
    num_layers: int
    operations: tuple[Operation, ...]
    notes: tuple[str, ...]
    """Sentences on what the rows do not say."""

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """`B T NH` -> its numbers."""
        return tuple(math.prod(self.sizes[letter] for letter in axis) for axis in axes.split())

    def times(self, operation: Operation) -> int:
        """How often the model does it in one forward pass."""
        return self.num_layers if operation.in_layer else 1

    @property
    def parameters(self) -> int:
        """Numbers the model learns; a tied head counts once."""
        return sum(operation.parameters * self.times(operation) for operation in self.operations)

    @property
    def forward_flops(self) -> int:
        """Of a micro-batch."""
        return sum(operation.flops * self.times(operation) for operation in self.operations)

    @property
    def kept_bytes(self) -> int:
        """Of the activations of a micro-batch that wait for the backward pass."""
        return sum(operation.kept_bytes * self.times(operation) for operation in self.operations)

    @property
    def matrix_parameters(self) -> int:
        """Numbers that each token is multiplied with: no tables that are looked up, no norms, no biases; the head also if it is tied."""
        products = sum(operation.flops * self.times(operation) for operation in self.operations if operation.module)
        return products // (2 * self.sizes["B"] * self.sizes["T"])

    def training_flops_per_token(self) -> dict[str, float]:
        """Forward and backward, three times the forward pass, by the two formulas that published figures use.

        palm: 6 x matrix parameters + 12 L N H T, the whole square of attention (Chowdhery et al. 2022, appendix B). causal: of that
        square the half that is seen (Megatron-LM), or what a sliding window leaves of it. Neither counts what is computed again.
        """
        square = 12 * self.num_layers * self.sizes["N"] * self.sizes["H"] * self.sizes["T"]
        causal = 3 * self.forward_flops / (self.sizes["B"] * self.sizes["T"])
        return {"palm": float(6 * self.matrix_parameters + square), "causal": causal}


def tabulate_model(
    section: ModelSection, batch_size: int, num_tokens: int, bytes_per_number: int, recompute: Recompute = None
) -> ModelTable:
    """The operations of a micro-batch of `batch_size` samples of `num_tokens` tokens, as the Decoder does them while training.

    The kernels are those of a GPU: attention and norms are fused. Raises ValueError for a model or a block of the user's own, which
    `inspection.list_modules` is for, and for more tokens than `largest_context`.
    """
    if section.implementation is not None or section.block is not None:
        raise ValueError("what a model or a block of the user's own does is not known here; list_modules lists its modules")
    if num_tokens > section.largest_context:
        raise ValueError(f"found {num_tokens} tokens, model.largest_context is {section.largest_context}")
    sizes = {
        "B": batch_size,
        "T": num_tokens,
        "D": section.width,
        "N": section.num_heads,
        "K": section.kv_heads,
        "H": section.features_per_head,
        "F": section.feed_forward_width,
        "V": section.vocabulary_size,
        "P": section.largest_context,
    }
    rows = _Rows(section, sizes, bytes_per_number, recompute)
    operations = (*rows.bottom(), *(replace(row, in_layer=True) for row in rows.layer()), *rows.top())
    return ModelTable(sizes, section.num_layers, operations, tuple(_notes(section, num_tokens, recompute)))


class _Rows:
    """The rows of one model, made in their order."""

    def __init__(self, section: ModelSection, sizes: dict[str, int], bytes_per_number: int, recompute: Recompute) -> None:
        self.section, self.sizes, self.recompute = section, sizes, recompute
        self.bytes_per_number = bytes_per_number
        self.norm_kind = "RMSNorm" if section.norm == "rmsnorm" else "LayerNorm"

    def count(self, axes: Axes) -> int:
        """How many numbers a tensor of this shape has."""
        return math.prod(self.sizes[letter] for letter in axes.replace(" ", ""))

    def row(
        self,
        name: str,
        does: str,
        takes: Sequence[Axes],
        gives: Axes,
        *,
        kept: bool = False,
        statistics: int = 0,
        whole: bool = True,
        module: str = "",
        parameters: int = 0,
        flops: int = 0,
    ) -> Operation:
        """kept: whether what it gives waits for the backward pass. statistics: so many numbers in fp32 wait beside it. whole: whether
        what it gives ever lies in memory as a whole."""
        num_bytes = self.count(gives) * self.bytes_per_number
        kept_bytes = kept * num_bytes + statistics * STATISTIC_BYTES
        return Operation(name, does, tuple(takes), gives, module, parameters, flops, num_bytes if whole else None, kept_bytes)

    def linear(self, name: str, does: str, module: str, inside: str, outside: str, *, kept: bool) -> Operation:
        """A matrix product of each token's vector."""
        parameters = self.count(inside + outside) + (self.count(outside) if self.section.biases else 0)
        flops = 2 * self.count("BT" + inside + outside)
        return self.row(
            name, does, [f"B T {inside}"], f"B T {outside}", kept=kept, module=f"blocks.N.{module}", parameters=parameters, flops=flops
        )

    def norm(self, name: str, does: str, module: str, *, kept: bool) -> Operation:
        """Over the features of each token; it keeps one number of each for the backward pass, LayerNorm two."""
        layer_norm = self.section.norm == "layernorm"
        parameters = self.sizes["D"] * (2 if layer_norm and self.section.biases else 1)
        statistics = self.count("BT") * (2 if layer_norm else 1)
        return self.row(name, does, ["B T D"], "B T D", kept=kept, statistics=statistics, module=module, parameters=parameters)

    def dropout(self, takes: Axes, kept: bool) -> Iterator[Operation]:
        if self.section.dropout:
            does = f"while training, sets {100 * self.section.dropout:g} % of the numbers to zero, drawn anew each time"
            row = self.row("dropout", does, [takes], takes, kept=kept)
            yield replace(row, kept_bytes=row.kept_bytes + self.count(takes))  # which numbers were kept, a byte each

    def bottom(self) -> Iterator[Operation]:
        """From tokens to the residual stream."""
        section, sizes = self.section, self.sizes
        added = section.positions in ("learned", "sinusoidal")
        yield self.row(
            "token embedding",
            f"each token's number becomes a vector: its row in a learned table of {sizes['V']:,} rows",
            ["B T"],
            "B T D",
            kept=not (added or section.dropout),
            module="token_table",
            parameters=self.count("VD"),
        )
        if section.positions == "learned":
            yield self.row(
                "positions",
                f"adds a learned row for each place, one of {sizes['P']:,}: without it the order of words would hardly be seen",
                ["B T D", "T D"],
                "B T D",
                kept=not section.dropout,
                module="position_table",
                parameters=self.count("PD"),
            )
        if section.positions == "sinusoidal":
            yield self.row(
                "positions",
                f"times sqrt({sizes['D']}), plus fixed waves that differ at each place: without them the order would hardly be seen",
                ["B T D", "T D"],
                "B T D",
                kept=not section.dropout,
            )
        yield from self.dropout("B T D", kept=True)

    def layer(self) -> Iterator[Operation]:
        """One layer: attention, then feed-forward."""
        rows = [*self._attention(), *self._feed_forward()]
        # The last row, what the next layer begins with, is kept in any case: from it all else can be computed again.
        for number, row in enumerate(rows, 1):
            if self.recompute is None or number == len(rows):
                yield row
            elif self.recompute == "selective" and row.flops:
                statistics = self.count("BNT") * STATISTIC_BYTES if row.name == "weighted values" else 0
                yield replace(row, kept_bytes=(row.output_bytes or 0) + statistics)
            else:
                yield replace(row, kept_bytes=0)

    def _attention(self) -> Iterator[Operation]:
        section, sizes = self.section, self.sizes
        before, rotates = section.norm_placement == "before", section.positions == "rope"
        served = sizes["N"] // sizes["K"]
        grouped = f"; each key head serves {served} query heads" if served > 1 else ""
        if before:
            does = f"brings each token's vector to one scale ({self.norm_kind}), so that no layer has to cope with ever larger numbers"
            yield self.norm("attention norm", does, "blocks.N.attention_norm", kept=True)
        # Of queries and keys that waits for the backward pass which enters a norm or attention itself; a rotation needs only angles.
        waits = section.qk_norm is not None or not rotates
        heads = f"{sizes['N']} heads of {sizes['H']} features"
        yield self.linear("queries", f"what each token looks for: {heads}", "attention.query", "D", "NH", kept=waits)
        heads = f"{sizes['K']} heads of {sizes['H']} features"
        yield self.linear("keys", f"what each token can be found by: {heads}{grouped}", "attention.key", "D", "KH", kept=waits)
        yield self.linear("values", f"what each token hands over where it is found: {heads}", "attention.value", "D", "KH", kept=True)
        if section.qk_norm is not None:
            split = section.qk_norm == "head"
            for one, many, letter in (("query", "queries", "N"), ("key", "keys", "K")):
                shape = f"B T {letter} H" if split else f"B T {letter}H"
                yield self.row(
                    f"{one} norm",
                    f"brings the {many} {'of each head' if split else 'of all heads together'} to one scale: no score grows large",
                    [shape],
                    shape,
                    kept=not rotates,
                    statistics=self.count(f"BT{letter}" if split else "BT"),
                    module=f"blocks.N.attention.{one}_norm",
                    parameters=self.count("H" if split else f"{letter}H"),
                )
        if rotates:
            scaling = section.rope_scaling
            stretched = "" if scaling is None else f", stretched {scaling.factor:g} times by {scaling.kind}"
            does = f"turns pairs of features by angles that grow with the place (RoPE{stretched}): scores come to depend on distances"
            yield self.row("query rotation", does, ["B T N H"], "B T N H", kept=True)
            yield self.row("key rotation", "the same for the keys", ["B T K H"], "B T K H", kept=True)
        yield from self._scores()
        does = f"lays the {sizes['N']} heads side by side and mixes them into one vector per token"
        yield self.linear("mix heads", does, "attention.output", "NH", "D", kept=not before)
        if not before:
            does = f"brings what attention found to one scale ({self.norm_kind}) before it is added"
            yield self.norm("attention norm", does, "blocks.N.attention_norm", kept=False)
        yield from self.dropout("B T D", kept=False)
        does = "adds what attention found to what was there before: the residual stream"
        yield self.row("residual sum", does, ["B T D", "B T D"], "B T D", kept=True)

    def _scores(self) -> Iterator[Operation]:
        """Masked self-attention. One fused kernel does it, in pieces: neither scores nor weights ever lie in memory as a whole."""
        section, sizes = self.section, self.sizes
        window = min(section.sliding_window or sizes["T"], sizes["T"])
        # 2 x the pairs that are seen, half a square for the whole context: w T - w^2 / 2.
        flops = self.count("BNH") * (2 * window * sizes["T"] - window * window)
        square = "B N T T"
        does = f"how well each query fits each key: their dot product / sqrt({sizes['H']})"
        yield self.row("scores", does, ["B T N H", "B T K H"], square, flops=flops, whole=False)
        if section.attention_softcap is not None:
            cap = f"{section.attention_softcap:g}"
            yield self.row("soft cap", f"scores s become {cap} tanh(s / {cap}): none leaves -{cap} to {cap}", [square], square, whole=False)
        hidden = "hides what comes later" + (f" and what is {window:,} places back or more" if window < sizes["T"] else "")
        does = f"{hidden}, and makes shares of each row of scores that sum to 1 (masked self-attention)"
        yield self.row("masked softmax", does, [square], square, whole=False)
        yield self.row(
            "weighted values",
            "the mean of the values each token may see, by these shares",
            [square, "B T K H"],
            "B T N H",
            kept=True,
            statistics=self.count("BNT"),
            flops=flops,
        )

    def _feed_forward(self) -> Iterator[Operation]:
        section, sizes = self.section, self.sizes
        before, gated = section.norm_placement == "before", section.feed_forward == "swiglu"
        if before:
            does = f"brings each token's vector to one scale again ({self.norm_kind})"
            yield self.norm("feed-forward norm", does, "blocks.N.feed_forward_norm", kept=True)
        if gated:
            does = f"feed-forward, each token for itself: how far each of {sizes['F']:,} features is let through"
            yield self.linear("gate", does, "feed_forward.gate", "D", "F", kept=True)
        does = "the features that are let through" if gated else f"feed-forward, each token for itself: {sizes['F']:,} features"
        yield self.linear("up", does, "feed_forward.up", "D", "F", kept=True)
        if gated:
            row = self.row("activation", "silu(gate) x up (SwiGLU)", ["B T F", "B T F"], "B T F")
            yield replace(row, kept_bytes=2 * (row.output_bytes or 0))  # the product, and silu(gate)
        else:
            yield self.row("activation", "gelu(up): what is below zero is nearly closed", ["B T F"], "B T F", kept=True)
        yield self.linear("down", f"back to {sizes['D']:,} features", "feed_forward.down", "F", "D", kept=not before)
        if not before:
            does = f"brings what the feed-forward part found to one scale ({self.norm_kind}) before it is added"
            yield self.norm("feed-forward norm", does, "blocks.N.feed_forward_norm", kept=False)
        yield from self.dropout("B T D", kept=False)
        does = "adds it to the residual stream, which goes on to the next layer"
        yield self.row("residual sum", does, ["B T D", "B T D"], "B T D", kept=True)

    def top(self) -> Iterator[Operation]:
        """From the residual stream to the loss."""
        section, sizes = self.section, self.sizes
        yield self.norm("final norm", f"brings what comes out of the last layer to one scale ({self.norm_kind})", "final_norm", kept=False)
        whose = "of the token table again (tied)" if section.tied_head else "of a table of its own"
        yield self.row(
            "head",
            f"compares each token's vector with {sizes['V']:,} rows {whose}: a score (logit) for each token that may come next",
            ["B T D"],
            "B T V",
            module="token_table" if section.tied_head else "head",
            parameters=0 if section.tied_head else self.count("VD"),
            flops=2 * self.count("BTDV"),
            whole=False,
        )
        if section.logit_softcap is not None:
            cap = f"{section.logit_softcap:g}"
            does = f"logits l become {cap} tanh(l / {cap}): none leaves -{cap} to {cap}"
            yield self.row("logit soft cap", does, ["B T V"], "B T V", whole=False)
        does = "makes probabilities of the logits (softmax); -log of that of the token that really came, summed, is what training lowers"
        # Its gradients are formed at once, chunk by chunk: of what entered the head, and of the head's table.
        kept_bytes = (self.count("BTD") + self.count("VD")) * self.bytes_per_number
        yield replace(self.row("loss", does, ["B T V", "B T"], ""), output_bytes=4, kept_bytes=kept_bytes)


def _notes(section: ModelSection, num_tokens: int, recompute: Recompute) -> Iterator[str]:
    if section.positions == "none":
        yield "Nothing says where a token stands: order is seen only by what the mask hides (positions: none)."
    if section.tied_head:
        yield "The head is the token table: its parameters count once, its FLOPs are those of the head."
    if section.sliding_window is not None and section.sliding_window >= num_tokens:
        yield f"The sliding window of {section.sliding_window:,} tokens is no narrower than these {num_tokens:,}: it hides nothing."
    if section.attention_softcap is not None:
        yield "Where FlexAttention cannot be had (on a CPU), the soft cap costs memory for all scores, several times B x N x T x T."
    if recompute == "full":
        yield "performance.activation_checkpointing full: a layer keeps its input; the backward pass computes each layer once more."
    if recompute == "selective":
        yield (
            "performance.activation_checkpointing selective: a layer keeps its input and what matrix products and attention gave; the "
            "rest is computed once more."
        )
