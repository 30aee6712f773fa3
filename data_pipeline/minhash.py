"""What a document's words look like in a few hundred bytes: its MinHash signature, and the hashes of its bands.

In: texts. Out: for each text `num_permutations` numbers of 32 bits. The share of equal numbers of two signatures estimates
the Jaccard similarity of the two sets of shingles (Broder 1997, "On the resemblance and containment of documents"); the
slots are filled in one pass over the shingles (Dahlgaard, Knudsen, Thorup 2017, "Fast Similarity Sketching", arXiv
1704.04370) by rensa, in Rust. A band is a run of consecutive numbers, and two documents are candidates when all numbers
of one band agree (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).

A text's words, for this purpose only: Unicode NFKC, case folded; letters, digits and combining marks are runs, all else
separates, so neither punctuation nor white space nor case tells two texts apart. In scripts that are written without
spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word. A shingle is `shingle_words` consecutive
words; a text with fewer is one shingle of all its words; a text without any has none, and resembles nothing.

Words and shingles are hashed in numpy, a batch at a time, without a Python object per word: making shingles as strings
takes many times as long as all that rensa does with them (`benchmarks/data_minhash.py`).
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module without stubs

from configs.data_section import NearDuplicatesSection

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
Places: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Signatures: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]

NORMALISATION_VERSION = 1
"""To be raised by whoever changes what a word, a shingle's hash or a band's hash is."""
NO_SHINGLES = 0xFFFFFFFF
"""What fills the signature of a text without words; no shingle gives it to every slot."""

# What is hashed at once, at some 30 bytes each; a longer text goes through in pieces. Four times as many fall out of the
# processor's cache, and NFKC may make 18 times as much of them.
BATCH_CHARACTERS = 1 << 16
SEPARATOR = "\n"

LAST_CODE = 0x323B0  # behind it Unicode has neither letters nor digits
SPACELESS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Burmese, Khmer
    *((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, LAST_CODE)),  # kana, Han
)
SEPARATES, JOINS, STANDS_ALONE = 0, 1, 2

# Odd numbers without pattern: the golden ratio's and those of MurmurHash3's and SplitMix64's finishers.
CHARACTER_BASE = 0x9E3779B97F4A7C15
WORD_BASE = 0xD6E8FEB86659FD93
MIXERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MODULUS = 1 << 64


def signature_version() -> str:
    """All that a signature depends on besides the text and the settings, for a fingerprint.

    Python's Unicode tables are part of it: they say what a letter is, and they differ between Python's versions.
    """
    return f"rensa-{int(RMinHash.ALGORITHM_VERSION)}/words-{NORMALISATION_VERSION}/unicode-{unicodedata.unidata_version}"


def signatures(texts: Sequence[str], settings: NearDuplicatesSection) -> Signatures:
    """The signature of each text: uint32 [number of texts, num_permutations], the same on every machine.

    A text without words has NO_SHINGLES in every slot. Memory: that of the result, and some 60 MB however long a text is.
    """
    result = np.full((len(texts), settings.num_permutations), NO_SHINGLES, dtype=np.uint32)
    for first, end in _batches(texts):
        if end - first == 1 and len(texts[first]) > BATCH_CHARACTERS:
            result[first] = _sign_long(texts[first], settings)
        else:
            words, ends = hash_words(texts[first:end])
            result[first:end] = _digest(*hash_shingles(words, ends, settings.shingle_words), settings)
    return result


def has_words(signatures: Signatures) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which signatures [n, num_permutations] are of texts that have words: bool [n]."""
    return (signatures != NO_SHINGLES).any(axis=1)


def band_hashes(signatures: Signatures, num_bands: int) -> Words:
    """The hash of each band of each signature: uint64 [n, num_bands] from uint32 [n, num_permutations].

    Raises ValueError when `num_bands` does not divide the permutations.
    """
    num_documents, num_permutations = signatures.shape
    if num_permutations % num_bands:
        raise ValueError(f"{num_bands} bands do not divide {num_permutations} permutations")
    rows = signatures.reshape(num_documents, num_bands, num_permutations // num_bands)
    result = np.zeros((num_documents, num_bands), dtype=np.uint64)
    for row in range(rows.shape[2]):
        result ^= rows[:, :, row]
        result *= np.uint64(MIXERS[0])
        result ^= result >> np.uint64(29)
    return _mix(result)


def hash_words(texts: Sequence[str]) -> tuple[Words, Places]:
    """The hashes of all words of all texts, in order, uint64 [words], and where each text's end among them, int64 [texts].

    A word is the polynomial of its characters' random numbers modulo 2^64, mixed; the sum runs over the whole batch and is
    divided by the power of the word's first place, so that a word has one hash wherever it stands.
    """
    plain = [_normalise(text) for text in texts]
    codes = np.frombuffer((SEPARATOR.join(plain) + SEPARATOR).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds_of_all, numbers_of_all = _characters()
    kinds = kinds_of_all.take(codes, mode="clip")
    joins = kinds == JOINS
    starts_word = kinds != SEPARATES
    starts_word[1:] &= ~(joins[1:] & joins[:-1])
    starts = np.flatnonzero(starts_word)
    text_ends = np.cumsum([len(text) + len(SEPARATOR) for text in plain], dtype=np.int64)
    if not len(starts):
        return np.zeros(0, dtype=np.uint64), np.zeros(len(texts), dtype=np.int64)
    powers, inverses = _powers(1 << (len(codes) - 1).bit_length())
    numbers = numbers_of_all.take(codes, mode="clip")
    numbers *= powers[: len(codes)]
    words = np.add.reduceat(numbers, starts)
    words *= inverses[starts]
    return _mix(words), np.searchsorted(starts, text_ends).astype(np.int64)


def hash_shingles(words: Words, ends: Places, shingle_words: int) -> tuple[Words, Places]:
    """The shingles of all texts, uint64 [shingles], and where each text's begin and end among them, int64 [texts + 1].

    In: what `hash_words` gives. A text of fewer words than a shingle has is filled up with words of hash 0.
    """
    lengths = np.diff(ends, prepend=0)
    missing = np.where((lengths > 0) & (lengths < shingle_words), shingle_words - lengths, 0)
    if missing.any():
        words = np.insert(words, np.repeat(ends, missing), np.uint64(0))
        lengths = lengths + missing
    num_shingles = np.maximum(lengths - (shingle_words - 1), 0)
    offsets = np.concatenate([[0], np.cumsum(num_shingles)])
    if not len(words):
        return words, offsets
    windows = len(words) - shingle_words + 1
    shingles = np.zeros(windows, dtype=np.uint64)
    for place in range(shingle_words):
        shingles += words[place : place + windows] * np.uint64(pow(WORD_BASE, place + 1, MODULUS))
    # A window that reaches into the next text is none: of every text with words all but the last few windows stay.
    first = np.cumsum(lengths) - lengths
    starts = np.repeat(first - offsets[:-1], num_shingles) + np.arange(int(offsets[-1]))
    return _mix(shingles[starts]), offsets


def _sign_long(text: str, settings: NearDuplicatesSection) -> Signatures:
    """The signature [num_permutations] of a text that is read in pieces.

    A slot is the least of what the shingles give it, so the slots of the whole are the least of those of the pieces; that
    rensa keeps to this is checked by a test.
    """
    overlap = settings.shingle_words - 1
    result = np.full(settings.num_permutations, NO_SHINGLES, dtype=np.uint32)
    waiting = np.zeros(0, dtype=np.uint64)  # words that begin shingles which end in the next piece
    signed = False
    for piece in _cut(text):
        waiting = np.concatenate([waiting, hash_words([piece])[0]])
        if len(waiting) > overlap:
            np.minimum(result, _sign_words(waiting, settings), out=result)
            waiting = waiting[len(waiting) - overlap :].copy()
            signed = True
    return result if signed or not len(waiting) else _sign_words(waiting, settings)


def _sign_words(words: Words, settings: NearDuplicatesSection) -> Signatures:
    return _digest(*hash_shingles(words, np.array([len(words)], dtype=np.int64), settings.shingle_words), settings)[0]


def _digest(shingles: Words, offsets: Places, settings: NearDuplicatesSection) -> Signatures:
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets.astype(np.uint64), settings.num_permutations, settings.seed)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(offsets) - 1, settings.num_permutations)


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Runs of texts [first, end) of about BATCH_CHARACTERS; a text that is cut into pieces stands alone."""
    first = characters = 0
    for index, text in enumerate(texts):
        if index > first and characters + len(text) > BATCH_CHARACTERS:
            yield first, index
            first, characters = index, 0
        characters += len(text)
    if first < len(texts):
        yield first, len(texts)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most BATCH_CHARACTERS, cut before a space or a line's end where there is one, so that words stay whole."""
    first = 0
    while first < len(text):
        end = first + BATCH_CHARACTERS
        if end < len(text):
            space = max(text.rfind(" ", first + 1, end), text.rfind("\n", first + 1, end))
            end = space if space > first else end
        yield text[first:end]
        first = end


def _normalise(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()


def _mix(values: Words) -> Words:
    """SplitMix64's finisher, in place: every bit of the input moves every bit of the output (Steele, Lea, Flood 2014)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(MIXERS[0])
    values ^= values >> np.uint64(27)
    values *= np.uint64(MIXERS[1])
    values ^= values >> np.uint64(31)
    return values


@cache
def _characters() -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Words]:
    """For each code point up to LAST_CODE: what it does between words (uint8), and its number (uint64; 0 where it separates)."""
    kinds = np.array([JOINS if unicodedata.category(chr(code))[0] in "LNM" else SEPARATES for code in range(LAST_CODE + 1)], np.uint8)
    for first, last in SPACELESS:
        part = kinds[first : last + 1]
        part[part == JOINS] = STANDS_ALONE
    kinds[LAST_CODE] = SEPARATES  # it stands for all that lie behind it
    numbers = _mix(np.arange(1, LAST_CODE + 2, dtype=np.uint64) * np.uint64(CHARACTER_BASE))
    numbers[kinds == SEPARATES] = 0
    return kinds, numbers


@cache
def _powers(size: int) -> tuple[Words, Words]:
    """The powers 0 to size - 1 of CHARACTER_BASE and of its inverse modulo 2^64."""
    base = np.full(size, CHARACTER_BASE, dtype=np.uint64)
    inverse = np.full(size, pow(CHARACTER_BASE, -1, MODULUS), dtype=np.uint64)
    base[0] = inverse[0] = 1
    return np.cumprod(base), np.cumprod(inverse)
