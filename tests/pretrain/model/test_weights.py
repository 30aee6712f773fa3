"""Weights: begun by name and seed alone, with the published deviations, and counted exactly."""

import math

import pytest
import torch

from configs.model_section import ModelSection
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initial_weight, initialize_weights, parameter_count
from tests.pretrain.model.forms import FORMS, GPT2, decoder_of, draw_tokens, section_of


@pytest.mark.parametrize("form", FORMS)
def test_count_is_the_count_of_the_real_model(form: str) -> None:
    section = section_of(form)
    assert parameter_count(section) == sum(p.numel() for p in Decoder(section).parameters())


def test_a_meta_model_made_real_equals_a_real_one(seed: int) -> None:
    section = section_of()
    with torch.device("meta"):
        model = Decoder(section)
    with pytest.raises(ValueError, match="meta device"):
        initialize_weights(model, model.section, seed)
    model = model.to_empty(device="cpu")
    initialize_weights(model, model.section, seed)
    tokens = draw_tokens(section, seed, 2, 20)
    assert torch.equal(model(tokens), decoder_of(section, seed)(tokens))


def test_unset_weights_show(seed: int) -> None:
    model = Decoder(section_of("gpt2"))
    assert model(draw_tokens(model.section, seed, 1, 4)).isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_weights_follow_name_and_seed_only(seed: int, form: str) -> None:
    section = section_of(form)
    model = decoder_of(section, seed)
    torch.manual_seed(0)
    again = decoder_of(section, seed)
    deeper = dict(decoder_of(section_of(form, num_layers=3), seed).named_parameters())
    other = dict(decoder_of(section, seed + 1).named_parameters())
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, two)
        # The order in which parameters are drawn, and what else is drawn, does not matter.
        assert torch.equal(one, initial_weight(name, tuple(one.shape), section, seed))
        if not name.endswith(("output.weight", "down.weight")):
            assert torch.equal(one, deeper[name]), name
        assert torch.equal(one, other[name]) == (one.dim() == 1), name


def test_nothing_drawn_before_or_between_matters(seed: int) -> None:
    """Each parameter by itself, in the opposite order, as another process would that holds only some of them."""
    section = section_of("olmo2")
    model = decoder_of(section, seed)
    for name, parameter in reversed(list(model.named_parameters())):
        torch.rand(3)
        assert torch.equal(initial_weight(name, tuple(parameter.shape), section, seed), parameter), name
    # Where a table stands in the model, and what it is used for, does not matter either: only what it is called.
    assert torch.equal(initial_weight("a", (5, 4), section, seed), initial_weight("a", (5, 4), section_of("gpt2"), seed))
    assert not torch.equal(initial_weight("a", (5, 4), section, seed), initial_weight("b", (5, 4), section, seed))


@pytest.mark.parametrize("form", FORMS)
def test_without_depth_scaling_all_matrices_are_drawn_alike(seed: int, form: str) -> None:
    section = section_of(form, num_layers=3)
    scaled, unscaled = (decoder_of(section_of(form, num_layers=3, depth_scaled_initialization=on), seed) for on in (True, False))
    assert section.depth_scaled_initialization
    for (name, one), other in zip(scaled.named_parameters(), unscaled.parameters(), strict=True):
        if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
            torch.testing.assert_close(one * math.sqrt(6), other, rtol=1e-6, atol=0.0)
            assert other.std().item() == pytest.approx(0.02, rel=0.15)
        else:
            assert torch.equal(one, other), name


def test_the_deviation_is_a_factor(seed: int) -> None:
    wide = dict(decoder_of(section_of(initial_deviation=0.5), seed).named_parameters())
    for name, parameter in decoder_of(section_of(initial_deviation=0.125), seed).named_parameters():
        assert torch.equal(parameter * (4 if parameter.dim() > 1 else 1), wide[name]), name


def test_a_model_of_ones_own_is_begun_by_its_names(seed: int) -> None:
    """Any module: matrices and larger are drawn, single numbers and vectors are 1, biases 0."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(math.nan))
            self.scale = torch.nn.Parameter(torch.full((3,), math.nan))
            self.bias = torch.nn.Parameter(torch.full((3,), math.nan))
            self.part = torch.nn.Linear(3, 2)
            self.filters = torch.nn.Parameter(torch.full((4, 3, 5), math.nan))

    model = Own()
    initialize_weights(model, section_of(), seed)
    assert model.temperature == 1
    assert model.scale.tolist() == [1, 1, 1]
    assert [*model.bias.tolist(), *model.part.bias.tolist()] == [0] * 5
    assert 0.01 < model.filters.std() < 0.04
    assert not model.part.weight.isnan().any()


def test_statistics_of_initial_weights(seed: int) -> None:
    section = ModelSection(vocabulary_size=1000, num_layers=8, width=128, num_heads=4, feed_forward_width=256, **GPT2)
    model = decoder_of(section, seed)
    seen: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert parameter.eq(0).all(), name
        elif "norm" in name:
            assert parameter.eq(1).all(), name
        else:
            wanted = 0.02 / 4 if name.endswith(("attention.output.weight", "feed_forward.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.04), name
            assert abs(parameter.mean().item()) < 6 * wanted / math.sqrt(parameter.numel()), name
            seen.append(parameter.detach().flatten()[:1000] / wanted)
    # No two parameters repeat each other.
    correlation = torch.corrcoef(torch.stack(seen)).fill_diagonal_(0).abs().max()
    assert correlation < 0.25


def test_bf16_weights_are_the_rounded_fp32_ones(seed: int) -> None:
    model = Decoder(section_of()).bfloat16()
    initialize_weights(model, model.section, seed)
    for one, two in zip(model.parameters(), decoder_of(section_of(), seed).bfloat16().parameters(), strict=True):
        assert torch.equal(one, two)
