"""Tokens from a trained decoder, one at a time, with a cache of keys and values.

In: a model, the tokens of a prompt, how to choose. Out: an iterator over new tokens, which ends at the end
of text, after `max_new_tokens`, or when the model's context is full: it stops there and does not slide,
because what a model says about positions it has half forgotten is not what it was trained for.
"""

from collections.abc import Iterator, Sequence

import torch

from pretrain.model.attention import KeyValueCache
from pretrain.model.decoder import Decoder


def generate(
    model: Decoder,
    prompt_tokens_T: torch.Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    end_of_text: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_tokens: int | None = None,
) -> Iterator[int]:
    """Continue a prompt. Yields at most `max_new_tokens` tokens; `end_of_text` ends it and is not yielded.

    temperature: logits are divided by it; 0 takes the most likely token (the lowest of equals) and ignores
        the rest. top_k: only the k most likely tokens. top_p: of those, only the fewest whose probabilities
        reach p together (Holtzman et al. 2020), one at least.
    generator: a CPU generator; the draw is made on the CPU, so a seed means the same on every device.
    num_tokens: entries of the tokenizer, where the model's table has spare rows; those are never chosen.

    Dropout is off while a token is computed. Raises ValueError, at once, for a prompt that is empty or longer
    than `largest_context` and for values out of range.
    """
    prompt_1T = torch.as_tensor(prompt_tokens_T, dtype=torch.long, device=next(model.parameters()).device).reshape(1, -1)
    context = model.section.largest_context
    if not 1 <= prompt_1T.shape[1] <= context:
        raise ValueError(f"the prompt has {prompt_1T.shape[1]} tokens; wanted 1 to {context} (model.largest_context)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    _check_choice(temperature, top_k, top_p)
    if num_tokens is not None and not 1 <= num_tokens <= model.section.vocabulary_size:
        raise ValueError(f"num_tokens is {num_tokens}; wanted 1 to {model.section.vocabulary_size} (model.vocabulary_size)")

    def tokens() -> Iterator[int]:
        cache = KeyValueCache(model.section.num_layers, min(context, prompt_1T.shape[1] + max_new_tokens))
        unread_1T = prompt_1T
        for _ in range(max_new_tokens):
            if cache.length + unread_1T.shape[1] > context:
                return
            logits_V = _next_logits(model, unread_1T, cache)[:num_tokens]
            token = choose_token(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if token == end_of_text:
                return
            yield token
            unread_1T = torch.tensor([[token]], device=prompt_1T.device)

    return tokens()


def choose_token(
    logits_V: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One token from the logits of one position, as `generate` describes. Raises ValueError for values out of range."""
    _check_choice(temperature, top_k, top_p)
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    # Most likely first; the sort is stable, so that equal logits keep the order of their tokens.
    sorted_V, tokens_V = logits_V.sort(descending=True, stable=True)
    probabilities_V = (sorted_V[:top_k].double() / temperature).softmax(dim=-1)
    if top_p is not None:
        before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
        keep_V = before_V < top_p
        keep_V[0] = True
        probabilities_V = probabilities_V.where(keep_V, 0.0)
    return int(tokens_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def _check_choice(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (the most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, or None for no limit")


@torch.no_grad()
def _next_logits(model: Decoder, tokens_1T: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """Logits (V,) of what follows; the model is as it was before, also if its caller trains it between two tokens."""
    was_training = model.training
    model.eval()
    try:
        return model(tokens_1T, cache=cache, last_only=True)[0, -1]
    finally:
        model.train(was_training)
