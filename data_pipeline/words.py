"""Words and sentences of English text as the published filters count them, fast enough for a corpus.

In: a text. Out: its words (`split_words`, `analyse_words`), how many sentences it has (`count_sentences`).

Thresholds that were tuned with one tokenizer mean something else with another. FineWeb's rules were run with spaCy's
rules for English (a blank pipeline and its sentencizer), so words here are exactly spaCy's. spaCy looks at each piece
between whitespace alone, and a corpus repeats its pieces: spaCy splits a piece when it is first seen, afterwards the answer
comes from a dictionary. The one exception are special cases that reach over a space (`_reaches_over`).
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple
from unicodedata import category

import numpy as np

from configs.errors import UserError

REMEMBERED_CHARACTERS = 8_000_000  # of pieces and words; above that the dictionary is emptied. Some 390 MB of memory.
PIECE_OR_WHITESPACE = re.compile(r"\s+|\S+")

# Unicode's Sentence_Terminal characters, less some that came later, plus three Khmer signs: first and last code point.
SENTENCE_ENDS = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 17d9-17da "
    "1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e 2e3c 2e53-2e54 3002 "
    "a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f ff61 "
    "10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c "
    "112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 "
    "11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f 1da88"
)
# What CCNet and after it FineWeb count as punctuation, and the control characters.
PUNCTUATION = (
    "0-8 b-1f 22-2d 2f 3a-3e 40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001 3008-300d 3010-3011 "
    "ff05 ff08-ff09 ff0c ff11 ff1a-ff1b ff5e"
)


def _characters(ranges: str) -> frozenset[str]:
    """The characters of ranges of code points: `21 61d-61f`."""
    bounds = ((int(part.split("-")[0], 16), int(part.split("-")[-1], 16)) for part in ranges.split())
    return frozenset(chr(code) for first, last in bounds for code in range(first, last + 1))


TERMINAL_PUNCTUATION = _characters(SENTENCE_ENDS)
SYMBOLS = TERMINAL_PUNCTUATION | _characters(PUNCTUATION)


class Words(NamedTuple):
    """The words of a text in its order, and facts of each: arrays of one dimension, as long as `words`."""

    words: tuple[str, ...]
    numbers: "np.ndarray[Any, np.dtype[np.int64]]"
    """Two words have the same number exactly if they are equal; from 0, no two calls need agree."""
    lengths: "np.ndarray[Any, np.dtype[np.int64]]"
    """Characters."""
    is_symbol: "np.ndarray[Any, np.dtype[np.bool_]]"
    """Every character is in `SYMBOLS`."""
    has_letter: "np.ndarray[Any, np.dtype[np.bool_]]"
    """Some character is alphabetic."""


class _Step(NamedTuple):
    """What a piece does to the count of sentences: (sentences that start in it, whether it ends one), by what came before."""

    inside: tuple[int, bool]
    after_an_end: tuple[int, bool]


@dataclass(slots=True)
class _Dictionary:
    """What is known of pieces (what stands between whitespace) and of the words that they consist of."""

    pieces: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Piece -> numbers of its words."""
    steps: dict[str, _Step] = field(default_factory=dict)
    """Only of pieces with a sentence end or a punctuation mark at the start."""
    neighbours: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    """Piece with a special case in it -> (ends of a piece before, starts of a piece behind) that may change its words."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Word -> number: its place in what follows."""
    words: list[str] = field(default_factory=list)
    facts: Any = field(default_factory=lambda: np.zeros((1024, 3), dtype=np.int64))
    """A row for each word: length, is_symbol, has_letter; doubled when it is full."""
    characters: int = 0


@lru_cache(maxsize=2)
def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, never empty, without whitespace. Raises UserError if spaCy is not installed."""
    numbers = _number_words(text)  # first: it may start a new dictionary
    words = _dictionary().words
    return tuple([words[number] for number in numbers])


def count_words(text: str) -> int:
    """How many words a text has, not keeping them. Raises UserError if spaCy is not installed."""
    return len(_number_words(text))


@lru_cache(maxsize=1)
def analyse_words(text: str) -> Words:
    """The words of a text with their facts; those of the last text are kept, as one rule after the other asks for them."""
    words = split_words(text)
    numbers = np.array(_number_words(text), dtype=np.int64)
    facts = _dictionary().facts[numbers]
    return Words(words, numbers, facts[:, 0], facts[:, 1] != 0, facts[:, 2] != 0)


def count_sentences(text: str) -> int:
    """How many sentences a text has: one ends with terminal punctuation and what punctuation follows; an empty text is one."""
    pieces = text.split()
    _make_room()
    known = _dictionary()
    learn_words(pieces)
    if known.neighbours and _reaches_over(pieces):
        return 1 + _take_step(_split_by_spacy(text), False)[0]
    if pieces and " ".join(pieces) != text:
        # Whitespace other than one space between pieces is a token, and so may start a sentence.
        pieces = _split_keeping_whitespace(text)
    sentences, ended = 1, False
    steps = known.steps
    for piece in pieces:
        step = steps.get(piece)
        if step is not None:
            more, ended = step[ended]
            sentences += more
        elif ended:
            sentences, ended = sentences + 1, False
    return sentences


def learn_words(pieces: list[str]) -> None:
    """Have spaCy split those pieces that were never seen. Raises UserError if spaCy is not installed."""
    known = _dictionary()
    unknown = [piece for piece in dict.fromkeys(pieces) if piece not in known.pieces]
    if not unknown:
        return
    # A line break is a token of its own, and no special case reaches over it.
    tokens: list[str] = []
    places = iter(unknown)
    for text in _split_by_spacy("\n".join(unknown)):
        if text == "\n":
            _remember_piece(known, next(places), tokens)
            tokens = []
        else:
            tokens.append(text)
    _remember_piece(known, next(places), tokens)


@lru_cache(maxsize=1)
def _number_words(text: str) -> list[int]:
    _make_room()
    pieces = text.split()
    known = _dictionary()
    try:
        numbers = list(chain.from_iterable(map(known.pieces.__getitem__, pieces)))
    except KeyError:
        learn_words(pieces)
        numbers = list(chain.from_iterable(map(known.pieces.__getitem__, pieces)))
    if not known.neighbours.keys().isdisjoint(pieces) and _reaches_over(pieces):
        return [_number_word(known, token) for token in _split_by_spacy(text) if not token.isspace()]
    return numbers


def _make_room() -> None:
    """Forget all words when there are too many: between two texts, so that the numbers of one text stay in use."""
    if _dictionary().characters > REMEMBERED_CHARACTERS:
        forget_words()


def forget_words() -> None:
    """Empty the dictionary, and with it what was kept of the last text and spaCy's own memory of words."""
    _dictionary.cache_clear()
    _load_spacy.cache_clear()
    split_words.cache_clear()
    analyse_words.cache_clear()
    _number_words.cache_clear()


@lru_cache(maxsize=1)
def _dictionary() -> _Dictionary:
    return _Dictionary()


def _number_word(known: _Dictionary, word: str) -> int:
    number = known.numbers.get(word)
    if number is None:
        number = known.numbers[word] = len(known.words)
        known.words.append(word)
        known.characters += len(word)
        if number == len(known.facts):
            known.facts = np.concatenate([known.facts, np.zeros_like(known.facts)])
        known.facts[number] = len(word), SYMBOLS.issuperset(word), word.isalpha() or any(map(str.isalpha, word))
    return number


def _remember_piece(known: _Dictionary, piece: str, tokens: list[str]) -> None:
    """Enter a piece and the words that spaCy makes of it."""
    known.pieces[piece] = tuple([_number_word(known, token) for token in tokens])
    known.characters += len(piece)
    if piece.isalnum():
        return
    if _is_punctuation(tokens[0]) or not _sentence_ends().isdisjoint(tokens):
        known.steps[piece] = _Step(_take_step(tokens, False), _take_step(tokens, True))
    special = _special_cases()
    if not special.tokens.isdisjoint(tokens):
        lefts = tuple(left for right, chosen in special.before.items() if piece.startswith(right) for left in chosen)
        rights = tuple(right for left, chosen in special.behind.items() if piece.endswith(left) for right in chosen)
        if lefts or rights:
            known.neighbours[piece] = (lefts, rights)


def _is_punctuation(token: str) -> bool:
    return all(category(character).startswith("P") for character in token)


def _take_step(tokens: list[str], ended: bool) -> tuple[int, bool]:
    """Sentences that start at one of the tokens, and whether the last sentence has ended behind them."""
    ends, started = _sentence_ends(), 0
    for token in tokens:
        if token in ends:
            ended = True
        elif ended and not _is_punctuation(token):
            started, ended = started + 1, False
    return started, ended


class _SpecialCases(NamedTuple):
    """spaCy's special cases that are not what its other rules would make of them, and where a space may fall into one."""

    tokens: frozenset[str]
    """The first token of each: where none of these is, none was found."""
    before: dict[str, set[str]]
    """Token -> tokens that stand before it in the plain reading of a special case."""
    behind: dict[str, set[str]]


@lru_cache(maxsize=1)
def _special_cases() -> _SpecialCases:
    from spacy.tokenizer import Tokenizer

    language = _load_spacy()
    full = language.tokenizer
    names = ("prefix_search", "suffix_search", "infix_finditer", "token_match", "url_match")
    plain = Tokenizer(language.vocab, rules={}, **{name: getattr(full, name) for name in names})
    firsts: set[str] = set()
    before: dict[str, set[str]] = {}
    behind: dict[str, set[str]] = {}
    for case in full.rules:
        if case.isspace():
            continue
        special, tokens = ([token.text for token in tokenizer(case)] for tokenizer in (full, plain))
        # spaCy searches the tokens only for cases that its other rules would touch.
        if tokens != special and (full.find_prefix(case) or full.find_infix(case) or full.find_suffix(case)):
            firsts.add(special[0])
        for left, right in pairwise(tokens):
            before.setdefault(right, set()).add(left)
            behind.setdefault(left, set()).add(right)
    return _SpecialCases(frozenset(firsts), before, behind)


def _reaches_over(pieces: list[str]) -> bool:
    """Whether a piece with a special case may be split otherwise because of its neighbour.

    spaCy looks for special cases among the tokens, whether there is a space between two of them or not. A find with a
    space is then given up, but has by then displaced a shorter find that overlaps it. It is seen where the two tokens
    around a space stand beside each other in a special case. The tokens of a piece with a find are not the ones that were
    searched, so of such a piece the first and last characters are compared, to be safe.
    """
    known = _dictionary()
    last = len(pieces) - 1
    for place, piece in enumerate(pieces):
        found = known.neighbours.get(piece)
        if found is None:
            continue
        lefts, rights = found
        if rights and place < last:
            right = pieces[place + 1]
            if right.startswith(rights) and (right in known.neighbours or known.words[known.pieces[right][0]] in rights):
                return True
        if lefts and place:
            left = pieces[place - 1]
            if left.endswith(lefts) and (left in known.neighbours or known.words[known.pieces[left][-1]] in lefts):
                return True
    return False


def _split_by_spacy(text: str) -> list[str]:
    return [token.text for token in _load_spacy().tokenizer(text)]


def _split_keeping_whitespace(text: str) -> list[str]:
    """The pieces, and between them the whitespace that spaCy makes a token of: all but a space behind a piece."""
    first, *others = PIECE_OR_WHITESPACE.findall(text)
    return [first, *(part for part in (part.removeprefix(" ") for part in others) if part)]


@lru_cache(maxsize=1)
def _sentence_ends() -> frozenset[str]:
    from spacy.pipeline.sentencizer import Sentencizer

    return frozenset(Sentencizer.default_punct_chars)


@lru_cache(maxsize=1)
def _load_spacy() -> Any:
    try:
        import spacy
    except ImportError:
        raise UserError(
            "a rule that counts words was asked for, and the library spaCy is not installed; install it with "
            "pip install 'pretrain[filters]', or take the rule out of data.clean."
        ) from None
    return spacy.blank("en")
