"""Small decoders of every form, for the tests of this folder."""

from typing import Any

import torch

from configs.model_section import ModelSection
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights

SMALL: dict[str, Any] = {
    "vocabulary_size": 97,
    "num_layers": 2,
    "width": 32,
    "num_heads": 4,
    "feed_forward_width": 48,
    "largest_context": 64,
}
GPT2: dict[str, Any] = {"norm": "layernorm", "feed_forward": "gelu", "positions": "learned", "biases": True, "tied_head": True}
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "head_width": 10},
    "qwen3": {"num_kv_heads": 2, "qk_norm": "head", "tied_head": True},
    "gpt2": GPT2,
    "sinusoidal": {"positions": "sinusoidal", "norm": "layernorm", "feed_forward": "gelu"},
    "olmo2": {"norm_placement": "after", "qk_norm": "full", "num_kv_heads": 2},
    "mistral": {"num_kv_heads": 2, "sliding_window": 5},
    "capped": {"attention_softcap": 0.5, "logit_softcap": 0.7},
    "no positions": {"positions": "none"},
    "mixed": {"positions": "learned", "qk_norm": "head", "biases": True, "num_kv_heads": 2},
}


def section_of(form: str = "llama", **changes: Any) -> ModelSection:
    return ModelSection(**(SMALL | FORMS[form] | changes))


def decoder_of(section: ModelSection, seed: int) -> Decoder:
    model = Decoder(section)
    initialize_weights(model, model.section, seed)
    return model


def draw_tokens(section: ModelSection, seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, section.vocabulary_size, shape, generator=torch.Generator().manual_seed(seed))


def draw_documents(seed: int, num_rows: int, num_tokens: int) -> torch.Tensor:
    """Numbers of documents, (B, T): at least three in each row, cut elsewhere in each, one of them of a single place."""
    generator = torch.Generator().manual_seed(seed)
    starts_BT = torch.zeros(num_rows, num_tokens, dtype=torch.long)
    for starts_T in starts_BT:
        cuts = 2 + torch.randperm(num_tokens - 3, generator=generator)[:2]
        starts_T[cuts] = starts_T[cuts + 1] = 1
    return starts_BT.cumsum(1)


def positions_inside(documents_BT: torch.Tensor) -> torch.Tensor:
    """The place of each token in its document, counted from 0."""
    return torch.stack(
        [torch.cat([torch.arange(int(length)) for length in row.unique_consecutive(return_counts=True)[1]]) for row in documents_BT]
    )
