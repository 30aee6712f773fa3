"""The decoder beside transformers' own models: with the same random weights the same logits and gradients; the published counts."""

from typing import Any

import pytest
import torch

from configs.model_section import ModelSection, RopeScalingSection
from pretrain.model.decoder import Decoder
from pretrain.model.exchange import CLASSES, Correspondence, choose_architecture, config_of, correspondences
from pretrain.model.weights import parameter_count
from tests.pretrain.model.forms import decoder_of, draw_tokens, section_of

transformers = pytest.importorskip("transformers", reason="needs transformers, which pretrain[huggingface] brings")

LLAMA3 = RopeScalingSection(kind="llama3", factor=8.0, original_context=16, low_frequency_factor=1.0, high_frequency_factor=4.0)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"norm_epsilon": 1e-6, "rope_theta": 500_000.0}),
    "llama, grouped": ("grouped", {}),
    "llama, a head width of its own": ("llama", {"head_width": 10}),
    "llama, biases": ("grouped", {"biases": True}),
    "llama, tied": ("llama", {"tied_head": True}),
    "llama, linear": ("grouped", {"rope_scaling": RopeScalingSection(kind="linear", factor=4.0, original_context=16)}),
    "llama, llama3": ("grouped", {"rope_scaling": LLAMA3}),
    "llama, yarn": ("grouped", {"rope_scaling": RopeScalingSection(kind="yarn", factor=4.0, original_context=16)}),
    "llama, yarn by hand": (
        "grouped",
        {
            "rope_scaling": RopeScalingSection(
                kind="yarn", factor=4.0, original_context=16, beta_fast=8.0, beta_slow=0.5, attention_factor=1.3
            )
        },
    ),
    "mistral, a window of 5": ("mistral", {}),
    "mistral, a width that heads do not divide": ("mistral", {"width": 30, "head_width": 8, "sliding_window": None}),
    "qwen3": ("qwen3", {"head_width": 16}),
    "qwen3, untied, a window of 5": ("qwen3", {"tied_head": False, "sliding_window": 5}),
    "olmo2": ("olmo2", {"norm_epsilon": 1e-6}),
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tied_head": False}),
}
"""Name -> form of forms.py, and what is changed of it. All but the shortest texts are longer than window and original context."""
NUM_TOKENS = 48


def drawn(section: ModelSection, seed: int) -> Decoder:
    """A decoder whose biases and scales of norms are random too, so that none is at its neutral value."""
    model, generator = decoder_of(section, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def joined(one: Correspondence, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of theirs, from those of ours."""
    whole = torch.cat([tensors[name].detach() for name in one.ours])
    return whole.T if one.transposed else whole


def reference_of(model: Decoder) -> tuple[Any, list[Correspondence]]:
    """The model of transformers with the same weights, fp32, and which tensor is which."""
    section = model.section
    name = choose_architecture(section)
    config = transformers.AutoConfig.for_model(**config_of(section, 0, torch.float32))
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert type(reference).__name__ == CLASSES[name]
    named = correspondences(section, name)
    ours = dict(model.named_parameters())
    found = reference.load_state_dict({one.theirs: joined(one, ours).clone() for one in named}, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == (["lm_head.weight"] if section.tied_head else [])
    return reference, named


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case: str, seed: int) -> None:
    form, changes = CASES[case]
    section = section_of(form, **({"initial_deviation": 0.1} | changes))
    model = drawn(section, seed)
    reference, named = reference_of(model)
    assert reference.config.model_type in case
    assert sum(parameter.numel() for parameter in reference.parameters()) == parameter_count(section)
    tokens = draw_tokens(section, seed, 2, NUM_TOKENS)
    labels = draw_tokens(section, seed + 1, 2, NUM_TOKENS)
    logits_BTV, wanted_BTV = model(tokens), reference(tokens).logits
    torch.testing.assert_close(logits_BTV, wanted_BTV, atol=1e-5, rtol=0)

    model(tokens, labels).backward()
    torch.nn.functional.cross_entropy(wanted_BTV.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    theirs = dict(reference.named_parameters())
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for one in named:
        wanted = theirs[one.theirs].grad
        torch.testing.assert_close(joined(one, ours), wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())), rtol=0, msg=one.theirs)


@pytest.mark.parametrize("case", ["llama, grouped", "mistral, a window of 5", "qwen3", "olmo2", "gpt2"])
def test_bf16_is_as_near_to_fp32_as_transformers_own(case: str, seed: int) -> None:
    """In bf16 both round at other places; neither is further from the fp32 logits than twice the other."""
    form, changes = CASES[case]
    section = section_of(form, **({"initial_deviation": 0.1} | changes))
    model = drawn(section, seed)
    reference, _ = reference_of(model)
    tokens = draw_tokens(section, seed, 4, NUM_TOKENS)
    with torch.no_grad():
        exact = model(tokens)
        ours = (model.bfloat16()(tokens).float() - exact).square().mean().sqrt()
        theirs = (reference.bfloat16()(tokens).logits.float() - exact).square().mean().sqrt()
    assert 0 < ours < 2 * theirs
    assert ours < 0.05 * exact.square().mean().sqrt()


# Counts --------------------------------------------------------------------------------------------------------

GPT2 = {
    "vocabulary_size": 50257, "largest_context": 1024, "norm": "layernorm", "feed_forward": "gelu", "positions": "learned",
    "biases": True, "tied_head": True,
}  # fmt: skip
LLAMA2 = {"vocabulary_size": 32000}
LLAMA3_VOCABULARY = {"vocabulary_size": 128256, "num_kv_heads": 8}
OLMO2 = {"vocabulary_size": 100352, "qk_norm": "full", "norm_placement": "after"}
QWEN3 = {"vocabulary_size": 151936, "num_kv_heads": 8, "head_width": 128, "qk_norm": "head"}
TIED = {"tied_head": True}


def gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    return GPT2 | sizes(layers, width, heads, 4 * width)


def sizes(layers: int, width: int, heads: int, feed_forward: int) -> dict[str, Any]:
    return {"num_layers": layers, "width": width, "num_heads": heads, "feed_forward_width": feed_forward}


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "GPT-2": (gpt2(12, 768, 12), 124_439_808),
    "GPT-2 medium": (gpt2(24, 1024, 16), 354_823_168),
    "GPT-2 large": (gpt2(36, 1280, 20), 774_030_080),
    "GPT-2 XL": (gpt2(48, 1600, 25), 1_557_611_200),
    "Llama-2-7B": (LLAMA2 | sizes(32, 4096, 32, 11008), 6_738_415_616),
    "Llama-2-13B": (LLAMA2 | sizes(40, 5120, 40, 13824), 13_015_864_320),
    "Llama-2-70B": (LLAMA2 | sizes(80, 8192, 64, 28672) | {"num_kv_heads": 8}, 68_976_648_192),
    "Llama-3-8B": (LLAMA3_VOCABULARY | sizes(32, 4096, 32, 14336), 8_030_261_248),
    "Llama-3-70B": (LLAMA3_VOCABULARY | sizes(80, 8192, 64, 28672), 70_553_706_496),
    "Llama-3.1-405B": (LLAMA3_VOCABULARY | sizes(126, 16384, 128, 53248), 405_853_388_800),
    "Llama-3.2-1B": (LLAMA3_VOCABULARY | TIED | sizes(16, 2048, 32, 8192), 1_235_814_400),
    "Llama-3.2-3B": (LLAMA3_VOCABULARY | TIED | sizes(28, 3072, 24, 8192), 3_212_749_824),
    "TinyLlama": (LLAMA2 | sizes(22, 2048, 32, 5632) | {"num_kv_heads": 4}, 1_100_048_384),
    "OLMo-2-1B": (OLMO2 | sizes(16, 2048, 16, 8192), 1_484_916_736),
    "OLMo-2-7B": (OLMO2 | sizes(32, 4096, 32, 11008), 7_298_617_344),
    "OLMo-2-13B": (OLMO2 | sizes(40, 5120, 40, 13824), 13_716_198_400),
    "OLMo-2-32B": (OLMO2 | sizes(64, 5120, 40, 27648) | {"num_kv_heads": 8}, 32_234_279_936),
    "Qwen3-0.6B": (QWEN3 | TIED | sizes(28, 1024, 16, 3072), 596_049_920),
    "Qwen3-1.7B": (QWEN3 | TIED | sizes(28, 2048, 16, 6144), 1_720_574_976),
    "Qwen3-4B": (QWEN3 | TIED | sizes(36, 2560, 32, 9728), 4_022_468_096),
    "Qwen3-8B": (QWEN3 | sizes(36, 4096, 32, 12288), 8_190_735_360),
    "Qwen3-14B": (QWEN3 | sizes(40, 5120, 40, 17408), 14_768_307_200),
    "Qwen3-32B": (QWEN3 | sizes(64, 5120, 64, 25600), 32_762_123_264),
    "Mistral-7B": (LLAMA2 | sizes(32, 4096, 32, 14336) | {"num_kv_heads": 8, "sliding_window": 4096}, 7_241_732_096),
}
"""Released models: their shape, and the number of parameters of their published weights."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_count(name: str) -> None:
    keys, count = PUBLISHED[name]
    assert parameter_count(ModelSection(**keys)) == count
