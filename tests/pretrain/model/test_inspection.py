"""What is found by calling a model: its modules as its table has them, and probabilities and weights as it computes them."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from configs.model_section import ModelSection
from configs.objective_section import ObjectiveSection
from pretrain.model.attention import Sight, causal_attention, make_visible
from pretrain.model.decoder import Block, Decoder
from pretrain.model.inspection import AttentionRecorder, attention_weights, list_modules, predict
from pretrain.model.operations import tabulate_model
from pretrain.model.weights import initialize_weights
from tests.pretrain.model.forms import FORMS, decoder_of, draw_tokens, section_of

B, T = 2, 16

# --- models of one's own ------------------------------------------------------------------------------------


class OwnBlock(Block):
    """Ours, under another name: the numbers must be the same."""


class Counting(nn.Module):
    """Asks for values, which a model without values has not."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.table = nn.Embedding(section.vocabulary_size, section.width)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.table(tokens_BT[: int(tokens_BT.sum())])


@pytest.mark.parametrize("form", FORMS)
def test_the_modules_of_an_own_block_are_listed(form: str) -> None:
    section = section_of(form, num_layers=3)
    table = tabulate_model(section, B, T, 4)
    found = list_modules(section.model_copy(update={"block": f"{__name__}:OwnBlock"}), ObjectiveSection(), B, T)
    assert found.problem is None
    assert found.parameters == table.parameters == sum(row.parameters * row.times for row in found.rows)
    assert found.forward_flops == 2 * B * T * table.matrix_parameters + 4 * B * T * T * section.num_heads * section.features_per_head * 3
    (query,) = [row for row in found.rows if row.name == "blocks.N.attention.query"]
    width = section.num_heads * section.features_per_head
    assert (query.kind, query.takes, query.gives, query.times) == ("Linear", ((B, T, 32),), ((B, T, width),), 3)
    assert query.parameters == 32 * width + (width if section.biases else 0)


def test_a_model_that_needs_values_is_listed_without_shapes() -> None:
    section = section_of().model_copy(update={"implementation": f"{__name__}:Counting"})
    found = list_modules(section, ObjectiveSection(), B, T)
    assert (found.parameters, found.forward_flops) == (97 * 32, None)
    assert found.problem is not None
    assert [(row.name, row.kind, row.parameters) for row in found.rows] == [("table", "Embedding", 97 * 32)]
    with pytest.raises(ValueError, match="list_modules"):
        tabulate_model(section, B, T, 4)


# --- what a model does with tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_recorded_weights_give_what_the_model_gives(form: str, seed: int) -> None:
    """While it records, the model says the same; every map is a share of what is seen; else it is the fused function itself."""
    section = section_of(form)
    recorder = AttentionRecorder([0, 1], range(section.num_heads))
    model = Decoder(section, recorder)
    initialize_weights(model, section, seed)
    tokens = draw_tokens(section, seed, T).tolist()
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda _module, _given, result: outputs.append(result))
    maps = recorder.record(model, tokens)
    with torch.no_grad():
        model(torch.tensor([tokens]))
        plain = decoder_of(section, seed).eval()(torch.tensor([tokens]))
    torch.testing.assert_close(outputs[0], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1], plain, rtol=0, atol=0)
    assert set(maps) == {(layer, head) for layer in range(2) for head in range(section.num_heads)}
    assert recorder.num_calls == section.num_layers
    back_TT = torch.arange(T)[:, None] - torch.arange(T)
    hidden_TT = (back_TT < 0) | (back_TT >= (section.sliding_window or T))
    for weights_TT in maps.values():
        torch.testing.assert_close(weights_TT.sum(1), torch.ones(T))
        assert (weights_TT[hidden_TT] == 0).all()
        assert (weights_TT[~hidden_TT] > 0).all()


def test_only_the_chosen_maps_are_kept_and_a_beginning_has_the_same(seed: int) -> None:
    section = section_of("grouped", num_layers=3)
    recorder = AttentionRecorder([2], [1, 3])
    model = Decoder(section, recorder)
    initialize_weights(model, section, seed)
    tokens = draw_tokens(section, seed, T).tolist()
    whole, beginning = recorder.record(model, tokens), recorder.record(model, tokens[:7])
    assert list(whole) == list(beginning) == [(2, 1), (2, 3)]
    for place in whole:
        torch.testing.assert_close(whole[place][:7, :7], beginning[place])


@pytest.mark.parametrize("softcap", [None, 0.6])
def test_weights_agree_with_causal_attention(softcap: float | None, seed: int) -> None:
    """For grouped heads, more keys than queries, masks, and FlexAttention's mask of blocks."""
    generator = torch.Generator().manual_seed(seed)
    query_BTNH = torch.randn(B, 5, 4, 8, generator=generator)
    key_BSKH, value_BSKH = (torch.randn(B, 9, 2, 8, generator=generator) for _ in range(2))
    sight = Sight(documents_BS=torch.tensor([[0] * 4 + [1] * 5, [0] * 9]), window=3)
    mask = make_visible(sight, B, 5, 9, query_BTNH.device, by_blocks=False)
    for visible in (None, mask):
        weights_BNTS = attention_weights(query_BTNH, key_BSKH, visible=visible, softcap=softcap)
        attended = (weights_BNTS @ value_BSKH.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2)
        wanted = causal_attention(query_BTNH, key_BSKH, value_BSKH, visible=visible, softcap=softcap)
        torch.testing.assert_close(attended, wanted, rtol=1e-4, atol=1e-5)
    blocks = create_block_mask(lambda row, _head, query, key: sight.sees(row, query + 4, key), B, None, 5, 9, device="cpu")
    assert torch.equal(
        attention_weights(query_BTNH, key_BSKH, visible=blocks, softcap=softcap),
        attention_weights(query_BTNH, key_BSKH, visible=mask, softcap=softcap),
    )


@pytest.mark.parametrize("form", ["llama", "capped", "gpt2"])
def test_predictions_are_the_models_probabilities(form: str, seed: int) -> None:
    section = section_of(form)
    model = decoder_of(section, seed)
    tokens = draw_tokens(section, seed, T).tolist()
    found = predict(model, tokens, top=4, num_tokens=90)
    with torch.no_grad():
        logits_TV = model.eval()(torch.tensor([tokens]))[0]
        loss = model(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    assert sum(one.loss for one in found if one.loss is not None) == pytest.approx(loss.item(), rel=1e-5)
    assert [one.token for one in found] == tokens
    assert [one.next_token for one in found] == [*tokens[1:], None]
    assert (found[-1].rank, found[-1].loss, found[-1].probability) == (None, None, None)
    for one, logits_V in zip(found, logits_TV.double(), strict=True):
        probabilities_V = logits_V.softmax(0)
        assert [token for token, _ in one.likeliest] == logits_V[:90].argsort(descending=True)[:4].tolist()
        for token, share in one.likeliest:
            assert share == pytest.approx(float(probabilities_V[token]))
        assert one.entropy == pytest.approx(float(-(probabilities_V * probabilities_V.log()).sum()))
        if one.next_token is not None and one.loss is not None:
            assert one.probability == pytest.approx(float(probabilities_V[one.next_token])) == pytest.approx(math.exp(-one.loss))
            assert one.rank == 1 + int((logits_V > logits_V[one.next_token]).sum())
