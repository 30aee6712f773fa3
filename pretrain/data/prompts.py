"""A prompt as the beginning of a document, in the form that training saw: what the model is to continue.

In: text, the tokenizer, the section `objective`. Out: token ids, and how many of them see each other in both directions.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from configs.objective_section import ObjectiveSection
from data_pipeline.tokenizer import end_of_text_id, entry_id


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document."""

    tokens: list[int]
    num_prefix: int = 0
    """So many tokens at its beginning see each other in both directions."""

    def last(self, num_tokens: int) -> "Prompt":
        """At most so many tokens of its end."""
        num_cut = max(0, len(self.tokens) - num_tokens)
        return Prompt(self.tokens[num_cut:], max(0, self.num_prefix - num_cut))


class PromptForm:
    """How a run's documents begin: an end of text, and where the objective has a separator, the given part and the separator."""

    def __init__(self, tokenizer: Tokenizer, end_of_text: str, objective: ObjectiveSection) -> None:
        """Raises UserError when the tokenizer lacks one of the two tokens."""
        self.tokenizer = tokenizer
        self.end_of_text = end_of_text_id(tokenizer, end_of_text)
        self.separator = objective.separator
        self.separator_id = None if objective.separator is None else entry_id(tokenizer, objective.separator, "objective.separator")
        self._is_prefix = objective.kind == "prefix"

    def encode(self, text: str) -> Prompt:
        """A text's tokens. The separator is appended unless the text has it; what follows it is the beginning of what is to be written."""
        if self.separator is None or self.separator_id is None:
            return Prompt([self.end_of_text, *self.encode_text(text)])
        given, _, begun = text.partition(self.separator)
        tokens = [self.end_of_text, *self.encode_text(given), self.separator_id]
        return Prompt([*tokens, *self.encode_text(begun)], len(tokens) if self._is_prefix else 0)

    def encode_pair(self, text: str, continuation: str) -> tuple[Prompt, list[int]]:
        """A text and what follows it, encoded together, so that their border is where the tokenizer puts it; see `encode`."""
        if self.separator is not None:
            return self.encode(text), self.encode_text(continuation)
        prompt = self.encode(text)
        return prompt, self.encode(text + continuation).tokens[len(prompt.tokens) :]

    def encode_text(self, text: str) -> list[int]:
        """A text's tokens and nothing else."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids
