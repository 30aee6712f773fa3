"""Documents in one row: none sees another, and each comes out as it would alone, with a prefix or without."""

from typing import Any

import pytest
import torch

from pretrain.model import decoder
from pretrain.model.attention import KeyValueCache, Sight, Visible, causal_attention, make_visible
from pretrain.model.decoder import Decoder
from pretrain.model.loss import IGNORE
from pretrain.model.weights import initialize_weights
from tests.pretrain.model.forms import FORMS, decoder_of, draw_documents, draw_tokens, positions_inside, section_of

LENGTH = 40


def packed(documents_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"documents_BT": documents_BT, "positions_BT": positions_inside(documents_BT)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_no_token_moves_a_bit_of_another_document(seed: int, form: str, dtype: torch.dtype) -> None:
    section = section_of(form, initial_deviation=0.2, dropout=0.1)
    model = decoder_of(section, seed).to(dtype)
    tokens, documents = draw_tokens(section, seed, 2, LENGTH), draw_documents(seed, 2, LENGTH)

    def logits_of(tokens: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(seed)  # the same dropout, if any
        return model(tokens, **given)

    with torch.no_grad():
        for training in (False, True):
            model.train(training)
            for given in (packed(documents), {"documents_BT": documents}, {"documents_BT": documents.int() * 7 - 3}):
                before = logits_of(tokens, given)
                for number in documents.unique():
                    inside = documents == number
                    after = logits_of(((tokens + 1) % section.vocabulary_size).where(inside, tokens), given)
                    assert torch.equal(before[~inside], after[~inside])
                    assert (before[inside] != after[inside]).any(dim=-1).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_document_in_a_pack_is_as_it_is_alone(seed: int, form: str) -> None:
    """Logits, the summed loss and its gradients; documents of a single place are among them."""
    section = section_of(form, initial_deviation=0.1)
    model = decoder_of(section, seed)
    documents = draw_documents(seed, 2, LENGTH)
    tokens, labels = draw_tokens(section, seed, 2, LENGTH), draw_tokens(section, seed + 1, 2, LENGTH)
    logits, loss = model(tokens, **packed(documents)), model(tokens, labels, **packed(documents))
    loss_alone = torch.zeros(())
    for row in range(2):
        for number in documents[row].unique():
            inside = documents[row] == number
            tokens_1T, labels_1T = tokens[row, None, inside], labels[row, None, inside]
            torch.testing.assert_close(logits[row, inside], model(tokens_1T)[0], rtol=1e-5, atol=1e-5)
            loss_alone = loss_alone + model(tokens_1T, labels_1T)
    torch.testing.assert_close(loss, loss_alone, rtol=1e-6, atol=0.0)
    found, expected = (torch.autograd.grad(one, list(model.parameters())) for one in (loss, loss_alone))
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())), msg=name)


# Prefixes ----------------------------------------------------------------------------------------------


def draw_prefix(documents_BT: torch.Tensor) -> torch.Tensor:
    """The first half of each document; of one of a single place, that place, or of every third document nothing."""
    places_BT = positions_inside(documents_BT)
    lengths_BT = (documents_BT[:, :, None] == documents_BT[:, None]).sum(-1)
    return (2 * places_BT < lengths_BT) & (documents_BT % 3 != 2)


def with_prefix(documents_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**packed(documents_BT), "prefix_BT": draw_prefix(documents_BT)}


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_sees_all_of_itself_and_nothing_of_what_follows(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.2)
    model = decoder_of(section, seed)
    tokens, prefix = draw_tokens(section, seed, 2, LENGTH), (torch.arange(LENGTH) < 13).expand(2, -1)
    reach = section.sliding_window * section.num_layers if section.sliding_window else LENGTH
    with torch.no_grad():
        before = model(tokens, prefix_BT=prefix)
        for place in (0, 7, 12, 13, 20, LENGTH - 1):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % section.vocabulary_size
            moved_T = (model(changed, prefix_BT=prefix) != before).any(dim=2).all(dim=0)
            if place < 13:
                assert moved_T[:13].all(), "each place of the prefix, earlier ones too"
                assert moved_T[13 : place + 5].all()
            else:
                assert not moved_T[:place].any(), "neither the prefix nor what is earlier in the continuation"
                assert moved_T[place : place + 2].all()
            assert reach >= LENGTH - 13 or not moved_T[max(place, 12) + reach :].any(), "beyond the windows of all layers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_no_prefix_moves_a_bit_of_another_document(seed: int, form: str, dtype: torch.dtype) -> None:
    section = section_of(form, initial_deviation=0.2)
    model = decoder_of(section, seed).to(dtype).eval()
    tokens, documents = draw_tokens(section, seed, 2, LENGTH), draw_documents(seed, 2, LENGTH)
    everywhere = {**packed(documents), "prefix_BT": torch.ones_like(documents, dtype=torch.bool)}
    with torch.no_grad():
        for given in (with_prefix(documents), everywhere):
            before = model(tokens, **given)
            for number in documents.unique():
                inside = documents == number
                after = model(((tokens + 1) % section.vocabulary_size).where(inside, tokens), **given)
                assert torch.equal(before[~inside], after[~inside])
                assert (before[inside] != after[inside]).any(dim=-1).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_document_with_a_prefix_is_in_a_pack_as_it_is_alone(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.1)
    model = decoder_of(section, seed)
    documents = draw_documents(seed, 2, LENGTH)
    prefix = draw_prefix(documents)
    tokens, labels = draw_tokens(section, seed, 2, LENGTH), draw_tokens(section, seed + 1, 2, LENGTH).masked_fill(prefix, IGNORE)
    logits, loss = model(tokens, **with_prefix(documents)), model(tokens, labels, **with_prefix(documents))
    loss_alone = torch.zeros(())
    for row in range(2):
        for number in documents[row].unique():
            inside = documents[row] == number
            tokens_1T, labels_1T, prefix_1T = (given[row, None, inside] for given in (tokens, labels, prefix))
            torch.testing.assert_close(logits[row, inside], model(tokens_1T, prefix_BT=prefix_1T)[0], rtol=1e-5, atol=1e-5)
            loss_alone = loss_alone + model(tokens_1T, labels_1T, prefix_BT=prefix_1T)
    torch.testing.assert_close(loss, loss_alone, rtol=1e-6, atol=0.0)
    found, expected = (torch.autograd.grad(one, list(model.parameters())) for one in (loss, loss_alone))
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())), msg=name)


@pytest.mark.parametrize("form", ["llama", "gpt2", "capped", "mistral"])
def test_a_prefix_of_nothing_or_of_one_place_is_none(seed: int, form: str) -> None:
    model = decoder_of(section_of(form, initial_deviation=0.1), seed)
    tokens = draw_tokens(model.section, seed, 2, LENGTH)
    for length in (0, 1):
        prefix = (torch.arange(LENGTH) < length).expand(2, -1)
        torch.testing.assert_close(model(tokens, prefix_BT=prefix), model(tokens), rtol=1e-6, atol=1e-6)


# Parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_one_document_counted_along_the_row_is_the_row(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.1)
    model = decoder_of(section, seed)
    tokens = draw_tokens(section, seed, 2, LENGTH)
    documents, positions = torch.full_like(tokens, 3), torch.arange(LENGTH).expand(2, -1)
    whole = model(tokens)
    torch.testing.assert_close(model(tokens, documents_BT=documents, positions_BT=positions), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(tokens, documents_BT=documents), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(tokens, positions_BT=positions.int()), whole)


@pytest.mark.parametrize("form", ["llama", "gpt2", "sinusoidal"])
def test_documents_and_positions_are_independent(seed: int, form: str) -> None:
    """A place that starts again without a mask still sees what came before; rope alone does not notice where a document begins."""
    section = section_of(form, initial_deviation=0.2)
    model = decoder_of(section, seed)
    tokens, documents = draw_tokens(section, seed, 2, LENGTH), draw_documents(seed, 2, LENGTH)
    positions, later = positions_inside(documents), documents > 0
    with torch.no_grad():
        neither, both = model(tokens)[later], model(tokens, documents_BT=documents, positions_BT=positions)[later]
        masked, restarted = model(tokens, documents_BT=documents)[later], model(tokens, positions_BT=positions)[later]
    for one, other in ((neither, both), (neither, masked), (neither, restarted), (restarted, both)):
        assert (one - other).abs().max() > 1e-3
    assert torch.allclose(masked, both, atol=1e-4) == (form == "llama")


@pytest.mark.parametrize("form", ["grouped", "gpt2", "sinusoidal"])
def test_it_trains_in_bf16(seed: int, form: str) -> None:
    section = section_of(form, initial_deviation=0.1)
    model = decoder_of(section, seed)
    tokens, documents = draw_tokens(section, seed, 2, LENGTH), draw_documents(seed, 2, LENGTH)
    exact = model(tokens, tokens, **packed(documents)).item()
    loss = model.bfloat16()(tokens, tokens, **packed(documents))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_mask_is_made_once_for_all_layers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    made: list[Visible | None] = []
    seen: list[Visible | None] = []

    def make(sight: Sight, *places: Any, by_blocks: bool) -> Visible | None:
        made.append(make_visible(sight, *places, by_blocks=by_blocks))
        return made[-1]

    def takes(_device: torch.device, head_width: int, dropout: float) -> bool:
        asked.append((head_width, dropout))
        return False

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append(how["visible"])
        return causal_attention(query, key, value, **how)

    monkeypatch.setattr(decoder, "make_visible", make)
    monkeypatch.setattr(decoder, "takes_blocks", takes)
    model = Decoder(section_of(num_layers=3, dropout=0.1), attend)
    initialize_weights(model, model.section, seed)
    tokens, documents = draw_tokens(model.section, seed, 2, LENGTH), draw_documents(seed, 2, LENGTH)
    model(tokens)
    assert (made, seen) == ([None], [None] * 3)
    model(tokens, documents_BT=documents)
    assert len(made) == 2
    assert all(visible is made[1] for visible in seen[3:])
    model.eval()(tokens, documents_BT=documents)
    assert asked == [(8, 0.1), (8, 0.1), (8, 0.0)]  # features per head, and dropout only in training: it decides the form


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_it_can_be_compiled_in_one_piece(seed: int) -> None:
    """Nothing in it branches on what a tensor holds; other documents need no other graph."""
    torch.compiler.reset()
    model = decoder_of(section_of("grouped"), seed)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for draw in range(3):
        tokens, documents = draw_tokens(model.section, seed + draw, 2, LENGTH), draw_documents(seed + draw, 2, LENGTH)
        assert torch.equal(compiled(tokens, tokens, **packed(documents)), model(tokens, tokens, **packed(documents)))
    assert len(graphs) == 1


def test_what_does_not_fit_is_refused(seed: int) -> None:
    model = decoder_of(section_of(), seed)
    tokens, other = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    for name in ("documents", "positions", "prefix"):
        for wrong in (other, other[0, :4], other[:1, :4]):
            with pytest.raises(ValueError, match=rf"{name} have the shape .*; they must be equal"):
                model(tokens, **{f"{name}_BT": wrong})
        if name == "prefix":
            continue  # an empty cache takes one; see test_cache.py
        with pytest.raises(ValueError, match="with it documents_BT and positions_BT must be None"):
            model(tokens, cache=KeyValueCache(2, 8), **{f"{name}_BT": tokens})
    with pytest.raises(ValueError, match="reaches 65 tokens"):
        model(torch.zeros(1, 65, dtype=torch.long), positions_BT=torch.zeros(1, 65, dtype=torch.long))
    for form in ("llama", "gpt2", "sinusoidal"):
        for position in (-1, 64):
            with pytest.raises(IndexError):
                decoder_of(section_of(form), seed)(tokens, positions_BT=torch.full_like(tokens, position))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [40, 200, 384])  # a part of one block, blocks of which the last is not full, full blocks
@pytest.mark.parametrize("form", ["llama", "grouped", "gpt2", "sinusoidal", "mistral", "capped", "with prefix"])
def test_cuda_agrees_with_the_cpu(seed: int, form: str, num_tokens: int) -> None:
    """The mask of blocks against the boolean mask: logits, loss and gradients, and in bf16 the loss."""
    torch.compiler.reset()  # what is compiled anew for every shape is limited in number
    prefixed = form == "with prefix"
    section = section_of("olmo2" if prefixed else form, width=64, largest_context=512, initial_deviation=0.1)
    tokens, documents = draw_tokens(section, seed, 2, num_tokens), draw_documents(seed, 2, num_tokens)
    places = with_prefix(documents) if prefixed else packed(documents)

    def results_on(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        model = decoder_of(section, seed).to(device, dtype)
        tokens_BT, given = tokens.to(device), {name: tensor.to(device) for name, tensor in places.items()}
        loss = model(tokens_BT, tokens_BT, **given)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [tensor.detach().cpu() for tensor in (loss, model(tokens_BT, **given), *gradients)]

    on_cpu = results_on("cpu", torch.float32)
    for found, expected in zip(results_on("cuda", torch.float32), on_cpu, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))
    assert results_on("cuda", torch.bfloat16)[0].item() == pytest.approx(on_cpu[0].item(), rel=0.02)
