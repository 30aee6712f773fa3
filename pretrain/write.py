"""A run's newest intact checkpoint, as a model on one device that continues texts.

In: a run folder, a prompt or a file of them. Out: the text, piece by piece, or a row for each prompt. No process group: fragments
of any stage and number of ranks are read by ranges into one model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from configs.functions import code_of_the_user
from configs.schema import RunConfig
from data_pipeline.tokenizer import load_tokenizer, vocabulary_size
from pretrain.checkpoint.index import FragmentIndex
from pretrain.checkpoint.verify import Commit, list_commits, read_commit, verify_commit
from pretrain.data.prompts import Prompt, PromptForm
from pretrain.model.attention import Attend, causal_attention
from pretrain.model.build import build_model
from pretrain.model.decoder import Decoder
from pretrain.model.generate import generate_batch
from pretrain.run.folder import RunFolder

SAID_AFTER_SECONDS, SAID_EVERY_SECONDS = 2.0, 10.0


def newest_intact_commit(run: RunFolder, say: Callable[[str], object]) -> Commit:
    """The newest commit that verifies. A damaged one is said and left where it is: a reader moves nothing. Said too: code of the user's
    own that is not what it was.

    Raises UserError when there is none.
    """
    for folder in list_commits(run.checkpoints):
        problems = verify_commit(folder)
        if not problems:
            commit = read_commit(folder)
            with suppress(UserError):  # code that is not there is missed where it is needed
                for warning in commit.changed_code(code_of_the_user(run.load_config())):
                    say(warning)
            return commit
        say(f"checkpoint {folder.name} is damaged and is not used: {problems[0]}")
    raise UserError(f"{run.path} has no checkpoint that verifies yet; train it first: pretrain train {run.config_file}")


def load_model(config: RunConfig, commit: Commit, attend: Attend = causal_attention) -> Decoder:
    """The model of a verified commit, fp32, whole, on this machine's GPU or else its CPU, ready to evaluate."""
    with torch.device("meta"):
        model = build_model(config.model, config.objective, attend)
    with FragmentIndex(commit) as index:
        model.load_state_dict(index.weights(), assign=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_form(run: RunFolder, config: RunConfig) -> PromptForm:
    """How the documents of a run begin, in the tokens of its own tokenizer. Raises UserError where that is missing or does not fit."""
    end_of_text = config.data.tokenizer.end_of_text
    return PromptForm(load_tokenizer(run.tokenizer_file, end_of_text), end_of_text, config.objective)


@dataclass(frozen=True)
class TrainedModel:
    """What a commit holds, ready to be asked."""

    config: RunConfig
    commit: Commit
    model: Decoder
    form: PromptForm


def load_newest(run: RunFolder, say: Callable[[str], object]) -> TrainedModel:
    """The newest intact commit, ready to be asked; which one it is, is said. Raises UserError for none."""
    config = run.load_config()
    commit = newest_intact_commit(run, say)
    say(f"{commit.folder.name}, {commit.state.tokens_seen:,} tokens seen")
    form = load_form(run, config)
    return TrainedModel(config, commit, load_model(config, commit), form)


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen; see `generate_batch`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


def seeded_generator(seed: int, number: int) -> torch.Generator:
    """What draws for the prompt of this number, whatever is beside it in its batch."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]))


def write_text(
    run: RunFolder,
    prompt: str,
    *,
    say: Callable[[str], object],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """The prompt, then what the model makes of it, in pieces of whole characters. Raises UserError for values out of range."""
    trained = load_newest(run, say)
    choice = Choice(max_new_tokens, temperature, top_k, top_p, seed)
    tokens_and_ends = _continue(trained, [encode_prompt(trained, prompt, "the prompt")], [0], choice)
    yield prompt if trained.form.separator is None else f"{prompt}\n"  # an answer stands in a line of its own
    written: list[int] = []
    shown = ""
    for _, token in tokens_and_ends:
        written += [] if token is None else [token]
        text = trained.form.tokenizer.decode(written)
        if token is None or not text.endswith("\ufffd"):  # half a character: wait for its other bytes
            yield text[len(shown) :]
            shown = text


def write_texts(trained: TrainedModel, rows: Sequence[dict[str, Any]], choice: Choice, batch_size: int) -> Iterator[dict[str, Any]]:
    """Rows with a `prompt` each -> the same rows with `continuation`, `tokens` (how many they are) and what `ended` it: `end_of_text`,
    `max_tokens` (as many as were asked for) or `context` (model.largest_context is full).

    In the order of the rows, each as soon as it and those before it are finished. A row's text follows from its number, its prompt
    and the seed alone. Raises UserError, before anything is written, for a prompt that is too long and for values out of range.
    """
    prompts = [encode_prompt(trained, row["prompt"], f"prompt {number} of {len(rows)}") for number, row in enumerate(rows, 1)]
    return _write_encoded(trained, rows, prompts, choice, batch_size)


def _write_encoded(
    trained: TrainedModel, rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], choice: Choice, batch_size: int
) -> Iterator[dict[str, Any]]:
    context = trained.config.model.largest_context
    for start in range(0, len(rows), batch_size):
        numbers = range(start, min(start + batch_size, len(rows)))
        written: list[list[int]] = [[] for _ in numbers]
        finished: set[int] = set()
        told = 0
        for place, token in _continue(trained, [prompts[number] for number in numbers], numbers, choice):
            if token is not None:
                written[place].append(token)
                continue
            finished.add(place)
            while told in finished:
                tokens, prompt = written[told], prompts[start + told]
                is_full = len(prompt.tokens) + len(tokens) > context
                ended = "max_tokens" if len(tokens) == choice.max_new_tokens else "context" if is_full else "end_of_text"
                yield rows[start + told] | {"continuation": trained.form.tokenizer.decode(tokens), "tokens": len(tokens), "ended": ended}
                told += 1


def encode_prompt(trained: TrainedModel, text: str, name: str) -> Prompt:
    """A prompt's tokens. Raises UserError when it is no text, or longer than the model's context."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is not valid UTF-8 text.") from None
    prompt, context = trained.form.encode(text), trained.config.model.largest_context
    if len(prompt.tokens) > context:
        raise UserError(f"{name} has {len(prompt.tokens)} tokens; wanted 1 to {context} (model.largest_context). Shorten it.")
    return prompt


def _continue(trained: TrainedModel, prompts: Sequence[Prompt], numbers: Sequence[int], choice: Choice) -> Iterator[tuple[int, int | None]]:
    try:
        return generate_batch(
            trained.model,
            [prompt.tokens for prompt in prompts],
            section=trained.config.model,
            max_new_tokens=choice.max_new_tokens,
            num_prefix=[prompt.num_prefix for prompt in prompts],
            end_of_text=trained.form.end_of_text,
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            generators=[seeded_generator(choice.seed, number) for number in numbers],
            num_tokens=vocabulary_size(trained.form.tokenizer),
        )
    except ValueError as error:
        raise UserError(f"{error}.") from None


class SaidProgress:
    """What is said of something that takes long: after two seconds, and then every ten."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._due = time.monotonic() + SAID_AFTER_SECONDS

    def __call__(self, done: int, total: int, what: str) -> None:
        """So many of so many are done."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + SAID_EVERY_SECONDS
            self._say(f"{done:,} of {total:,} {what}")
