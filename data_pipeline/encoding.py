"""Texts to ids at the speed of fastokens, with the ids that tokenizers defines.

In: a `tokenizer.json` and batches of texts. Out: one flat row of ids and where each text starts in it. Two engines that
should agree are still two engines: `check_ids` encodes a text with tokenizers as well and refuses the first difference.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import fastokens
import numpy as np
from tokenizers import Tokenizer

from configs.errors import UserError
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

# What is encoded at once. tokenizers takes some 50 bytes of memory for each byte of it, fastokens about 5.
PIECE_CHARACTERS = 1_000_000
FAST_PIECE_CHARACTERS = 32_000_000
LONGEST_PIECES = 10  # so many times as long may a piece be where there is no place to cut
WINDOW_CHARACTERS = 200  # around a cut, encoded whole and in two parts to see that the cut changes nothing
CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W\d_])")  # between a letter or digit and a space or new line before a letter
CUT_TRIALS = 100
PROBED_TOKENS = 64  # of a tokenizer's added tokens, so many are tried out in both engines when it is opened
CHECKED_CHARACTERS = 20_000  # of a long text, its start is checked

Ids = np.ndarray[Any, np.dtype[np.uint32]]
Offsets = np.ndarray[Any, np.dtype[np.uint64]]


class UncuttableError(ValueError):
    """A text is too long to be encoded at once, and no place was found where cutting it leaves its ids as they are."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer in both engines."""

    reference: Tokenizer
    """Defines the ids."""
    fast: fastokens.Tokenizer | None
    """Gives the same ids sooner; None where it does not read this tokenizer, or was not asked for."""
    vocabulary_size: int = 0
    """Highest id + 1; asking the tokenizer takes longer than encoding a document."""
    end_of_text_id: int = 0
    fallback: str = ""
    """Why `fast` is None although engine was auto; the build says it."""


@lru_cache(maxsize=2)
def open_encoder(path: Path, sha256: str, end_of_text: str, engine: Literal["auto", "fastokens", "tokenizers"]) -> Encoder:
    """Load a tokenizer, once per process and content (`sha256`). Raises UserError: not usable, or not by the engine asked for.

    Where engine is auto, tokenizers encodes what fastokens does not read, or where it finds other added tokens in a text.
    """
    reference = load_tokenizer(path, end_of_text)
    fast, problem = None, ""
    if engine != "tokenizers":
        try:
            # From the settings that `load_tokenizer` made, not from the file: truncation is off, the end of text is special.
            fast = fastokens.Tokenizer.from_json_str(reference.to_str())
            if (text := _find_disagreement(Encoder(reference, fast))) is not None:
                fast, problem = None, f"fastokens finds other added tokens than tokenizers in {text!r}"
        except Exception as error:  # the library raises no narrower type
            problem = f"fastokens does not read this tokenizer ({error})"
        if problem and engine == "fastokens":
            raise UserError(f"{path}: {problem}; set data.tokenizer.engine to auto or tokenizers.")
    fallback = f"{problem}: tokenizers encodes, at a fraction of the speed" if problem else ""
    return Encoder(reference, fast, vocabulary_size(reference), end_of_text_id(reference, end_of_text), fallback)


def _find_disagreement(encoder: Encoder) -> str | None:
    """A text of added tokens, beside one another and among letters and spaces, that the two engines encode differently; None: all agree."""
    marks = [token.content for token in encoder.reference.get_added_tokens_decoder().values() if not token.special][:PROBED_TOKENS]
    texts = [f"{before}{mark}{behind}" for mark in marks for before in ("", "a", "a ", mark) for behind in ("", "b", " b", mark)]
    for text in [*texts, "".join(marks), " ".join(marks)] if marks else []:
        if not check_ids(encoder, text, _encode_piece(encoder, text)):
            return text
    return None


def encode(encoder: Encoder, texts: Sequence[str]) -> tuple[Ids, Offsets]:
    """Ids of all texts, one behind the other, and len(texts) + 1 places where each starts and the last ends.

    A special token's spelling is ordinary text, that of another added token is the token. A long text is cut where that changes no
    id. Raises UncuttableError.
    """
    if encoder.fast is not None and all(len(text) <= FAST_PIECE_CHARACTERS for text in texts):
        ids, offsets = encoder.fast.encode_batch_flat(list(texts), False, True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8")
    encoded = [np.concatenate([_encode_piece(encoder, piece) for piece in cut_text(encoder, text)]) for text in texts]
    offsets = np.zeros(len(texts) + 1, dtype=np.uint64)
    np.cumsum([ids.size for ids in encoded], out=offsets[1:])
    return np.concatenate(encoded) if encoded else np.empty(0, dtype=np.uint32), offsets


def check_ids(encoder: Encoder, text: str, ids: Ids) -> bool:
    """Whether tokenizers gives a text these ids; of a long text, its start is encoded by both engines anew."""
    if encoder.fast is None:
        return True
    if len(text) > CHECKED_CHARACTERS:
        text = text[:CHECKED_CHARACTERS]
        ids = _encode_piece(encoder, text)
    return encoder.reference.encode(text, add_special_tokens=False).ids == ids.tolist()


def cut_text(encoder: Encoder, text: str) -> Iterator[str]:
    """A text in pieces whose ids, laid end to end, are those of the text: of PIECE_CHARACTERS (with fastokens
    FAST_PIECE_CHARACTERS) at most, or as much longer as it takes to find a place to cut.

    The places are those of `CUT`, where every pre-tokenizer in use starts anew; that it does is tried out on
    `WINDOW_CHARACTERS` around each. Raises UncuttableError where a piece would be LONGEST_PIECES times as long.
    """
    size = PIECE_CHARACTERS if encoder.fast is None else FAST_PIECE_CHARACTERS
    start = 0
    while len(text) - start > size:
        end = None
        for first in range(start + size // 2, min(start + LONGEST_PIECES * size, len(text)), size // 2):
            if (end := _find_cut(encoder, text, first, min(first + size // 2, len(text)))) is not None:
                break
        if end is None and len(text) - start > LONGEST_PIECES * size:
            raise UncuttableError(f"no place to cut in {LONGEST_PIECES * size} characters behind character {start}")
        yield text[start:end]
        start = len(text) if end is None else end
    if start < len(text) or not text:
        yield text[start:]


def _find_cut(encoder: Encoder, text: str, low: int, high: int) -> int | None:
    places = [low + match.start() for match in CUT.finditer(text[low : high + 2])]
    for cut in reversed(places[-CUT_TRIALS:]):
        before, behind = text[cut - WINDOW_CHARACTERS : cut], text[cut : cut + WINDOW_CHARACTERS]
        parts = [*_encode_piece(encoder, before), *_encode_piece(encoder, behind)]
        if parts == _encode_piece(encoder, before + behind).tolist():
            return cut
    return None


def _encode_piece(encoder: Encoder, text: str) -> Ids:
    if encoder.fast is None:
        return np.array(encoder.reference.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
    return np.frombuffer(encoder.fast.encode_batch_flat([text], False, True)[0], dtype="<u4")
