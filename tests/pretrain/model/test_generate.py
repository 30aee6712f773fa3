"""Generation: the cache changes nothing, choices are what they say, and it knows when to stop."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pretrain.model.attention import KeyValueCache
from pretrain.model.decoder import Decoder
from pretrain.model.generate import choose_token, generate, generate_batch
from tests.pretrain.model.forms import FORMS, section_of
from tests.pretrain.model.forms import decoder_of as make_decoder

PROMPT = [3, 14, 15, 92, 65]


def decoder_of(form: str, seed: int) -> Decoder:
    # Weights that are far apart, so that no two logits are nearly equal; a cap would press those together again.
    deviation, dropout = 0.06 if form == "capped" else 0.2, 0.5 if form == "gpt2" else 0.0
    return make_decoder(section_of(form, initial_deviation=deviation, largest_context=32, dropout=dropout), seed)


def texts_of(model: Decoder, prompts: Sequence[Sequence[int]], **arguments: Any) -> list[list[int]]:
    """The new tokens of a batch of prompts; each one's end is told once, behind its last token."""
    written: list[list[int]] = [[] for _ in prompts]
    ended: list[int] = []
    for row, token in generate_batch(model, prompts, **arguments):
        assert row not in ended
        if token is None:
            ended.append(row)
        else:
            written[row].append(token)
    assert sorted(ended) == list(range(len(prompts)))
    return written


def draw_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


def slowly(model: Decoder, prompt: Sequence[int], num_new: int, num_prefix: int = 0) -> tuple[list[int], float]:
    """Greedy tokens without a cache or a batch, and the smallest distance between the two likeliest logits."""
    tokens, nearest = list(prompt), math.inf
    model.eval()
    for _ in range(num_new):
        prefix_BT = torch.zeros(1, len(tokens), dtype=torch.bool)
        prefix_BT[:, :num_prefix] = True
        with torch.no_grad():
            likeliest = model(torch.tensor([tokens]), prefix_BT=prefix_BT if num_prefix else None)[0, -1].topk(2)
        nearest = min(nearest, float(likeliest.values[0] - likeliest.values[1]))
        tokens.append(int(likeliest.indices[0]))
    return tokens[len(prompt) :], nearest


@pytest.mark.parametrize("prefixes", [False, True], ids=["causal", "prefixes"])
@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_those_without_a_cache_and_without_a_batch(seed: int, form: str, prefixes: bool) -> None:
    """Prompts of many lengths, side by side: each writes what it writes alone and slowly, to the end of its own context."""
    model = decoder_of(form, seed)
    lengths = [5, 1, 20, 31, 32, 5, 9]
    prompts = draw_prompts(seed, lengths)
    num_prefix = [length // 2 for length in lengths] if prefixes else [0] * len(lengths)
    found = texts_of(model, prompts, max_new_tokens=24, temperature=0, num_prefix=num_prefix)
    alone = [
        list(generate(model, prompt, max_new_tokens=24, temperature=0, num_prefix=number))
        for prompt, number in zip(prompts, num_prefix, strict=True)
    ]
    num_compared = 0
    for prompt, number, together, single in zip(prompts, num_prefix, found, alone, strict=True):
        expected, nearest = slowly(model, prompt, min(24, 33 - len(prompt)), number)
        assert len(together) == len(single) == len(expected)
        if nearest > 1e-5:  # else rounding decides, and what follows is another text
            assert together == expected
            assert single == expected
            num_compared += 1
    assert num_compared >= 5


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


def test_a_drawn_text_does_not_depend_on_what_is_beside_it(seed: int) -> None:
    """One generator for each prompt: its text is the same alone, in any batch, and in any order."""
    model = decoder_of("grouped", seed)
    prompts = draw_prompts(seed, [7, 3, 12, 1, 30, 3])

    def texts(numbers: Sequence[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        return texts_of(model, [prompts[number] for number in numbers], max_new_tokens=20, top_p=0.9, generators=generators)

    together = texts(range(6))
    assert texts([4, 2, 0, 5, 3, 1]) == [together[number] for number in (4, 2, 0, 5, 3, 1)]
    assert [texts([number])[0] for number in range(6)] == together


def test_each_text_of_a_batch_ends_where_it_ends_alone(seed: int) -> None:
    """At the end of text, at a stop of the caller's, at the limit: while the others go on."""
    model = decoder_of("llama", seed)
    prompts = draw_prompts(seed, [4, 9, 6, 2])
    free = texts_of(model, prompts, max_new_tokens=20, temperature=0)
    end_of_text = free[1][5]
    expected = [text[: text.index(end_of_text)] if end_of_text in text else text for text in free]
    assert texts_of(model, prompts, max_new_tokens=20, temperature=0, end_of_text=end_of_text) == expected
    stopped = texts_of(model, prompts, max_new_tokens=20, temperature=0, is_enough=lambda row, tokens: row == 2 and len(tokens) == 3)
    assert stopped == [free[0], free[1], free[2][:3], free[3]]
    assert texts_of(model, prompts, max_new_tokens=0) == [[], [], [], []]
    assert texts_of(model, [], max_new_tokens=5) == []


def test_a_batch_gets_smaller_as_texts_end(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended are left out when they are half of the batch, and padding that all have in common goes with them."""
    model = decoder_of("llama", seed)
    shapes: list[tuple[int, ...]] = []
    forward = model.forward

    def watched(tokens_BT: torch.Tensor, *, cache: KeyValueCache, **rest: Any) -> torch.Tensor:
        shapes.append((*tokens_BT.shape, cache.length))
        return forward(tokens_BT, cache=cache, **rest)

    monkeypatch.setattr(model, "forward", watched)
    limits = [2, 3, 4, 5]
    prompts = draw_prompts(seed, [8, 6, 4, 2])
    texts_of(model, prompts, max_new_tokens=9, temperature=0, is_enough=lambda row, tokens: len(tokens) == limits[row])
    assert shapes == [(4, 8, 0), (4, 1, 8), (4, 1, 9), (2, 1, 6), (1, 1, 5)]


def test_ranks_without_prompts_take_part_in_every_forward(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in turns, of which one has nothing to write or ends before the other: equally many forwards."""
    calls = [0, 0]

    def rank(number: int, prompts: list[list[int]], others: list[bool]) -> list[bool]:
        model = decoder_of("llama", seed)
        forward = model.forward

        def counted(*arguments: Any, **options: Any) -> torch.Tensor:
            calls[number] += 1
            return forward(*arguments, **options)

        monkeypatch.setattr(model, "forward", counted)
        asked: list[bool] = []

        def on_any_rank(holds: bool) -> bool:
            asked.append(holds)
            return holds or (len(asked) <= len(others) and others[len(asked) - 1])

        texts_of(model, prompts, max_new_tokens=6, temperature=0, on_any_rank=on_any_rank)
        return asked

    writes = rank(0, draw_prompts(seed, [3, 4]), [])
    assert writes == [True] * 6 + [False]
    assert rank(1, [], writes) == [False] * 7
    assert calls == [6, 6]


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


def test_rounding_that_swaps_near_equals_swaps_no_draw(seed: int) -> None:
    """A matrix product of another shape rounds otherwise; a draw must not follow from which of two near equals sorts first."""
    logits_V = torch.linspace(0, 1, 40).repeat_interleave(2)
    nudged_V = logits_V + 1e-6 * torch.tensor([-1.0, 1.0]).repeat(40)
    draws = [[choose_token(x_V, generator=torch.Generator().manual_seed(seed + n)) for n in range(300)] for x_V in (logits_V, nudged_V)]
    assert draws[0] == draws[1]
