"""The decoder: causal in every form, its slopes those of float64, compiled layer by layer, and able to learn."""

import math
from typing import Any, Literal

import pytest
import torch

from pretrain.model import attention, decoder
from pretrain.model.attention import causal_attention
from pretrain.model.decoder import Attention, Block, Decoder, TokenTable
from pretrain.model.loss import IGNORE, summed_cross_entropy
from pretrain.model.weights import initialize_weights
from tests.pretrain.model.forms import FORMS, decoder_of, draw_documents, draw_tokens, positions_inside, section_of
from tests.pretrain.model.formulas import plain_attention, rotate_by_pairs


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
def test_fp32_weights_computed_in_bf16_are_a_bf16_model_with_fp32_gradients(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.1)
    model, rounded = Decoder(section, activation_dtype=torch.bfloat16), decoder_of(section, seed).bfloat16()
    initialize_weights(model, section, seed)
    tokens, documents = draw_tokens(section, seed, 2, 20), draw_documents(seed, 2, 20)
    given = {"documents_BT": documents, "positions_BT": positions_inside(documents)}
    assert torch.equal(model(tokens, **given), rounded(tokens, **given))
    losses = [one(tokens, tokens, **given) for one in (model, rounded)]
    assert torch.equal(*losses)
    found, expected = (torch.autograd.grad(loss, list(one.parameters())) for loss, one in zip(losses, (model, rounded), strict=True))
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        assert (one.dtype, other.dtype) == (torch.float32, torch.bfloat16)
        assert (one - other).norm() <= 2**-7 * other.float().norm(), name


def test_the_loss_of_a_bf16_model_is_that_of_its_exact_logits(seed: int) -> None:
    """The head's weights and what reaches it are rounded; from there on nothing may be."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append((hidden, weight))
        return summed_cross_entropy(hidden, weight, labels, **how)

    for form in FORMS:
        section = section_of(form, initial_deviation=0.3)
        model = Decoder(section, loss=loss)
        initialize_weights(model, section, seed)
        tokens = draw_tokens(section, seed, 4, 40)
        found = model.bfloat16()(tokens, tokens)
        hidden, weight = (tensor.double() for tensor in seen[-1])
        logits = hidden @ weight.T
        if section.logit_softcap is not None:
            logits = section.logit_softcap * (logits / section.logit_softcap).tanh()
        expected = torch.nn.functional.cross_entropy(logits, tokens.flatten(), reduction="sum")
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=1e-3), form


def test_what_training_minimises_can_be_exchanged_and_evaluation_cannot(seed: int) -> None:
    calls: list[tuple[Any, ...]] = []

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, softcap: float | None = None) -> torch.Tensor:
        calls.append((tuple(hidden.shape), tuple(weight.shape), tuple(labels.shape), softcap))
        return 2 * summed_cross_entropy(hidden, weight, labels, softcap=softcap)

    for form in ("llama", "gpt2", "capped"):
        model = Decoder(section_of(form), loss=loss)
        initialize_weights(model, model.section, seed)
        tokens = draw_tokens(model.section, seed, 2, 7)
        plain = decoder_of(model.section, seed)(tokens, tokens)
        assert torch.equal(model(tokens, tokens), 2 * plain)
        assert torch.equal(model.eval()(tokens, tokens), plain)
        assert calls.pop() == ((14, 32), (97, 32), (14,), model.section.logit_softcap)
        assert not calls


# Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_slopes_of_the_model_in_float64(seed: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd of the model as it trains, in fp32, against differences of the loss of the same model in float64.

    For that, the parts that compute in fp32 whatever they are given (rotation, capped attention, loss) are replaced by their
    formulas. Packed documents, a prefix and targets that do not count are there too.
    """
    section = section_of(form, initial_deviation=0.2)
    documents = draw_documents(seed, 2, 12)
    tokens, labels = draw_tokens(section, seed, 2, 12), draw_tokens(section, seed + 1, 2, 12)
    labels[0, 3:6] = IGNORE
    given = {"documents_BT": documents, "positions_BT": positions_inside(documents), "prefix_BT": positions_inside(documents) < 2}
    model = decoder_of(section, seed)
    # Deeper than the first weights, which are all alike: scales and biases get values too.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(name)))
    model(tokens, labels, **given).backward()

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, softcap: float | None = None) -> torch.Tensor:
        logits = hidden @ weight.T
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    exact = Decoder(section, plain_attention, loss_of)
    exact.load_state_dict(model.state_dict())
    exact.double()
    monkeypatch.setattr(decoder, "rotate", rotate_by_pairs)
    generator = torch.Generator().manual_seed(seed)
    for (name, parameter), slope in zip(exact.named_parameters(), model.parameters(), strict=True):
        assert slope.grad is not None, name
        values, gradient = parameter.detach().view(-1), slope.grad.flatten()
        for place in (int(gradient.abs().argmax()), int(torch.randint(len(values), (1,), generator=generator))):
            step, losses = 1e-4, []
            for sign in (1, -2):
                values[place] += sign * step
                with torch.no_grad():
                    losses.append(exact(tokens, labels, **given).item())
            values[place] += step
            found, expected = gradient[place].item(), (losses[0] - losses[1]) / (2 * step)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4 * max(1.0, float(gradient.abs().max()))), (name, place)


@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
def test_attention_with_normalised_queries_and_keys_is_the_formula(seed: int, qk_norm: Literal["head", "full"] | None) -> None:
    """Values against the formula, gradients of inputs and of all weights against finite differences, in float64."""
    section = section_of(width=8, num_heads=2, num_kv_heads=1, qk_norm=qk_norm, initial_deviation=0.5)
    part = decoder_of(section, seed).blocks[0].get_submodule("attention").double()
    assert isinstance(part, Attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, 4, 8, generator=generator).double().requires_grad_()

    def normalise(x: torch.Tensor, norm: torch.nn.Module | None, heads: int) -> torch.Tensor:
        x_BTNH = x.unflatten(-1, (heads, 4))
        if qk_norm is None:
            return x_BTNH
        assert norm is not None
        width = x_BTNH if qk_norm == "head" else x
        scale = torch.as_tensor(norm.get_parameter("weight"))
        return (width / (width.square().mean(-1, keepdim=True) + section.norm_epsilon).sqrt() * scale).reshape(x_BTNH.shape)

    query = normalise(x @ part.query.weight.T, part.query_norm, 2)
    key = normalise(x @ part.key.weight.T, part.key_norm, 1)
    value = (x @ part.value.weight.T).unflatten(-1, (1, 4))
    expected = plain_attention(query, key, value).flatten(2) @ part.output.weight.T
    torch.testing.assert_close(part(x, None, None, None, 0), expected)
    weights = [parameter for name, parameter in part.named_parameters()]
    names = [name for name, _ in part.named_parameters()]

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(part, dict(zip(names, weights, strict=True)), (x, None, None, None, 0))

    assert torch.autograd.gradcheck(function, (x, *weights))


@pytest.mark.parametrize("form", ["llama", "olmo2", "gpt2"])
def test_norms_stand_before_or_behind_their_part(seed: int, form: str) -> None:
    model = decoder_of(section_of(form, positions="none", initial_deviation=0.3), seed).double()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed)).double()
    block = model.blocks[0]
    assert isinstance(block, Block)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return block.attention(x, None, None, None, 0)

    if form == "olmo2":
        middle = x + block.attention_norm(attend(x))
        expected = middle + block.feed_forward_norm(block.feed_forward(middle))
    else:
        middle = x + attend(block.attention_norm(x))
        expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    torch.testing.assert_close(block(x, None), expected)


# Compiled layer by layer -------------------------------------------------------------------------------


class Counting:
    """A backend that needs no compiler (aot_eager makes the gradients' graph, eager not even that) and counts what it was given."""

    def __init__(self, name: str = "aot_eager") -> None:
        self.name = name
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.num_graphs += 1
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


def compiled(model: Decoder, backend: Counting) -> Decoder:
    """As training compiles it (engine/speed.py); `fullgraph` refuses every break."""
    torch.compiler.reset()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize("form", ["qwen3", "gpt2", "olmo2", "mistral", "capped"])
def test_blocks_compiled_one_by_one_are_one_graph_and_equal_eager(seed: int, form: str) -> None:
    """No break in a layer, one graph for all layers, and none for other documents or a prefix."""
    section, backend = section_of(form, num_layers=3, initial_deviation=0.1), Counting()
    eager, model = decoder_of(section, seed), compiled(decoder_of(section, seed), backend)
    for draw in range(3):
        documents = draw_documents(seed + draw, 2, 20)
        tokens, given = draw_tokens(section, seed + draw, 2, 20), {"documents_BT": documents, "positions_BT": positions_inside(documents)}
        if draw == 2:
            given["prefix_BT"] = positions_inside(documents) < 3
        losses = [one(tokens, tokens, **given) for one in (model, eager)]
        torch.testing.assert_close(*losses)
        found, expected = (torch.autograd.grad(loss, list(one.parameters())) for loss, one in zip(losses, (model, eager), strict=True))
        for (name, _), one, other in zip(eager.named_parameters(), found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())), msg=name)
        assert backend.num_graphs == 1


def test_each_length_and_evaluation_cost_one_graph_for_all_layers(seed: int) -> None:
    section, backend = section_of("llama", num_layers=3), Counting()
    eager, model = decoder_of(section, seed), compiled(decoder_of(section, seed), backend)
    for _again in range(2):
        for num_tokens in (20, 10):
            tokens = draw_tokens(section, seed, 2, num_tokens)
            torch.testing.assert_close(model(tokens, tokens), eager(tokens, tokens))
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(tokens), eager.eval()(tokens))
            model.train()
            eager.train()
    assert backend.num_graphs == 4


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_masks_of_blocks_cost_no_graph_of_their_own(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each step makes a new one, with a function of its own: neither the mask nor the layers are compiled again for it.

    Without gradients, which FlexAttention has none of on the CPU, and with a backend that needs no compiler.
    """
    section, masks, layers = (
        section_of("capped", num_layers=3, sliding_window=9, initial_deviation=0.1),
        Counting("eager"),
        Counting("eager"),
    )
    eager, model = decoder_of(section, seed), compiled(decoder_of(section, seed), layers)
    make = torch.compile(attention.create_block_mask, dynamic=False, backend=masks)
    compile_others = attention._compiled
    monkeypatch.setattr(
        attention, "_compiled", lambda function: make if function is attention.create_block_mask else compile_others(function)
    )
    for draw in range(3):
        documents = draw_documents(seed + draw, 2, 20)
        tokens, given = draw_tokens(section, seed + draw, 2, 20), {"documents_BT": documents, "prefix_BT": positions_inside(documents) < 3}
        with torch.no_grad():
            expected = eager(tokens, tokens, **given)
            with monkeypatch.context() as on_gpu:
                on_gpu.setattr(decoder, "takes_blocks", lambda *_of_what: True)
                torch.testing.assert_close(model(tokens, tokens, **given), expected)
        assert (masks.num_graphs, layers.num_graphs) == (1, 1)


# Parts -------------------------------------------------------------------------------------------------


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

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return causal_attention(query, key, value, **how)

    model = Decoder(section_of(), attend)
    initialize_weights(model, model.section, seed)
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
