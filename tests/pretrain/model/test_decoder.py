"""The decoder: causal in every form, exact in its positions, begun by name and seed, and able to learn."""

import math
from typing import Any, Literal

import pytest
import torch

from configs.schema import ModelSection
from pretrain.model.attention import KeyValueCache, Visible, causal_attention
from pretrain.model.decoder import (
    Decoder,
    TokenTable,
    initial_weight,
    initialize_weights,
    parameter_count,
    rotary_tables,
    rotate,
    sinusoidal_table,
)
from pretrain.model.loss import IGNORE
from tests.pretrain.model.forms import FORMS, GPT2, decoder_of, draw_documents, draw_tokens, positions_inside, section_of

CPU = torch.device("cpu")


# Causality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_later_token_never_changes_an_earlier_logit(seed: int, form: str, dtype: torch.dtype) -> None:
    section = section_of(form, initial_deviation=0.2)
    model = decoder_of(section, seed).to(dtype).eval()
    tokens = draw_tokens(section, seed, 2, 40)
    with torch.no_grad():
        before = model(tokens)
        for position in (1, 17, 39):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % section.vocabulary_size
            after = model(changed)
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("form", FORMS)
def test_order_of_tokens_matters(seed: int, form: str) -> None:
    """Without positions, the last logits would not notice that two earlier tokens changed places."""
    section = section_of(form, initial_deviation=0.2)
    model = decoder_of(section, seed).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert (model(tokens)[:, -1] - model(tokens[:, [1, 0, 2, 3]])[:, -1]).abs().max() > 1e-3


# Positions ---------------------------------------------------------------------------------------------


def test_rotated_scores_depend_on_distance_only(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    cosine, sine = rotary_tables(8192, 16, 10_000.0, CPU)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotate(query.reshape(1, 1, 1, 16), cosine[[query_position]], sine[[query_position]])
        turned_key = rotate(key.reshape(1, 1, 1, 16), cosine[[key_position]], sine[[key_position]])
        return float((turned_query.double() * turned_key.double()).sum())

    for distance in (0, 1, 50):
        scores = [score(start + distance, start) for start in (0, 3, 1000, 8000)]
        assert max(scores) - min(scores) < 1e-5, (distance, scores)
    assert score(0, 0) == pytest.approx(float(query @ key), abs=1e-5)
    assert abs(score(50, 0) - score(0, 0)) > 1e-6


def test_rotary_tables_are_exact_at_the_far_end() -> None:
    cosine, sine = rotary_tables(131_072, 128, 500_000.0, CPU)
    assert cosine.dtype == sine.dtype == torch.float32
    assert cosine.shape == sine.shape == (131_072, 64)
    for position, pair in ((131_071, 0), (131_071, 1), (99_999, 63), (257, 5)):
        angle = position * 500_000.0 ** (-pair / 64)
        assert float(cosine[position, pair]) == pytest.approx(math.cos(angle), abs=1e-7)
        assert float(sine[position, pair]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_rotation_keeps_lengths_and_turns_halves(seed: int) -> None:
    x = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(seed))
    cosine, sine = rotary_tables(9, 8, 100.0, CPU)
    turned = rotate(x, cosine, sine)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cosine, sine)[:, None]
    torch.testing.assert_close(turned, torch.cat([as_complex.real, as_complex.imag], -1))
    assert rotate(x.bfloat16(), cosine, sine).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["llama", "sinusoidal"])
def test_tables_stay_exact_when_the_model_is_cast(seed: int, form: str) -> None:
    model = decoder_of(section_of(form), seed).bfloat16()
    model(draw_tokens(model.section, seed, 1, 40))
    tables = (*rotary_tables(64, 8, 10_000.0, CPU), sinusoidal_table(64, 32, CPU))
    assert {table.dtype for table in tables} == {torch.float32}
    assert float(tables[0][63, 0]) == pytest.approx(math.cos(63), abs=1e-7)
    assert float(tables[2][63, 1]) == pytest.approx(math.cos(63), abs=1e-7)
    assert float(tables[2][63, 2]) == pytest.approx(math.sin(63 * 10_000 ** (-2 / 32)), abs=1e-7)
    assert not list(model.buffers())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["llama", "sinusoidal"])
def test_tables_first_made_while_evaluating_serve_training(seed: int, form: str) -> None:
    rotary_tables.cache_clear()
    sinusoidal_table.cache_clear()
    model = decoder_of(section_of(form), seed)
    tokens = draw_tokens(model.section, seed, 1, 8)
    with torch.inference_mode():
        model(tokens)
    model(tokens, tokens).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_odd_width_of_sinusoids() -> None:
    assert sinusoidal_table(4, 7, CPU).shape == (4, 7)


# Sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_count_is_the_count_of_the_real_model(form: str) -> None:
    section = section_of(form)
    assert parameter_count(section) == sum(p.numel() for p in Decoder(section).parameters())


def test_construction_on_the_meta_device_allocates_nothing() -> None:
    section = section_of(vocabulary_size=128_256, width=16_384, num_heads=128, num_layers=4, feed_forward_width=53_248)
    with torch.device("meta"):
        model = Decoder(section)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    with torch.device("meta"):
        small = Decoder(section_of())
        nothing = torch.zeros(2, 5, dtype=torch.long)
        assert small(nothing).shape == small(nothing, documents_BT=nothing, positions_BT=nothing).shape == (2, 5, 97)
        assert small(nothing, nothing).shape == ()


def test_a_meta_model_made_real_equals_a_real_one(seed: int) -> None:
    section = section_of()
    with torch.device("meta"):
        model = Decoder(section)
    with pytest.raises(ValueError, match="meta device"):
        initialize_weights(model, seed)
    model = model.to_empty(device="cpu")
    initialize_weights(model, seed)
    tokens = draw_tokens(section, seed, 2, 20)
    assert torch.equal(model(tokens), decoder_of(section, seed)(tokens))


# Weights -----------------------------------------------------------------------------------------------


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
    initialize_weights(model, seed)
    for one, two in zip(model.parameters(), decoder_of(section_of(), seed).bfloat16().parameters(), strict=True):
        assert torch.equal(one, two)


# Forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_that_of_the_logits(seed: int, form: str) -> None:
    section = section_of(form)
    model = decoder_of(section, seed)
    tokens, labels = draw_tokens(section, seed, 2, 40), draw_tokens(section, seed + 1, 2, 40)
    labels[0, 5:20] = IGNORE
    loss = model(tokens, labels)
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    # Untrained, every token is about as likely as any other.
    assert loss.item() / 65 == pytest.approx(math.log(97), abs=0.25)
    found, wanted = (torch.autograd.grad(one, list(model.parameters())) for one in (loss, expected))
    for (name, _), one, two in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_all_masked_batch_gives_zero_gradients(seed: int, form: str) -> None:
    model = decoder_of(section_of(form), seed)
    tokens = draw_tokens(model.section, seed, 2, 10)
    loss = model(tokens, torch.full_like(tokens, IGNORE))
    assert loss.item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.eq(0).all(), name


@pytest.mark.parametrize("form", FORMS)
def test_bf16_stays_close_to_fp32(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.1)
    model = decoder_of(section, seed).bfloat16()
    tokens = draw_tokens(section, seed, 2, 40)
    with torch.no_grad():
        rounded = model(tokens)
        exact = model.float()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_cached_logits_equal_those_without_cache(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.1)
    model = decoder_of(section, seed).eval()
    tokens = draw_tokens(section, seed, 2, 30)
    with torch.no_grad():
        whole = model(tokens)
        cache = KeyValueCache(section.num_layers, 30)
        parts = [model(tokens[:, start:end], cache=cache) for start, end in ((0, 11), (11, 12), (12, 20), (20, 30))]
        assert cache.length == 30
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens, last_only=True), whole[:, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_feed_forward_is_the_formula(seed: int, kind: Literal["swiglu", "gelu"]) -> None:
    part = decoder_of(section_of(feed_forward=kind, initial_deviation=1.0), seed).blocks[0].get_submodule("feed_forward").double()
    weight = {name.removesuffix(".weight"): parameter for name, parameter in part.named_parameters()}
    x_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(seed)).double()
    up_TF = x_TD @ weight["up"].T
    if kind == "swiglu":
        gate_TF = x_TD @ weight["gate"].T
        inner_TF = gate_TF / (1 + (-gate_TF).exp()) * up_TF
    else:
        inner_TF = 0.5 * up_TF * (1 + (math.sqrt(2 / math.pi) * (up_TF + 0.044715 * up_TF**3)).tanh())
    torch.testing.assert_close(part(x_TD), inner_TF @ weight["down"].T)


def test_attention_can_be_exchanged(seed: int) -> None:
    calls: list[tuple[int, ...]] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, visible: Visible | None, dropout: float) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return causal_attention(query, key, value, visible=visible, dropout=dropout)

    model = Decoder(section_of(), attend)
    initialize_weights(model, seed)
    tokens = draw_tokens(model.section, seed, 2, 7)
    assert torch.equal(model(tokens), decoder_of(model.section, seed)(tokens))
    assert calls == [(2, 7, 4, 8)] * 2


def test_every_parameter_is_used_inside_the_forward_of_its_owner(seed: int) -> None:
    """What ZeRO-3 does, in small: weights are there only while their own module runs."""
    for form in FORMS:
        model = decoder_of(section_of(form), seed)
        whole = {name: parameter.data for name, parameter in model.named_parameters()}
        tokens, documents = draw_tokens(model.section, seed, 1, 6), draw_documents(seed, 1, 6)
        packed = {"documents_BT": documents, "positions_BT": positions_inside(documents)}
        expected, expected_logits, expected_packed = model(tokens, tokens).item(), model(tokens).detach(), model(tokens, **packed).detach()
        for prefix, module in model.named_modules():
            own = [(parameter, whole[f"{prefix}.{name}"]) for name, parameter in module.named_parameters(recurse=False)]

            def gather(*_: Any, own: list[Any] = own) -> None:
                for parameter, values in own:
                    parameter.data = values

            def release(*_: Any, own: list[Any] = own) -> None:
                for parameter, _values in own:
                    parameter.data = torch.empty(0)

            release()
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
        with torch.no_grad():
            assert model(tokens, tokens).item() == expected, form
            assert torch.equal(model(tokens), expected_logits), form
            assert torch.equal(model(tokens, **packed), expected_packed), form


def test_a_tied_head_is_one_parameter(seed: int) -> None:
    model = decoder_of(section_of("gpt2"), seed)
    assert [name for name, module in model.named_modules() if isinstance(module, TokenTable)] == ["token_table"]
    assert "head.weight" not in model.state_dict()
    assert "head.weight" in decoder_of(section_of(), seed).state_dict()


def test_dropout_acts_in_training_only(seed: int) -> None:
    model = decoder_of(section_of("gpt2", dropout=0.2), seed)
    tokens = draw_tokens(model.section, seed, 2, 20)
    torch.manual_seed(seed)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
    assert torch.equal(model(tokens), decoder_of(section_of("gpt2"), seed)(tokens))


def test_what_does_not_fit_is_refused(seed: int) -> None:
    model = decoder_of(section_of(), seed)
    with pytest.raises(ValueError, match="reaches 65 tokens"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="they must be equal"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
    for shape in ((4,), (1, 0), (0, 4)):
        with pytest.raises(ValueError, match="wanted"):
            model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="needs labels"):
        model.token_table("loss", torch.zeros(1, 4, 32))


@pytest.mark.parametrize("form", ["qwen3", "gpt2", "sinusoidal"])
def test_a_tiny_model_learns_one_batch_by_heart(seed: int, form: str) -> None:
    section = section_of(form)
    model = decoder_of(section, seed)
    text = draw_tokens(section, seed, 4, 17)
    tokens, labels = text[:, :-1], text[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = math.inf
    for _ in range(150):
        summed = model(tokens, labels)
        loss = summed.item() / labels.numel()
        optimizer.zero_grad()
        (summed / labels.numel()).backward()
        optimizer.step()
    assert loss < 0.1  # not 0: samples may begin with the same token and go on differently
