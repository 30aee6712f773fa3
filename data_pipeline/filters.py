"""The published rules of quality for English web text: Gopher's, C4's, FineWeb's, block lists, and a limit of length.

In: a `Document`. Out: the document, changed by `c4_quality` alone, or the reason why it is dropped. Every threshold is the
published one unless the run file sets another; None turns a test off. A document at a threshold stays; beyond it, it goes.

The verdicts and the changed texts are those of datatrove's filters, with which FineWeb was made; where datatrove divides by
zero (no words at all, with `min_words` off) the reason is no_words.
Sources: Gopher, Rae et al. 2021, arXiv 2112.11446, table A1 and section A.1. C4, Raffel et al. 2020, arXiv 1910.10683,
section 2.2, and c4_utils.py of TensorFlow Datasets. FineWeb, Penedo et al. 2024, arXiv 2406.17557, section 3.6.
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from configs.errors import UserError
from configs.section import Fraction, PositiveInt
from data_pipeline.documents import Document
from data_pipeline.words import TERMINAL_PUNCTUATION, Words, analyse_words, count_sentences, count_words

PARAGRAPH_BREAK = re.compile(r"\n{2,}")
LINE_BREAK = re.compile(r"\n+")
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
WORD = re.compile(r"\w+")
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
LINE_ENDS = (".", "?", "!", '"', "'")
JAVASCRIPT = "javascript"
LOREM_IPSUM = "lorem ipsum"
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
HASH_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
TABLE_CHARACTERS = 1 << 16
Thresholds: TypeAlias = Sequence[tuple[PositiveInt, Fraction]]
Paths: TypeAlias = str | Annotated[Sequence[str], Field(min_length=1)]


def gopher_repetition(
    document: Document,
    *,
    max_duplicate_lines: Fraction | None = 0.3,
    max_duplicate_line_characters: Fraction | None = 0.2,
    max_duplicate_paragraphs: Fraction | None = 0.3,
    max_duplicate_paragraph_characters: Fraction | None = 0.2,
    max_top_ngram_characters: Thresholds = ((2, 0.2), (3, 0.18), (4, 0.16)),
    max_duplicate_ngram_characters: Thresholds = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1)),
) -> Document | str:
    """Drop a document that repeats its lines, paragraphs or runs of words (Gopher, table A1).

    Lines and paragraphs: the share of those that were there before, and of the text's characters in them. n-grams: pairs of
    n words and the share of characters in the most frequent n-gram, or in all that were there before.
    Reasons: empty, duplicate_paragraphs, duplicate_paragraph_characters, duplicate_lines, duplicate_line_characters,
    top_N_gram, duplicate_N_grams. Raises UserError if spaCy is not installed.
    """
    text = document.text
    if not text:
        return "empty"
    for name, parts, most_parts, most_characters in (
        ("paragraph", PARAGRAPH_BREAK.split(text.strip()), max_duplicate_paragraphs, max_duplicate_paragraph_characters),
        ("line", LINE_BREAK.split(text), max_duplicate_lines, max_duplicate_line_characters),
    ):
        num_parts, num_characters = count_duplicates(parts)
        if most_parts is not None and num_parts / len(parts) > most_parts:
            return f"duplicate_{name}s"
        if most_characters is not None and num_characters / len(text) > most_characters:
            return f"duplicate_{name}_characters"
    words = analyse_words(text)
    return (
        _find_top_ngram(words, len(text), max_top_ngram_characters)
        or _find_duplicate_ngrams(words, len(text), max_duplicate_ngram_characters)
        or document
    )


def gopher_quality(
    document: Document,
    *,
    min_words: NonNegativeInt | None = 50,
    max_words: NonNegativeInt | None = 100_000,
    min_average_word_length: NonNegativeFloat | None = 3,
    max_average_word_length: NonNegativeFloat | None = 10,
    max_symbols_per_word: NonNegativeFloat | None = 0.1,
    max_bullet_lines: Fraction | None = 0.9,
    max_ellipsis_lines: Fraction | None = 0.3,
    min_words_with_letter: Fraction | None = 0.8,
    min_stop_words: NonNegativeInt | None = 2,
    stop_words: Sequence[str] = STOP_WORDS,
) -> Document | str:
    """Drop a document whose words and lines are not those of running text (Gopher, section A.1).

    Words that are symbols only are left out of the count and of the average length (characters). Symbols per word: number
    signs, then ellipses. Lines that start with a bullet or end in an ellipsis, words with a letter: shares. Stop words: how
    many different ones occur. Reasons: too_few_words, too_many_words, short_words, long_words, no_words, number_signs,
    ellipses, bullet_lines, ellipsis_lines, few_letters, few_stop_words. Raises UserError if spaCy is not installed.
    """
    text = document.text
    words = analyse_words(text)
    lengths = words.lengths[~words.is_symbol]
    if min_words is not None and len(lengths) < min_words:
        return "too_few_words"
    if max_words is not None and len(lengths) > max_words:
        return "too_many_words"
    if not len(words.words):
        return "no_words"
    if len(lengths):  # of symbols alone there is no average, and none is too small
        average = int(lengths.sum()) / len(lengths)
        if min_average_word_length is not None and average < min_average_word_length:
            return "short_words"
        if max_average_word_length is not None and average > max_average_word_length:
            return "long_words"
    if max_symbols_per_word is not None:
        if text.count("#") / len(words.words) > max_symbols_per_word:
            return "number_signs"
        if (text.count("...") + text.count("…")) / len(words.words) > max_symbols_per_word:
            return "ellipses"
    lines = text.splitlines()
    if max_bullet_lines is not None and sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > max_bullet_lines:
        return "bullet_lines"
    if max_ellipsis_lines is not None and sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > max_ellipsis_lines:
        return "ellipsis_lines"
    if min_words_with_letter is not None and np.count_nonzero(words.has_letter) / len(words.words) < min_words_with_letter:
        return "few_letters"
    if min_stop_words is not None and len(set(stop_words).intersection(words.words)) < min_stop_words:
        return "few_stop_words"
    return document


def c4_quality(
    document: Document,
    *,
    terminal_punctuation: bool = True,
    min_sentences: NonNegativeInt | None = 5,
    min_words_per_line: NonNegativeInt = 3,
    max_word_length: NonNegativeInt | None = 1000,
    remove_citations: bool = True,
    drop_javascript: bool = True,
    drop_policies: bool = True,
    drop_lorem_ipsum: bool = True,
    drop_curly_bracket: bool = True,
) -> Document | str:
    """Keep the lines that are sentences, and drop a document that has few or that holds code or filler (C4, section 2.2).

    Out go lines with a word above `max_word_length` characters, without terminal punctuation (FineWeb turns this off), with
    few words between whitespace, with "javascript" or a phrase about cookies; and Wikipedia's marks of citations. A
    document goes for "lorem ipsum" or "{" in a line that would stay. Each line is stripped.
    Reasons: lorem_ipsum, curly_bracket, too_few_sentences. Raises UserError if spaCy is not installed.
    """
    text = document.text
    lowered = text.lower()
    watched = [JAVASCRIPT] * drop_javascript + [LOREM_IPSUM] * drop_lorem_ipsum + [*POLICIES] * drop_policies
    is_suspect = any(phrase in lowered for phrase in watched)  # most texts have none: then no line is searched
    wanted_sentences = 0 if min_sentences is None else min_sentences
    num_sentences = 0
    kept: list[str] = []
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if max_word_length is not None and len(line) > max_word_length and max(map(len, words)) > max_word_length:
            continue
        is_cut = False
        if remove_citations and "[" in line:
            whole, line = line, CITATION.sub("", line)
            is_cut = line != whole  # a phrase may have come together
        if terminal_punctuation and (not line.endswith(LINE_ENDS) or line.endswith("...")):
            continue
        if len(words) < min_words_per_line:
            continue
        lowered = line.lower() if is_suspect or is_cut else ""
        if drop_lorem_ipsum and LOREM_IPSUM in lowered:
            return "lorem_ipsum"
        if drop_javascript and JAVASCRIPT in lowered:
            continue
        if drop_curly_bracket and "{" in line:
            return "curly_bracket"
        if lowered and drop_policies and any(phrase in lowered for phrase in POLICIES):
            continue
        if num_sentences < wanted_sentences:  # from then on it does not matter how many there are
            num_sentences += count_sentences(line)
        kept.append(line)
    if num_sentences < wanted_sentences:
        return "too_few_sentences"
    cleaned = "\n".join(kept).strip()
    return document if cleaned == text else replace(document, text=cleaned)


def c4_paragraphs(document: Document, *, min_paragraphs: NonNegativeInt = 3, min_characters: NonNegativeInt = 200) -> Document | str:
    """Drop a document with fewer than three lines of at least 200 characters (multilingual C4, c4_utils.py).

    Reason: too_few_paragraphs.
    """
    num_long = sum(len(line) >= min_characters for line in document.text.split("\n"))
    return "too_few_paragraphs" if num_long < min_paragraphs else document


def fineweb_quality(
    document: Document,
    *,
    min_lines_with_end: Fraction | None = 0.12,
    max_short_lines: Fraction | None = 0.67,
    short_line_characters: NonNegativeInt = 30,
    max_duplicate_line_characters: Fraction | None = 0.01,
    max_newlines_per_word: NonNegativeFloat | None = 0.3,
) -> Document | str:
    """Drop a document that is a list or a menu: few lines with terminal punctuation, short or repeated ones (FineWeb, 3.6).

    Lines that are blank are left out of the shares of lines. A short line has at most `short_line_characters`.
    Reasons: empty, few_lines_with_end, short_lines, duplicate_lines, many_newlines. Raises UserError if spaCy is not installed.
    """
    text = document.text
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if not lines:
        return "empty"
    if min_lines_with_end is not None and sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines) < min_lines_with_end:
        return "few_lines_with_end"
    if max_short_lines is not None and sum(len(line) <= short_line_characters for line in lines) / len(lines) > max_short_lines:
        return "short_lines"
    num_newlines = text.count("\n")
    if (
        max_duplicate_line_characters is not None
        and count_duplicates(lines)[1] / (len(text) - num_newlines) > max_duplicate_line_characters
    ):
        return "duplicate_lines"
    if max_newlines_per_word is not None and num_newlines / count_words(text) > max_newlines_per_word:
        return "many_newlines"
    return document


def bad_words(document: Document, *, paths: Paths, whole_words: bool = True) -> Document | str:
    """Drop a document that holds a word or phrase of a list (C4, section 2.2).

    paths: text files (.gz too) in UTF-8 with one word or phrase a line, compared in lower case. whole_words: only between
    characters that are no letter, digit or underscore; C4 turns this off for Japanese, Thai and Chinese.
    Reason: bad_word. Raises UserError if a list cannot be read or is empty.
    """
    first_words, wordless, pattern = _load_bad_words(as_tuple(paths), whole_words)
    lowered = document.text.lower()
    # To look up a text's words is much faster than to search for every phrase; the search then decides.
    if whole_words and not wordless and first_words.isdisjoint(WORD.findall(lowered)):
        return document
    return "bad_word" if pattern.search(lowered) else document


def blocked_urls(document: Document, *, paths: Paths, field: str = "url") -> Document | str:
    """Drop a document from a blocked domain, one of its subdomains, or a blocked URL.

    paths: text files (.gz too) in UTF-8, a domain or (with a slash behind the host) a URL a line; blank lines and those with
    # at the start say nothing. field: the metadata with the document's URL; a document without one stays. URLs are compared
    whole, without scheme, user, port, fragment and closing slash, the host in lower case. Reasons: blocked_domain, blocked_url.
    Raises UserError if a list cannot be read or is empty.
    """
    url = document.metadata.get(field)
    if not isinstance(url, str) or not url:
        return document
    domains, urls = _load_block_list(as_tuple(paths))
    host, rest = split_url(url)
    labels = host.split(".")
    if any(".".join(labels[start:]) in domains for start in range(len(labels))):
        return "blocked_domain"
    return "blocked_url" if host + rest in urls else document


def length(
    document: Document, *, min_characters: NonNegativeInt | None = None, max_characters: NonNegativeInt | None = None
) -> Document | str:
    """Drop a document with fewer or more characters than wanted. Reasons: too_short, too_long."""
    if min_characters is not None and len(document.text) < min_characters:
        return "too_short"
    if max_characters is not None and len(document.text) > max_characters:
        return "too_long"
    return document


def count_duplicates(parts: list[str]) -> tuple[int, int]:
    """How many parts were there before, and how many characters these have."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def split_url(url: str) -> tuple[str, str]:
    """The host in lower case (IDNA), and what stands behind it, less fragment and closing slash; a URL may lack its scheme."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host = (parts.hostname or "").rstrip(".")
    except ValueError:  # what is no URL is on no list
        return "", ""
    if not host.isascii():
        with suppress(UnicodeError):
            host = host.encode("idna").decode("ascii")
    query = f"?{parts.query}" if parts.query else ""
    return host, (parts.path + query).rstrip("/")


def _find_top_ngram(words: Words, num_characters: int, thresholds: Thresholds) -> str | None:
    """The reason, if the most frequent n-gram (of several, the first) with its spaces has too large a share of the text."""
    ends = np.concatenate([[0], np.cumsum(words.lengths)])
    top_pair = _count_top_pair(words)
    for n, most in thresholds:
        num_ngrams = len(words.words) - n + 1
        if num_ngrams < 1:
            continue
        longest = int((ends[n:] - ends[:-n]).max()) + n - 1
        # No n-gram is more frequent than the most frequent pair in it: this spares most texts the exact count.
        if (top_pair if n > 1 else num_ngrams) * longest / num_characters <= most:
            continue
        counts = Counter(zip(*(islice(words.words, start, None) for start in range(n)), strict=False))
        ngram, count = max(counts.items(), key=itemgetter(1))
        if len(" ".join(ngram)) * count / num_characters > most:
            return f"top_{n}_gram"
    return None


def _count_top_pair(words: Words) -> int:
    """How often the most frequent pair of neighbours occurs; 0 if there is no pair."""
    if len(words.words) < 2:
        return 0
    pairs = np.sort((words.numbers[:-1] << 32) | words.numbers[1:])
    starts = np.flatnonzero(pairs[1:] != pairs[:-1]) + 1
    return int(np.diff(starts, prepend=0, append=len(pairs)).max())


def _find_duplicate_ngrams(words: Words, num_characters: int, thresholds: Thresholds) -> str | None:
    """The reason, if n-grams that were there before have too large a share of the text.

    From the first word on: an n-gram that was there before is counted, and the next one looked at begins behind it. Two
    n-grams are equal if their words, written without spaces, are equal. Places are compared by hash first: equal n-grams
    have equal hashes, and the few places that share theirs with another are compared by their letters.
    """
    num_words = len(words.words)
    letters = np.frombuffer("".join(words.words).encode("utf-32-le"), dtype=np.uint32)
    powers, inverses = _power_tables(len(letters))
    ends = np.concatenate([[0], np.cumsum(words.lengths)])
    # The hash of what stands before each word: its letters' code points times powers of the base. What stands between two
    # words is their difference, times the inverse power of where it starts, so that it does not depend on the place.
    hashes = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(letters * powers)])[ends]
    scale = inverses[ends]
    for n, most in thresholds:
        num_ngrams = num_words - n + 1
        if num_ngrams < 2:
            continue
        keys = (hashes[n:] - hashes[:-n]) * scale[:num_ngrams]
        ordered = np.sort(keys)
        is_repeated = ordered[1:] == ordered[:-1]
        if not is_repeated.any():
            continue
        places = np.flatnonzero(np.isin(keys, ordered[1:][is_repeated]))
        if int((ends[places + n] - ends[places]).sum()) / num_characters <= most:
            continue
        seen: set[str] = set()
        num_duplicate, behind = 0, 0
        for place in places.tolist():
            if place < behind:
                continue
            ngram = "".join(words.words[place : place + n])
            if ngram in seen:
                num_duplicate += len(ngram)
                behind = place + n
            else:
                seen.add(ngram)
        if num_duplicate / num_characters > most:
            return f"duplicate_{n}_grams"
    return None


def _power_tables(num_characters: int) -> tuple[Any, Any]:
    """Powers of the base for each letter, and inverse powers for each place before, between and behind letters."""
    # Tables grow by doubling: those for long documents serve many lengths.
    size = max(TABLE_CHARACTERS, 1 << num_characters.bit_length())
    powers, inverses = _make_power_tables(size)
    return powers[:num_characters], inverses[: num_characters + 1]


@lru_cache(maxsize=1)
def _make_power_tables(size: int) -> tuple[Any, Any]:
    tables: list[Any] = []
    for base in (HASH_BASE, pow(HASH_BASE, -1, 1 << 64)):
        table = np.full(size + 1, base, dtype=np.uint64)
        table[0] = 1
        tables.append(np.cumprod(table))
    return tables[0], tables[1]


@lru_cache(maxsize=8)
def _load_bad_words(paths: tuple[str, ...], whole_words: bool) -> tuple[frozenset[str], bool, re.Pattern[str]]:
    """The first run of word characters of each phrase, whether a phrase has none, and the pattern that decides."""
    phrases = sorted({phrase.lower() for path in paths for phrase in read_list(path)})
    runs = [WORD.search(phrase) for phrase in phrases]
    either = "|".join(map(re.escape, phrases))
    pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)" if whole_words else either)
    return frozenset(run.group() for run in runs if run), None in runs, pattern


@lru_cache(maxsize=8)
def _load_block_list(paths: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """Blocked domains, and blocked URLs."""
    split = [split_url(entry) for path in paths for entry in read_list(path) if not entry.startswith("#")]
    return frozenset(host for host, rest in split if not rest), frozenset(host + rest for host, rest in split if rest)


def as_tuple(paths: Paths) -> tuple[str, ...]:
    """One path or several, always as several."""
    return (paths,) if isinstance(paths, str) else tuple(paths)


def read_list(path: str) -> list[str]:
    """The lines of a text file (.gz: unpacked), stripped, without blank ones. Raises UserError if there are none."""
    try:
        content = Path(path).read_bytes()
        if path.endswith(".gz"):
            content = gzip.decompress(content)
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list cannot be read ({error}); wanted UTF-8 text (or .gz of it), one entry a line.") from None
    entries = [line for line in lines if line]
    if not entries:
        raise UserError(f"{path}: the list is empty; give one with entries, or take the rule out of data.clean.")
    return entries


RULES: dict[str, Callable[..., Document | str]] = {
    rule.__name__: rule
    for rule in (gopher_repetition, gopher_quality, c4_quality, c4_paragraphs, fineweb_quality, bad_words, blocked_urls, length)
}
