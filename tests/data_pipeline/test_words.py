"""Words and sentences are spaCy's, whatever whitespace, emoticons, URLs and special cases stand beside each other."""

import builtins
import random

import pytest

from configs.errors import UserError
from data_pipeline import words as module
from data_pipeline.words import analyse_words, count_sentences, count_words, forget_words, split_words

spacy = pytest.importorskip("spacy", reason="needs spaCy, which pretrain[filters] brings")

HARD = [
    "",
    " ",
    "\n",
    " a",
    "a ",
    "a. ",
    "a.  ",
    "a.\n\nb",
    "One. Two! Three?  Four… five.\u00a0Six\u2003seven.\tEight",
    "(e.g. the U.S. isn't co. . op) :-) :) ) 8-D :'( <3 </3 ¯\\(ツ)/¯",
    "see https://a.example.org/x?y=1#z, mail a@b.de; it's 10km/h at 5 p.m. Mr. Dr. Who's",
    "don't can't cannot dont Im I'm y'all 'tis \"quoted.\" 'single.' (paren.) [1]. ... .... …",
    "東京。大阪！ कहाँ। ¿Qué? IS_ALPHA ORTH \x1c \x85 x\u200by",
    "a .b . ) : ) ; - ) o . O and / or ° C. <. <",
]


@pytest.fixture(scope="module")
def spacy_says():
    """Words without whitespace, and the number of sentences, of a text."""
    language = spacy.blank("en")
    language.add_pipe("sentencizer")

    def say(text):
        document = language(text)
        return tuple(token.text for token in document if token.text.strip()), max(1, len(list(document.sents)))

    return say


@pytest.mark.parametrize("text", HARD)
def test_hard_cases(text, spacy_says):
    assert (split_words(text), count_sentences(text)) == spacy_says(text)
    assert count_words(text) == len(split_words(text))


def test_random_texts(spacy_says, seed):
    chosen = random.Random(seed)
    rules = sorted(spacy.blank("en").tokenizer.rules)
    characters = [*"abAB.,!?'’\"-–—:;()[]/\\*…。0123#$%&@^_~<>=|{}", "http://a.b/c", "e.g.", "can't", "東京。", "é"]
    tokens = sorted(set(module._special_cases().before) | set(module._special_cases().behind))
    whitespace = [" ", " ", " ", " ", "", "  ", "\n", "\t", " \n", "\u00a0", "\r\n", "\x1c"]
    for _ in range(4000):
        parts = []
        for _ in range(chosen.randint(1, 12)):
            parts += [chosen.choice(chosen.choice([rules, tokens, characters])) for _ in range(chosen.randint(1, 3))]
            parts.append(chosen.choice(whitespace))
        text = "".join(parts)
        assert (split_words(text), count_sentences(text)) == spacy_says(text), repr(text)


@pytest.mark.parametrize("text", ["Doin ''-x", ") :)Neb.Coz", "ol 's°f.", "nothin 'em>.<", "[ :(Not’ve", "hasn’t( :*July."])
def test_a_neighbour_may_change_the_words(text, spacy_says):
    """spaCy gives up a special case with a space in it, and with it the one inside that it displaced."""
    assert split_words(text) == spacy_says(text)[0]
    assert split_words(text) != tuple(word for piece in text.split() for word in split_words(piece))


def test_facts():
    words = analyse_words("It costs 5 € , :-) -- 3rd ... the «end».")
    facts = {
        word: (length, bool(is_symbol), bool(has_letter))
        for word, length, is_symbol, has_letter in zip(words.words, words.lengths, words.is_symbol, words.has_letter, strict=True)
    }
    assert facts["costs"] == (5, False, True)
    assert facts["5"] == (1, False, False)
    assert facts["€"] == (1, False, False)
    assert facts["..."] == (3, True, False)
    assert facts[":-)"] == (3, True, False)
    assert facts["3rd"] == (3, False, True)
    assert facts["«"] == (1, True, False)


def test_numbers_tell_words_apart():
    words = analyse_words("the cat and the dog and The cat")
    assert [[one == other for other in words.numbers] for one in words.numbers] == [
        [one == other for other in words.words] for one in words.words
    ]


def test_dictionary_is_emptied_when_it_is_full(monkeypatch):
    forget_words()
    monkeypatch.setattr(module, "REMEMBERED_CHARACTERS", 100)
    texts = [f"text number {number} with its own word{number}. And a sentence." for number in range(40)]
    before = [(split_words(text), analyse_words(text).lengths.tolist(), count_sentences(text)) for text in texts]
    assert len(module._dictionary().pieces) < 40
    monkeypatch.undo()
    assert before == [(split_words(text), analyse_words(text).lengths.tolist(), count_sentences(text)) for text in texts]


def test_more_words_than_facts_have_room():
    text = " ".join(f"word{number}" for number in range(5000))
    assert analyse_words(text).lengths.sum() == len(text.replace(" ", ""))


def test_missing_spacy_is_named(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name == "spacy":
            raise ImportError(name)
        return real_import(name, *arguments, **settings)

    forget_words()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pretrain\[filters\]"):
        split_words("a text")
