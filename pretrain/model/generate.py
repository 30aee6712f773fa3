"""Tokens from a trained decoder, one at a time, with a cache of keys and values: for one prompt, or for many side by side.

In: a model, the tokens of prompts, how to choose. Out: an iterator over new tokens. A prompt's text ends at the end
of text, after `max_new_tokens`, or when the model's context is full: it stops there and does not slide,
because what a model says about positions it has half forgotten is not what it was trained for.

Shapes: B prompts that are being continued, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from configs.model_section import ModelSection
from pretrain.model.attention import KeyValueCache
from pretrain.model.decoder import Decoder

PADDING = 0
"""What stands before a prompt that is shorter than others of its batch; any token will do, as nobody sees it."""


def generate(
    model: Decoder,
    prompt_tokens_T: torch.Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    section: ModelSection | None = None,
    num_prefix: int = 0,
    end_of_text: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_tokens: int | None = None,
) -> Iterator[int]:
    """Continue one prompt: yields its new tokens. Arguments and errors are those of `generate_batch`."""
    tokens_and_ends = generate_batch(
        model,
        [torch.as_tensor(prompt_tokens_T).flatten().tolist()],
        max_new_tokens=max_new_tokens,
        section=section,
        num_prefix=[num_prefix],
        end_of_text=end_of_text,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generators=None if generator is None else [generator],
        num_tokens=num_tokens,
    )
    return (token for _, token in tokens_and_ends if token is not None)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    section: ModelSection | None = None,
    num_prefix: Sequence[int] | None = None,
    end_of_text: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    num_tokens: int | None = None,
    is_enough: Callable[[int, Sequence[int]], bool] = lambda prompt, tokens: False,
    on_any_rank: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, int | None]]:
    """Continue prompts side by side: yields (number of the prompt, new token), and (number, None) once, when its text has ended.

    A text does not depend on the prompts beside it, up to the rounding of matrix products of another shape.

    max_new_tokens: of each prompt at most so many are yielded; `end_of_text` ends a text and is not yielded.
    section: the model's; None: `model.section`.
    num_prefix: of each prompt, how many tokens at its beginning see each other in both directions; None: none.
    temperature: logits are divided by it; 0 takes the most likely token (the lowest of equals) and ignores
        the rest. top_k: only the k most likely tokens. top_p: of those, only the fewest whose probabilities
        reach p together (Holtzman et al. 2020), one at least.
    generators: a CPU generator for each prompt; the draw is made on the CPU, so a seed means the same on every device.
    num_tokens: entries of the tokenizer, where the model's table has spare rows; those are never chosen.
    is_enough: called with a prompt's number and its new tokens after each of them; True ends that text.
    on_any_rank: whether something holds on any rank. Where a forward is a collective (ZeRO-3), every rank calls this function at the
        same time, with prompts or without, and takes part in the others' forwards until all have ended.

    Dropout is off while a token is computed. Raises ValueError, at once, for a prompt that is empty or longer
    than `largest_context` and for values out of range.
    """
    section = section or model.section
    _check_prompts(prompts, max_new_tokens, section.largest_context)
    _check_choice(temperature, top_k, top_p)
    if num_tokens is not None and not 1 <= num_tokens <= section.vocabulary_size:
        raise ValueError(f"num_tokens is {num_tokens}; wanted 1 to {section.vocabulary_size} (model.vocabulary_size)")
    if max_new_tokens == 0:
        return ((row, None) for row in range(len(prompts)))

    def choose(row: int, logits_V: torch.Tensor) -> int:
        generator = None if generators is None else generators[row]
        return choose_token(logits_V[:num_tokens], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    # The token behind the last position can still be told.
    limits = [min(max_new_tokens, section.largest_context - len(prompt) + 1) for prompt in prompts]
    return _continue_batch(model, section, prompts, limits, num_prefix, choose, end_of_text, is_enough, on_any_rank)


def _continue_batch(
    model: Decoder,
    section: ModelSection,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    num_prefix: Sequence[int] | None,
    choose: Callable[[int, torch.Tensor], int],
    end_of_text: int | None,
    is_enough: Callable[[int, Sequence[int]], bool],
    on_any_rank: Callable[[bool], bool],
) -> Iterator[tuple[int, int | None]]:
    """What `generate_batch` yields. limits: of each prompt, how many tokens at most, 1 or more. choose: number of the prompt and
    logits_V -> its next token."""
    device, context = next(model.parameters()).device, section.largest_context
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    """The prompt of each row of the batch; a few of them may have ended."""
    unread_BT, padding_B = _pad_on_the_left(prompts, device)
    prefix_BT = None if num_prefix is None or not any(num_prefix) else _mark_prefixes(num_prefix, padding_B, unread_BT)
    cache = KeyValueCache(section.num_layers, min(context, unread_BT.shape[1] + max(limits, default=1) - 1), padding_B)
    ended: set[int] = set()
    while on_any_rank(bool(rows)):
        if not rows:
            _last_logits(model, torch.full((1, 1), PADDING, device=device), None, None)
            continue
        logits_BV = _last_logits(model, unread_BT, cache, prefix_BT).float().cpu()
        prefix_BT = None
        for logits_V, row in zip(logits_BV, rows, strict=True):
            if row in ended:
                continue
            token = choose(row, logits_V)
            written[row].append(token)
            if token != end_of_text:
                yield row, token
            if token == end_of_text or len(written[row]) == limits[row] or is_enough(row, written[row]):
                ended.add(row)
                yield row, None
        going_on = [place for place, row in enumerate(rows) if row not in ended]
        if cache.length == cache.num_positions or 2 * len(going_on) <= len(rows):
            rows = [rows[place] for place in going_on]
            cache = _narrow(cache, going_on, max((limits[row] - len(written[row]) for row in rows), default=0), context)
        unread_BT = torch.tensor([[written[row][-1]] for row in rows], device=device)


def choose_token(
    logits_V: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One token from the logits of one position, as `generate_batch` describes. Raises ValueError for values out of range."""
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
    # Drawn in the order of the tokens: two that rounding makes change places in the sorted order keep each its own luck.
    by_token_V = torch.zeros(len(tokens_V), dtype=torch.float64).scatter_(0, tokens_V[:top_k], probabilities_V)
    return int(torch.multinomial(by_token_V, 1, generator=generator))


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            raise ValueError(f"{which} has {len(prompt)} tokens; wanted 1 to {context} (model.largest_context)")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")


def _check_choice(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (the most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, or None for no limit")


def _pad_on_the_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts as rows (B, T) that end together, and how many places of each are no text; None where all are as long."""
    longest = max(map(len, prompts), default=1)
    rows = [[PADDING] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    padding = [longest - len(prompt) for prompt in prompts]
    tokens_BT = torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, longest)
    return tokens_BT, torch.tensor(padding, device=device) if any(padding) else None


def _mark_prefixes(num_prefix: Sequence[int], padding_B: torch.Tensor | None, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Whether each place belongs to its row's prefix, (B, T)."""
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begin_B1 = torch.zeros_like(tokens_BT[:, :1]) if padding_B is None else padding_B[:, None]
    return (places_T >= begin_B1) & (places_T < begin_B1 + torch.tensor(num_prefix, device=tokens_BT.device)[:, None])


def _narrow(cache: KeyValueCache, places: list[int], num_more: int, context: int) -> KeyValueCache:
    """The cache of some of its rows, without the padding that they have in common, with room for so many more positions."""
    padding_B = None if cache.padding_B is None else cache.padding_B[places]
    common = 0 if padding_B is None or not places else int(padding_B.min())
    length = cache.length - common
    if padding_B is not None:
        padding_B = padding_B - common if padding_B.gt(common).any() else None
    narrowed = KeyValueCache(len(cache.layers), min(context, length + num_more), padding_B)
    narrowed.length = length
    for new, old in zip(narrowed.layers, cache.layers, strict=True):
        if places and old.key_BPKH is not None and old.value_BPKH is not None:
            new.extend(0, *(kept_BPKH[places, common : cache.length] for kept_BPKH in (old.key_BPKH, old.value_BPKH)))
    return narrowed


@torch.no_grad()
def _last_logits(model: Decoder, tokens_BT: torch.Tensor, cache: KeyValueCache | None, prefix_BT: torch.Tensor | None) -> torch.Tensor:
    """Logits (B, V) of what follows; the model is as it was before, also if its caller trains it between two tokens."""
    was_training = model.training
    model.eval()
    try:
        return model(tokens_BT, prefix_BT=prefix_BT, cache=cache, last_only=True)[:, -1]
    finally:
        model.train(was_training)
