"""Signatures: of what a text's words are, the same everywhere, and as near to the truth as the theory says."""

import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rensa import RMinHash

from configs.data_section import NearDuplicatesSection
from data_pipeline import minhash
from data_pipeline.minhash import NO_SHINGLES, band_hashes, has_words, hash_shingles, hash_words, signature_version, signatures

SETTINGS = NearDuplicatesSection()
TEXTS = st.text(alphabet=st.sampled_from("ab cd.\n\té ﬁ中文ทดÅ̊\U0001f600\ud800_9"), max_size=60)


def words_of(text: str) -> list[int]:
    return hash_words([text])[0].tolist()


def made_up(rng: random.Random, num_words: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(num_words)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello, World", "hello   world!"),
        ("snake_case", "snake case"),
        ("STRASSE", "straße"),
        ("\ufb01ne", "fine"),
        ("A\u030angstrom", "\u00c5ngstrom"),
        ("“quoted” — dashed", "quoted dashed"),
        ("中文", "中 文"),
        ("中文abc", "中 文 abc"),
        ("１２", "12"),
        ("\ud800broken\udfff", "broken"),
        ("\U000e0100x\U0010ffff", "x"),
    ],
)
def test_texts_of_the_same_words_look_the_same(first: str, second: str):
    assert words_of(first) == words_of(second) != []


@pytest.mark.parametrize(("first", "second"), [("ab", "ba"), ("a b", "ab"), ("a", "aa"), ("ab cd", "cd ab"), ("नमस्ते", "नमसत")])
def test_texts_of_other_words_look_different(first: str, second: str):
    assert words_of(first) != words_of(second)


def test_a_combining_mark_does_not_cut_a_word():
    assert len(words_of("नमस्ते")) == 1


def test_a_word_has_one_hash_wherever_it_stands():
    rng = random.Random(1)
    words = made_up(rng, 500)
    expected = dict(zip(words, words_of(" ".join(words)), strict=True))
    rng.shuffle(words)
    assert words_of("  ".join(words)) == [expected[word] for word in words]


def test_different_words_have_different_hashes():
    words = sorted(set(made_up(random.Random(2), 100_000)))
    assert len(set(words_of(" ".join(words)))) == len(words)


@given(st.lists(TEXTS, max_size=8), st.integers(1, 6))
def test_shingles_are_those_of_each_text_alone(texts: list[str], shingle_words: int):
    shingles, offsets = hash_shingles(*hash_words(texts), shingle_words)
    assert len(offsets) == len(texts) + 1 and offsets[-1] == len(shingles)
    for text, first, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        words = tuple(words_of(text))
        assert len(shingles[first:end]) == max(len(words) - shingle_words + 1, min(len(words), 1))
        assert shingles[first:end].tolist() == hash_shingles(*hash_words([text]), shingle_words)[0].tolist()


@given(st.lists(TEXTS, max_size=8))
def test_a_signature_does_not_depend_on_the_batch(texts: list[str]):
    together = signatures(texts, SETTINGS)
    assert together.shape == (len(texts), 128) and together.dtype == np.uint32
    for text, signature in zip(texts, together, strict=True):
        assert signatures([text], SETTINGS)[0].tolist() == signature.tolist()
        assert has_words(signature[None])[0] == bool(words_of(text))


@pytest.mark.parametrize("shingle_words", [1, 2, 5, 9])
@pytest.mark.parametrize("num_words", [0, 1, 4, 5, 6, 40, 3000])
def test_a_text_in_pieces_has_the_signature_of_the_whole(monkeypatch: pytest.MonkeyPatch, seed: int, num_words: int, shingle_words: int):
    settings = SETTINGS.model_copy(update={"shingle_words": shingle_words})
    text = " ".join(made_up(random.Random(seed), num_words)) + " " * 40
    whole = signatures(["first", text, ""], settings)
    monkeypatch.setattr(minhash, "BATCH_CHARACTERS", 37)
    assert signatures(["first", text, ""], settings).tolist() == whole.tolist()


def test_the_least_of_the_parts_signatures_is_that_of_the_whole(seed: int):
    """On which the signature of a long text rests, and which rensa does not promise in so many words."""
    rng = np.random.default_rng(seed)
    for num_permutations in (1, 7, 64, 100, 128, 256):
        for size in (1, 2, 10, 200, 5000):
            shingles = rng.integers(0, 1 << 64, size, dtype=np.uint64)
            offsets = np.concatenate([[0], np.sort(rng.integers(0, size + 1, 4)), [size]]).astype(np.uint64)

            def digest(bounds: np.ndarray, shingles: np.ndarray = shingles, count: int = num_permutations) -> np.ndarray:
                return np.array(RMinHash.digest_matrix_from_flat_token_hashes(shingles, bounds, count, 3).to_rows())

            assert digest(offsets).min(axis=0).tolist() == digest(offsets[[0, -1]])[0].tolist()


def test_no_words_and_few_words():
    found = signatures(["", "... !?", "\U0001f600", "one", "One!", "two", "one two", "one one one one one one one"], SETTINGS)
    assert (found[:3] == NO_SHINGLES).all() and not has_words(found[:3]).any()
    assert has_words(found[3:]).all()
    assert found[3].tolist() == found[4].tolist()
    assert all((found[3] != other).all() for other in found[5:])
    assert signatures(["same " * 5], SETTINGS).tolist() == signatures(["same " * 5000], SETTINGS).tolist()
    assert signatures([], SETTINGS).shape == (0, 128)


def test_the_estimate_is_near_the_truth(seed: int):
    rng = random.Random(seed)
    settings = SETTINGS.model_copy(update={"shingle_words": 1})
    truth, texts = [], []
    for _ in range(300):
        words = list(dict.fromkeys(made_up(rng, 400)))
        shared = int(len(words) * rng.random())
        half = (len(words) - shared) // 2
        texts += [" ".join(words[: shared + half]), " ".join(words[:shared] + words[shared + half :])]
        truth.append(shared / len(words))
    found = signatures(texts, settings)
    error = (found[::2] == found[1::2]).mean(axis=1) - np.array(truth)
    assert abs(error.mean()) < 0.01  # five standard errors of 300 estimates
    assert error.std() < 0.5 / 128**0.5


def test_signatures_are_the_same_in_every_process():
    """What it prints is pinned too: another value means that the normalisation's version must be raised."""
    program = (
        "from configs.data_section import NearDuplicatesSection as S\n"
        "from data_pipeline.minhash import *\n"
        "found = signatures(['The quick brown fox jumps over the lazy dog.', 'é 中文 two'], S())\n"
        "print(found[:, :2].tolist(), band_hashes(found, 16)[:, 0].tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("0", "12345")
    }
    assert printed == {"[[3259608517, 3348222491], [3779343085, 3773546949]] [7246884760841002684, 7979473799129820510]\n"}


def test_the_version_names_all_that_decides():
    assert signature_version().startswith("rensa-2/words-1/unicode-")


def test_the_seed_chooses_the_hash_functions():
    texts = ["one two three four five six seven"]
    assert (signatures(texts, SETTINGS) != signatures(texts, SETTINGS.model_copy(update={"seed": 2**32 - 1}))).all()


def test_bands_agree_where_all_their_rows_do(seed: int):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 1 << 32, (200, 128), dtype=np.uint32)
    second = first.copy()
    changed = rng.integers(0, 128, 200)
    second[np.arange(200), changed] += np.uint32(1)
    agree = band_hashes(first, 16) == band_hashes(second, 16)
    expected = np.ones((200, 16), dtype=bool)
    expected[np.arange(200), changed // 8] = False
    assert (agree == expected).all()
    assert len(np.unique(band_hashes(first, 16))) == 200 * 16
    with pytest.raises(ValueError, match="5 bands"):
        band_hashes(first, 5)


def test_a_long_text_takes_little_memory():
    text = "".join(f"w{number} " for number in range(700_000)) + "\U0001f600"
    signatures(["warm"], SETTINGS)
    tracemalloc.start()
    try:
        signatures([text], SETTINGS)
        assert tracemalloc.get_traced_memory()[1] < 20e6  # the text itself is of 22 MB
    finally:
        tracemalloc.stop()
