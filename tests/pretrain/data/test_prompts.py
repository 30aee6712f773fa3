"""Prompts: they begin as documents do, and end with the separator where the objective has one."""

import pytest
from tokenizers import AddedToken, Tokenizer

from configs.errors import UserError
from configs.objective_section import ObjectiveSection
from data_pipeline.tokenizer import train_tokenizer
from pretrain.data.prompts import Prompt, PromptForm

END, SEPARATOR = "<|endoftext|>", "<|sep|>"


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer() -> Tokenizer:
    tokenizer = train_tokenizer(["one plus one is two. one plus two is three."] * 20, 280, END)
    tokenizer.add_tokens([AddedToken(SEPARATOR, normalized=False)])
    return tokenizer


def form_of(tokenizer: Tokenizer, kind: str) -> PromptForm:
    return PromptForm(tokenizer, END, ObjectiveSection(kind=kind, separator=None if kind == "next_token" else SEPARATOR))


def test_a_prompt_begins_with_an_end_of_text_as_documents_do(tokenizer: Tokenizer) -> None:
    form = form_of(tokenizer, "next_token")
    assert form.encode("one plus") == Prompt([0, *tokenizer.encode("one plus").ids])
    assert form.encode("") == Prompt([0])
    assert form.encode(f"{END}one").tokens[1:] == tokenizer.encode(f"{END}one").ids  # read as ordinary text
    assert 0 not in form.encode(f"{END}one").tokens[1:]


@pytest.mark.parametrize("kind", ["continuation", "prefix"])
def test_the_given_part_ends_with_the_separator(tokenizer: Tokenizer, kind: str) -> None:
    form, separator = form_of(tokenizer, kind), tokenizer.token_to_id(SEPARATOR)
    given, begun = tokenizer.encode("one plus").ids, tokenizer.encode(" two").ids
    tokens = [0, *given, separator]
    num_prefix = len(tokens) if kind == "prefix" else 0
    assert form.encode("one plus") == form.encode(f"one plus{SEPARATOR}") == Prompt(tokens, num_prefix)
    assert form.encode(f"one plus{SEPARATOR} two") == Prompt([*tokens, *begun], num_prefix)
    assert form.encode_pair("one plus", " two") == (Prompt(tokens, num_prefix), begun)
    # As a document with the separator in it is encoded.
    assert tokenizer.encode(f"one plus{SEPARATOR} two").ids == [*given, separator, *begun]


def test_a_pair_is_encoded_together(tokenizer: Tokenizer) -> None:
    """The border is where the tokenizer puts it: `is two` is not `is` and ` two` in every tokenizer."""
    form = form_of(tokenizer, "next_token")
    for text, continuation in (("one plus one is", " two."), ("one pl", "us"), ("", "one")):
        prompt, tokens = form.encode_pair(text, continuation)
        assert prompt == form.encode(text)
        whole = form.encode(text + continuation).tokens
        assert tokens == whole[len(prompt.tokens) :]


def test_what_is_cut_off_is_the_beginning() -> None:
    assert Prompt([1, 2, 3, 4], 3).last(2) == Prompt([3, 4], 1)
    assert Prompt([1, 2, 3, 4], 1).last(2) == Prompt([3, 4], 0)
    assert Prompt([1, 2], 1).last(5) == Prompt([1, 2], 1)


def test_a_token_that_is_not_there_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="objective.separator: the dataset's tokenizer has no entry '<none>'"):
        PromptForm(tokenizer, END, ObjectiveSection(kind="prefix", separator="<none>"))
    with pytest.raises(UserError, match="no token '<end>'"):
        PromptForm(tokenizer, "<end>", ObjectiveSection())
