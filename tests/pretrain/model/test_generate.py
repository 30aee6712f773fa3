"""Generation: the cache changes nothing, choices are what they say, and it knows when to stop."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from configs.schema import ModelSection
from pretrain.model.decoder import Decoder, initialize_weights
from pretrain.model.generate import choose_token, generate

FORMS: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2, "qk_norm": True},
    "gpt2": {"norm": "layernorm", "feed_forward": "gelu", "positions": "learned", "biases": True, "tied_head": True, "dropout": 0.5},
    "sinusoidal": {"positions": "sinusoidal"},
}
PROMPT = [3, 14, 15, 92, 65]


def decoder_of(form: str, seed: int) -> Decoder:
    shape = {"vocabulary_size": 97, "num_layers": 2, "width": 32, "num_heads": 4, "feed_forward_width": 48, "largest_context": 32}
    model = Decoder(ModelSection(**shape, initial_deviation=0.2, **FORMS[form]))
    initialize_weights(model, seed)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_the_same_without_a_cache(seed: int, form: str) -> None:
    model = decoder_of(form, seed)
    found = list(generate(model, PROMPT, max_new_tokens=20, temperature=0))
    tokens = list(PROMPT)
    model.eval()
    for _ in range(20):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[len(PROMPT) :]


def test_a_seed_gives_the_same_tokens_again(seed: int) -> None:
    model = decoder_of("llama", seed)

    def sample(number: int) -> list[int]:
        return list(generate(model, torch.tensor(PROMPT), max_new_tokens=20, generator=torch.Generator().manual_seed(number)))

    assert sample(seed) == sample(seed)
    assert sample(seed) != sample(seed + 1)


def test_stops_at_end_of_text_without_yielding_it(seed: int) -> None:
    model = decoder_of("llama", seed)
    free = list(generate(model, PROMPT, max_new_tokens=20, temperature=0))
    end_of_text = free[7]
    assert list(generate(model, PROMPT, max_new_tokens=20, temperature=0, end_of_text=end_of_text)) == free[: free.index(end_of_text)]


def test_stops_when_the_context_is_full(seed: int) -> None:
    model = decoder_of("gpt2", seed)
    # 32 positions are read; the token after the last of them can still be told.
    assert len(list(generate(model, PROMPT, max_new_tokens=1000, temperature=0))) == 32 - len(PROMPT) + 1
    assert len(list(generate(model, [1] * 32, max_new_tokens=1000, temperature=0))) == 1
    assert list(generate(model, PROMPT, max_new_tokens=0)) == []


def test_leaves_the_model_as_it_was(seed: int) -> None:
    model = decoder_of("gpt2", seed)
    for training in (True, False):
        model.train(training)
        tokens = generate(model, PROMPT, max_new_tokens=3)
        next(tokens)
        assert model.training == training
        model(torch.tensor([PROMPT]), torch.tensor([PROMPT])).backward()
        assert len(list(tokens)) == 2


def test_spare_rows_of_the_table_are_never_chosen(seed: int) -> None:
    model = decoder_of("llama", seed)
    assert max(generate(model, PROMPT, max_new_tokens=27, temperature=50.0, num_tokens=10)) < 10


def frequencies(seed: int, probabilities: list[float], **choice: Any) -> dict[int, float]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(probabilities).log()
    counts = Counter(choose_token(logits, generator=generator, **choice) for _ in range(2000))
    return {token: count / 2000 for token, count in counts.items()}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 100}, {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_p": 0.74}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.76}, {1: 0.5 / 0.9, 3: 0.25 / 0.9, 2: 0.15 / 0.9}),
        ({"top_p": 1.0}, {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_p": 1e-9}, {1: 1.0}),
        ({"top_k": 3, "top_p": 0.8}, {1: 2 / 3, 3: 1 / 3}),
        ({"temperature": 0.5}, {0: 0.01 / 0.345, 1: 0.25 / 0.345, 2: 0.0225 / 0.345, 3: 0.0625 / 0.345}),
        ({"temperature": 1e-6}, {1: 1.0}),
        ({"temperature": 0}, {1: 1.0}),
    ],
)
def test_choices_have_the_frequencies_they_promise(seed: int, choice: dict[str, Any], expected: dict[int, float]) -> None:
    found = frequencies(seed, [0.1, 0.5, 0.15, 0.25], **choice)
    assert set(found) == set(expected)
    for token, share in expected.items():
        # Six standard deviations: about one false alarm in ten million.
        assert abs(found[token] - share) <= 6 * math.sqrt(share * (1 - share) / 2000) + 1e-9, found


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose_token(torch.tensor([0.0, 1.0, 1.0]), temperature=0) == 1
    assert choose_token(torch.tensor([0.0, 1.0, 1.0]), top_k=1) == 1


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "prompt has 0 tokens"),
        ([1] * 33, {}, "prompt has 33 tokens; wanted 1 to 32"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (PROMPT, {"temperature": -0.1}, "temperature is -0.1"),
        (PROMPT, {"temperature": math.nan}, "temperature is nan"),
        (PROMPT, {"top_k": 0}, "top_k is 0"),
        (PROMPT, {"top_p": 0.0}, "top_p is 0.0"),
        (PROMPT, {"top_p": 1.5}, "top_p is 1.5"),
        (PROMPT, {"num_tokens": 98}, "num_tokens is 98"),
    ],
)
def test_what_cannot_be_is_refused_at_once(seed: int, prompt: list[int], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(decoder_of("llama", seed), prompt, **({"max_new_tokens": 5} | arguments))
