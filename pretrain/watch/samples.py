"""What the model writes while it is trained: it continues a few prompts at every evaluation, so that one can read how it learns.

In: `evaluate.prompts` and the engine, live, at any ZeRO stage. Out: a row for each prompt in `RUN/samples.jsonl`, which is cut back at
resume as `metrics.jsonl` is, and a line in the terminal.

Rank 0 writes; where a forward is a collective (ZeRO-3) the others take part in its forwards. So a text does not depend on their number.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer import load_tokenizer, vocabulary_size
from pretrain.data.prompts import Prompt, PromptForm
from pretrain.data.remote import described_in
from pretrain.engine.parallel import Layout
from pretrain.model.decoder import Decoder
from pretrain.model.generate import generate_batch
from pretrain.page import make_visible
from pretrain.state import TrainState
from pretrain.watch.metrics import MetricsLog, cut_back

SAMPLES_FILE = "samples.jsonl"
"""Its name in the run folder."""
TEMPERATURE, TOP_P = 0.8, 0.95
"""Greedy texts of small or young models go round in circles; these read well, and the least likely tokens are left out."""
SHOWN_CHARACTERS = 200
"""Of a text, in a line of the terminal."""


class Samples:
    """Continues the prompts of a run; without prompts it does nothing."""

    def __init__(self, config: RunConfig, run: Path, attempt: int, state: TrainState, engine: torch.nn.Module, layout: Layout) -> None:
        """run: the run folder, whose rows after `state` are cut off. Raises UserError, on all ranks, for a prompt that is too long."""
        self._config, self._attempt, self._engine, self._layout = config, attempt, engine, layout
        self._encoded: list[Prompt] = []
        self._log: MetricsLog | None = None
        if layout.rank == 0:
            cut_back(run / SAMPLES_FILE, state.step)
        if not config.evaluate.prompts:
            return
        if layout.rank == 0:
            self._log = MetricsLog(run / SAMPLES_FILE)
        end_of_text = config.data.tokenizer.end_of_text
        self._form = PromptForm(load_tokenizer(described_in(config.data) / TOKENIZER, end_of_text), end_of_text, config.objective)
        self._encoded = [encode_prompt(self._form, text, config.model.largest_context) for text in config.evaluate.prompts]

    def write(self, state: TrainState, beat: Callable[[], None], say: Callable[[str], None]) -> None:
        """Let the model continue every prompt, as it is now: the same weights write the same. Every random state stays as it was.

        Collective. beat: called on all ranks with each token, as a sign of life. say: takes a line for each text.
        """
        at_once = self._config.evaluate.micro_batch_samples
        for first in range(0, len(self._encoded), at_once):
            texts = self._continue(range(first, min(first + at_once, len(self._encoded))), beat)
            for prompt, text in zip(self._config.evaluate.prompts[first:], texts, strict=False):
                self._tell(state, prompt, text, say)

    def _continue(self, numbers: Sequence[int], beat: Callable[[], None]) -> list[str]:
        """The texts behind some prompts, on rank 0; on the others none."""
        mine = numbers if self._layout.rank == 0 else []
        written: list[list[int]] = [[] for _ in mine]

        def on_any_rank(holds: bool) -> bool:
            beat()
            return self._layout.sum_over_data_ranks(holds) > 0

        # Layers that are compiled for fixed shapes would be compiled for each length.
        with torch.compiler.set_stance("force_eager"):
            tokens_and_ends = generate_batch(
                cast("Decoder", self._engine),
                [self._encoded[number].tokens for number in mine],
                max_new_tokens=self._config.evaluate.prompt_tokens,
                section=self._config.model,
                num_prefix=[self._encoded[number].num_prefix for number in mine],
                end_of_text=self._form.end_of_text,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                generators=[generator_of(self._config.run.seed, number) for number in mine],
                num_tokens=vocabulary_size(self._form.tokenizer),
                on_any_rank=on_any_rank,
            )
            for place, token in tokens_and_ends:
                if token is not None:
                    written[place].append(token)
        return [self._form.tokenizer.decode(tokens) for tokens in written]

    def _tell(self, state: TrainState, prompt: str, text: str, say: Callable[[str], None]) -> None:
        row = {"step": state.step, "tokens_seen": state.tokens_seen, "attempt": self._attempt, "prompt": prompt, "text": text}
        if self._log is not None and (problem := self._log.write(row)):
            say(f"WARNING: {SAMPLES_FILE} cannot be written ({problem}); its rows wait in memory.")
        shown = make_visible(f"{prompt} → {text}")
        say(f"step {state.step}: {shown if len(shown) <= SHOWN_CHARACTERS else f'{shown[: SHOWN_CHARACTERS - 1]}…'}")


def encode_prompt(form: PromptForm, text: str, context: int) -> Prompt:
    """A prompt's tokens. Raises UserError when it is no text, or fills the model's context."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"evaluate.prompts: {text!r} is not valid UTF-8 text.") from None
    prompt = form.encode(text)
    if len(prompt.tokens) > context:
        raise UserError(
            f"evaluate.prompts: {make_visible(text[:80])!r} has {len(prompt.tokens)} tokens; wanted 1 to {context} "
            "(model.largest_context). Shorten it."
        )
    return prompt


def generator_of(seed: int, number: int) -> torch.Generator:
    """What draws for the prompt of this number: at every step the same luck, so that what differs between two texts is the weights."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]))
