"""The rule that keeps the texts of evaluations out of training, so that a score tells what was learnt and not what was seen.

In: a `Document`, and files with evaluation texts. Out: the document, or the reason contaminated; `find_overlap` shows why.

Texts are compared as runs of words: lower case, letters and digits only. Runs of `ngram_words` words are compared, 13 as for
GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C). Words that no evaluation text has are all alike here, so each word
becomes a number, each run a hash, and most runs are ruled out by one look at a table of bits. A run whose hash is found is
compared word for word: no document is dropped for an accident of hashing.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import zstandard
from pydantic import Field

from configs.errors import UserError
from configs.section import PositiveInt
from data_pipeline.documents import Document
from data_pipeline.filters import Paths, as_tuple

WORD = re.compile(r"[^\W_]+")
# Every ASCII character as it is compared: letters in lower case, digits, a space for all others.
ASCII_TABLE = bytes(code if chr(code).isalnum() else 32 for code in bytes(range(128)).lower()) + bytes(128)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MIXER = np.uint64(0xD6E8FEB86659FD93)
TABLE_BITS = 24
SHIFT = np.uint64(64 - TABLE_BITS)


class _Runs(NamedTuple):
    """All runs of one length, ordered by their hash."""

    hashes: "np.ndarray[Any, np.dtype[np.uint64]]"
    starts: "np.ndarray[Any, np.dtype[np.int64]]"
    """Where each run stands in `Evaluations.words`."""
    is_there: "np.ndarray[Any, np.dtype[np.bool_]]"
    """Whether some hash starts with these bits."""


class Evaluations(NamedTuple):
    """What is looked for: runs of words as runs of numbers."""

    numbers: dict[str, int]
    """Word -> its number, from 1; 0 is any other word."""
    words: "np.ndarray[Any, np.dtype[np.int64]]"
    """All texts, as numbers, one behind the other."""
    runs: dict[int, _Runs]
    """Number of words -> runs."""


def decontaminate(
    document: Document,
    *,
    paths: Paths,
    fields: Annotated[Sequence[str], Field(min_length=1)] = ("text",),
    ngram_words: PositiveInt = 13,
    shortest_words: PositiveInt = 8,
    minimum_overlap: PositiveInt = 1,
) -> Document | str:
    """Drop a document that shares a run of 13 words with an evaluation set (GPT-3, appendix C).

    paths: .jsonl, .txt, and both with .gz or .zst; each of the `fields` of a jsonl row (a string, or a list of strings) is a
    text, and a .txt file is one. An evaluation text of fewer than `ngram_words` words is looked for as a whole, unless it has
    fewer than `shortest_words` (GPT-3: 8): such a text is everywhere. minimum_overlap: so many places of the document must
    match. Reason: contaminated. Raises UserError if a file cannot be read or holds no text to look for.
    """
    evaluations = load_evaluations(as_tuple(paths), tuple(fields), ngram_words, shortest_words)
    return document if find_overlap(document.text, evaluations, minimum_overlap) is None else "contaminated"


@lru_cache(maxsize=4)
def load_evaluations(paths: tuple[str, ...], fields: tuple[str, ...], ngram_words: int, shortest_words: int) -> Evaluations:
    """The texts that `decontaminate` looks for, by its settings. Raises UserError as it does."""
    numbers: dict[str, int] = {}
    texts: list[list[int]] = []
    for path in paths:
        found = [split_plain_words(text) for text in _read_texts(path, fields)]
        long_enough = [words for words in found if len(words) >= min(shortest_words, ngram_words)]
        if not long_enough:
            raise UserError(
                f"{path}: no text of at least {min(shortest_words, ngram_words)} words in the fields {', '.join(fields)}; "
                "name the right fields, or take the file out of paths."
            )
        texts += [[numbers.setdefault(word, len(numbers) + 1) for word in words] for words in long_enough]
    words = np.concatenate([np.array(text, dtype=np.int64) for text in texts])
    starts: dict[int, list[Any]] = {}
    end = 0
    for text in texts:
        num_words = min(len(text), ngram_words)
        starts.setdefault(num_words, []).append(np.arange(end, end + len(text) - num_words + 1))
        end += len(text)
    wanted = {num_words: np.concatenate(parts) for num_words, parts in starts.items()}
    return Evaluations(
        numbers,
        words,
        {
            num_words: _order_runs(hashes[wanted[num_words]], wanted[num_words])
            for num_words, hashes in _hash_runs(words, max(wanted))
            if num_words in wanted
        },
    )


def find_overlap(text: str, evaluations: Evaluations, minimum_overlap: int) -> str | None:
    """The first of the runs of words for which a text is contaminated, as it is compared; None if there are not enough."""
    places = _find_places(text, evaluations, minimum_overlap)
    if len(places) < minimum_overlap:
        return None
    start, num_words = min(places)
    return " ".join(split_plain_words(text)[start : start + num_words])


def split_plain_words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case."""
    if text.isascii():  # three times as fast
        return text.encode("ascii").translate(ASCII_TABLE).decode("ascii").split()
    return WORD.findall(text.lower())


def _find_places(text: str, evaluations: Evaluations, enough: int) -> list[tuple[int, int]]:
    """Where runs stand that evaluations hold: (number of the first word, number of words). Stops when there are enough."""
    words = split_plain_words(text)
    numbers = np.fromiter(map(evaluations.numbers.get, words, repeat(0)), dtype=np.int64, count=len(words))
    places: list[tuple[int, int]] = []
    for num_words, hashes in _hash_runs(numbers, max(evaluations.runs)):
        runs = evaluations.runs.get(num_words)
        if runs is None:
            continue
        candidates = np.flatnonzero(runs.is_there[hashes >> SHIFT])
        firsts = np.searchsorted(runs.hashes, hashes[candidates])
        for start, first in zip(candidates.tolist(), firsts.tolist(), strict=True):
            run = numbers[start : start + num_words]
            while first < len(runs.hashes) and runs.hashes[first] == hashes[start]:
                other = int(runs.starts[first])
                if np.array_equal(run, evaluations.words[other : other + num_words]):
                    places.append((start, num_words))
                    break
                first += 1
            if len(places) >= enough:
                return places
    return places


def _hash_runs(numbers: Any, longest: int) -> Iterator[tuple[int, Any]]:
    """For every number of words up to `longest`: the hash of the run that starts at each place."""
    mixed = numbers.astype(np.uint64) * MIXER
    mixed ^= mixed >> np.uint64(32)
    hashes = mixed
    for num_words in range(1, min(longest, len(numbers)) + 1):
        if num_words > 1:
            hashes = hashes[:-1] * MULTIPLIER + mixed[num_words - 1 :]
        yield num_words, (hashes ^ (hashes >> np.uint64(29))) * MIXER


def _order_runs(hashes: Any, starts: Any) -> _Runs:
    order = np.argsort(hashes, kind="stable")
    is_there = np.zeros(1 << TABLE_BITS, dtype=np.bool_)
    is_there[hashes >> SHIFT] = True
    return _Runs(hashes[order], starts[order], is_there)


def _read_texts(path: str, fields: tuple[str, ...]) -> list[str]:
    """The texts of an evaluation file. Raises UserError if it cannot be read."""
    try:
        content = Path(path).read_bytes()
        name = path
        if name.endswith(".gz"):
            content, name = gzip.decompress(content), name.removesuffix(".gz")
        elif name.endswith(".zst"):
            content, name = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read(), name.removesuffix(".zst")
        if not name.endswith((".jsonl", ".txt")):
            raise UserError(f"{path}: not a kind of evaluation file that is known; wanted .jsonl or .txt, both also with .gz or .zst.")
        text = content.decode("utf-8")
        if name.endswith(".txt"):
            return [text]
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: the evaluation file cannot be read ({error}); mend it, or take it out of paths.") from None
    values = [row.get(field) for row in rows if isinstance(row, dict) for field in fields]
    return [text for value in values for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


RULES: dict[str, Callable[..., Document | str]] = {"decontaminate": decontaminate}
