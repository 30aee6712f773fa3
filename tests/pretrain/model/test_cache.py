"""Generation's cache: read in whatever portions, padded or with a prefix, a text has the logits it has without."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pretrain.model.attention import KeyValueCache, LayerCache
from pretrain.model.decoder import Decoder
from tests.pretrain.model.forms import FORMS, decoder_of, draw_tokens, section_of

LENGTH = 24
PORTIONS = [[LENGTH], [1] * LENGTH, [LENGTH - 1, 1], [1, LENGTH - 1], [7, 1, 1, 8, 5, 2]]
# Every form, and what a cache might stumble on: windows of one place, of a portion, of all; positions that are stretched.
CASES: dict[str, tuple[str, dict[str, Any]]] = {form: (form, {}) for form in FORMS} | {
    "window of 1": ("mistral", {"sliding_window": 1}),
    "window of a portion": ("mistral", {"sliding_window": 8, "positions": "learned"}),
    "window of all": ("mistral", {"sliding_window": LENGTH}),
    "capped window": ("capped", {"sliding_window": 3, "qk_norm": "full", "num_kv_heads": 1}),
    "stretched": ("llama", {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_context": 16}}),
}


def case(name: str, seed: int) -> Decoder:
    form, changes = CASES[name]
    return decoder_of(section_of(form, initial_deviation=0.1, **changes), seed).eval()


def in_portions(model: Decoder, tokens: torch.Tensor, portions: Sequence[int], padding: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all places, read portion by portion into a cache that is just large enough."""
    cache = KeyValueCache(model.section.num_layers, tokens.shape[1], padding)
    ends = list(itertools.accumulate(portions))
    parts = [model(tokens[:, end - length : end], cache=cache) for length, end in zip(portions, ends, strict=True)]
    assert cache.length == tokens.shape[1] == ends[-1]
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_portions_do_not_matter(seed: int, name: str) -> None:
    model = case(name, seed)
    tokens = draw_tokens(model.section, seed, 2, LENGTH)
    whole = model(tokens)
    for portions in PORTIONS:
        torch.testing.assert_close(in_portions(model, tokens, portions), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens, last_only=True), whole[:, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_padded_row_is_as_it_is_alone(seed: int, name: str) -> None:
    """Rows of several lengths, ending together; one has no padding, one is nothing but padding for a portion or two."""
    model = case(name, seed)
    padding = torch.tensor([0, 3, LENGTH - 1, 10])
    tokens = draw_tokens(model.section, seed, 4, LENGTH)
    for portions in PORTIONS:
        logits = in_portions(model, tokens, portions, padding)
        assert logits.isfinite().all()
        for row, start in enumerate(padding.tolist()):
            alone = model(tokens[row, None, start:])[0]
            torch.testing.assert_close(logits[row, start:], alone, rtol=1e-5, atol=1e-5)
    # What stands in the padding is seen by nobody.
    other = tokens.where(torch.arange(LENGTH) >= padding[:, None], (tokens + 1) % model.section.vocabulary_size)
    for portions in PORTIONS[:2]:
        one, two = (in_portions(model, given, portions, padding) for given in (tokens, other))
        for row, start in enumerate(padding.tolist()):
            assert torch.equal(one[row, start:], two[row, start:])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_prefix_is_read_first_and_its_continuation_token_by_token(seed: int, name: str, padded: bool) -> None:
    model = case(name, seed)
    tokens = draw_tokens(model.section, seed, 2, LENGTH)
    padding = torch.tensor([0, 4]) if padded else None
    prefix = (torch.arange(LENGTH) < 9).expand(2, -1)
    starts = [0, 0] if padding is None else padding.tolist()
    whole = [model(tokens[row, None, start:], prefix_BT=prefix[row, None, start:])[0] for row, start in enumerate(starts)]
    for portions in ([9] + [1] * (LENGTH - 9), [11, LENGTH - 11], [9, 3, 5, 7]):
        cache = KeyValueCache(model.section.num_layers, LENGTH, padding)
        first, *others = portions
        parts = [model(tokens[:, :first], prefix_BT=prefix[:, :first], cache=cache)]
        for length in others:
            parts.append(model(tokens[:, cache.length : cache.length + length], cache=cache))
        logits = torch.cat(parts, dim=1)
        for row, start in enumerate(starts):
            torch.testing.assert_close(logits[row, start:], whole[row], rtol=1e-5, atol=1e-5)
    if name != "window of 1":  # which sees nothing of a prefix from behind it; inside it everything is seen
        assert (model(tokens)[0, 9:] - whole[0][9:]).abs().max() > 1e-5
    assert (model(tokens)[0, :8] - whole[0][:8]).abs().amax(dim=1).min() > 1e-5


def test_what_a_cache_cannot_hold_is_refused(seed: int) -> None:
    model = decoder_of(section_of(), seed)
    tokens = draw_tokens(model.section, seed, 2, 5)
    cache = KeyValueCache(model.section.num_layers, 9)
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="holds 9 positions, 10 are needed"):
            model(tokens, cache=cache)
        assert cache.length == 5
        with pytest.raises(
            ValueError, match="the cache holds 5 positions already, which a prefix behind them would have to see; give it first"
        ):
            model(tokens[:, :1], prefix_BT=torch.ones(2, 1, dtype=torch.bool), cache=cache)
        # A prefix that fits, given too early or too late, leaves the cache as it was.
        model(tokens[:, :4], cache=cache)
        assert cache.length == 9
        with pytest.raises(ValueError, match="prefix have the shape"):
            model(tokens, prefix_BT=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="reaches 65 tokens, model.largest_context is 64"):
            full = KeyValueCache(model.section.num_layers, 70)
            model(draw_tokens(model.section, seed, 1, 64), cache=full)
            model(tokens[:1, :1], cache=full)


def test_a_layer_returns_what_was_put_in(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 7, 2, 8, generator=generator), torch.randn(2, 7, 2, 8, generator=generator)
    cache = LayerCache(7)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        keys, values = cache.extend(start, key[:, start:end], value[:, start:end])
        assert torch.equal(keys, key[:, :end])
        assert torch.equal(values, value[:, :end])
    with pytest.raises(ValueError, match="holds 7 positions, 8 are needed"):
        cache.extend(7, key[:, :1], value[:, :1])
