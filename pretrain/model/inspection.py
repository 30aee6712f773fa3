"""A model under the lens: what is found by calling it, and watching.

In: a model and tokens, or the section that describes one. Out: the modules it calls, with shapes; the probabilities it gives to the
next token at each place; which places its heads read from.

Shapes: B samples, T tokens (queries), S tokens that may be looked at (keys), N query heads, K key and value heads, H features per
head, V vocabulary.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.flop_counter import FlopCounterMode

from configs.model_section import ModelSection
from configs.objective_section import ObjectiveSection
from pretrain.model.attention import Visible, causal_attention
from pretrain.model.build import build_model
from pretrain.model.decoder import Decoder

# --- a model of one's own -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleRow:
    """A module as it was called, which other modules of equal name (but for the layer's number) and shapes are counted with."""

    name: str
    """Such as `blocks.N.mixer`."""
    kind: str
    """Its class."""
    takes: tuple[tuple[int, ...], ...]
    gives: tuple[tuple[int, ...], ...]
    parameters: int
    """Of its own, without those of modules inside it; shared ones, and those of a module that is called again, count once."""
    times: int = 1


@dataclass(frozen=True)
class ModuleList:
    """What can be known of a model without knowing what it does."""

    rows: tuple[ModuleRow, ...]
    parameters: int
    forward_flops: int | None
    """Of a micro-batch, matrix products and attention as PyTorch counts them (attention: the whole square)."""
    problem: str | None
    """Why shapes and FLOPs are not known, if they are not."""


def list_modules(section: ModelSection, objective: ObjectiveSection, batch_size: int, num_tokens: int) -> ModuleList:
    """The modules of any model in the order in which they are called, by a forward pass without numbers (on the meta device).

    Listed are those with parameters of their own, and those without modules inside; what was not called stands last, without shapes. Raises
    UserError for an import path that leads nowhere.
    """
    with torch.device("meta"):
        model = build_model(section, objective).eval().requires_grad_(False)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    seen: set[int] = set()
    called: list[ModuleRow] = []
    uncalled: dict[nn.Module, ModuleRow] = {}
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(map(id, own))
        if not own and next(module.children(), None) is not None:
            continue
        in_any_layer = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name, count=1)
        row = ModuleRow(in_any_layer, type(module).__name__, (), (), sum(parameter.numel() for parameter in own))
        uncalled[module] = row

        def write_down(module: nn.Module, given: tuple[Any, ...], result: Any, row: ModuleRow = row) -> None:
            parameters = row.parameters if uncalled.pop(module, None) else 0
            called.append(replace(row, takes=_shapes(given), gives=_shapes(result), parameters=parameters))

        module.register_forward_hook(write_down)
    flops, problem = None, None
    try:
        # By matrix products, which are all counted; of some fused kernels nothing is.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch_size, num_tokens, dtype=torch.long, device="meta"))
        flops = counter.get_total_flops()
    except Exception as error:  # code of the user's own may ask for values, which are not there
        problem = f"its forward pass does not go through without values ({type(error).__name__}: {error})"
    return ModuleList(_count_equal([*called, *uncalled.values()]), num_parameters, flops, problem)


def _shapes(values: Any) -> tuple[tuple[int, ...], ...]:
    """Of all tensors among arguments or results."""
    items = cast("Sequence[Any]", values) if isinstance(values, tuple | list) else (values,)
    return tuple(tuple(item.shape) for item in items if hasattr(item, "shape"))


def _count_equal(rows: Sequence[ModuleRow]) -> tuple[ModuleRow, ...]:
    times: dict[ModuleRow, int] = {}
    for row in rows:
        times[row] = times.get(row, 0) + 1
    return tuple(replace(row, times=count) for row, count in times.items())


# --- what a model does with tokens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What a model expects behind one place of a text."""

    token: int
    """At this place."""
    next_token: int | None
    """What really follows; None: nothing does."""
    probability: float | None
    """Of what really follows."""
    rank: int | None
    """Of what really follows: 1 if no token is likelier."""
    loss: float | None
    """-ln(probability), in nats: what training lowers."""
    entropy: float
    """In nats: the loss it expects. As unsure as between exp(entropy) equally likely tokens."""
    likeliest: tuple[tuple[int, float], ...]
    """Tokens and their probabilities, the likeliest first."""


def predict(model: Decoder, tokens: Sequence[int], *, top: int, num_tokens: int, num_prefix: int = 0) -> list[Prediction]:
    """What a model, which is left in evaluation, expects behind each place of one text.

    num_tokens: entries of the tokenizer; where the table has spare rows, these take part in the softmax (as in training) and are not
    listed. num_prefix: so many tokens at the beginning see each other in both directions. Raises ValueError for no tokens, and as
    `Decoder.forward` does.
    """
    with torch.no_grad():
        logits_TV = _forward(model, tokens, num_prefix)[0]
        found: list[Prediction] = []
        for place, token in enumerate(tokens):
            log_V = logits_TV[place].double().log_softmax(-1).cpu()
            probabilities_V = log_V.exp()
            best_V = log_V[:num_tokens].argsort(descending=True, stable=True)[:top].tolist()
            likeliest = tuple((index, float(probabilities_V[index])) for index in best_V)
            entropy = -float(torch.special.xlogy(probabilities_V, probabilities_V).sum())
            following = tokens[place + 1] if place + 1 < len(tokens) else None
            if following is None:
                found.append(Prediction(token, None, None, None, None, entropy, likeliest))
                continue
            log_probability = float(log_V[following])
            rank = 1 + int((log_V > log_probability).sum())
            found.append(Prediction(token, following, math.exp(log_probability), rank, -log_probability, entropy, likeliest))
    return found


def _forward(model: Decoder, tokens: Sequence[int], num_prefix: int) -> torch.Tensor:
    """Logits (1, T, V) of one text."""
    tokens_1T = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    # A model of the user's own may know of no prefixes: it is told of those there are.
    prefix = {"prefix_BT": torch.arange(len(tokens), device=tokens_1T.device)[None] < num_prefix} if num_prefix else {}
    return model.eval()(tokens_1T, **prefix)


class AttentionRecorder:
    """An `Attend` that writes down, while it is asked to, which places each head reads from; else it is `causal_attention`.

    Weights are computed step by step in fp32, one layer at a time, and kept of the chosen layers and heads only.
    """

    def __init__(self, layers: Collection[int], heads: Collection[int]) -> None:
        self.layers, self.heads = layers, heads
        self.num_calls = 0
        """Of the last recording: one for each layer, if the model is ours."""
        self._maps: dict[tuple[int, int], torch.Tensor] | None = None

    def record(self, model: Decoder, tokens: Sequence[int], num_prefix: int = 0) -> dict[tuple[int, int], torch.Tensor]:
        """(layer, head) -> weights_TT, fp32 on the CPU, row t what place t reads; of one text. `model` was built with this recorder.

        `num_prefix` as in `predict`. Raises as `Decoder.forward` does.
        """
        self.num_calls, self._maps = 0, {}
        try:
            with torch.no_grad():
                _forward(model, tokens, num_prefix)
            return self._maps
        finally:
            self._maps = None

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
        """As `Attend`."""
        if self._maps is None:
            return causal_attention(query_BTNH, key_BSKH, value_BSKH, visible=visible, dropout=dropout, softcap=softcap)
        weights_BNTS = attention_weights(query_BTNH, key_BSKH, visible=visible, softcap=softcap)
        layer, self.num_calls = self.num_calls, self.num_calls + 1
        if layer in self.layers:
            for head in self.heads:
                self._maps[layer, head] = weights_BNTS[0, head].cpu()
        value_BNSH = _for_each_query_head(value_BSKH, query_BTNH.shape[2])
        return (weights_BNTS.to(value_BNSH.dtype) @ value_BNSH).transpose(1, 2)


def attention_weights(
    query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, *, visible: Visible | None = None, softcap: float | None = None
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H), over what is visible), fp32, (B, N, T, S): what `causal_attention` multiplies the values with."""
    query_BNTH = query_BTNH.transpose(1, 2)
    scores_BNTS = query_BNTH.float() @ _for_each_query_head(key_BSKH, query_BTNH.shape[2]).float().mT / math.sqrt(query_BTNH.shape[-1])
    if softcap is not None:
        scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    num_queries, num_keys = scores_BNTS.shape[-2:]
    if isinstance(visible, BlockMask):
        mask = create_mask(visible.mask_mod, len(scores_BNTS), None, num_queries, num_keys, device=str(scores_BNTS.device))
    elif visible is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores_BNTS.device).tril(num_keys - num_queries)
    else:
        mask = visible
    return scores_BNTS.masked_fill(~mask, -math.inf).softmax(dim=-1)


def _for_each_query_head(x_BSKH: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, S, K, H) -> (B, N, S, H): each key head stands once for each query head that it serves."""
    return x_BSKH.transpose(1, 2).repeat_interleave(num_heads // x_BSKH.shape[2], dim=1)
