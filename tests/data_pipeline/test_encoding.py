"""Two engines, one set of ids: equal on odd texts, special tokens as text, long texts cut without a trace, and a guard that sees."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from configs.errors import UserError
from data_pipeline import encoding
from data_pipeline.encoding import Encoder, UncuttableError, check_ids, cut_text, encode, open_encoder
from data_pipeline.tokenizer import tokenizer_hash, train_tokenizer

END = "<|endoftext|>"
LETTERS = "abc XYZ 019 \n\t_.,'\"éß東京🦊\u0300\u200d\x00" + END


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["the quick brown fox, 12 times; naïve 東京 " * 50], 400, END).to_str(), encoding="utf-8")
    return path


@pytest.fixture
def encoder(tokenizer_path) -> Encoder:
    return open_encoder(tokenizer_path, tokenizer_hash(tokenizer_path), END, "fastokens")


def random_texts(seed: int, count: int) -> list[str]:
    chosen = random.Random(seed)
    pieces = [*LETTERS, END, "the", " quick", "don't", "  ", "\r\n"]
    return ["".join(chosen.choices(pieces, k=chosen.randrange(60))) for _ in range(count)]


def test_both_engines_give_the_same_ids(encoder, seed):
    texts = random_texts(seed, 3000)
    ids, offsets = encode(encoder, texts)
    slow_ids, slow_offsets = encode(Encoder(encoder.reference, None), texts)
    assert np.array_equal(ids, slow_ids)
    assert np.array_equal(offsets, slow_offsets)
    assert offsets[0] == 0 and offsets[-1] == ids.size and offsets.size == len(texts) + 1


def test_a_special_tokens_spelling_is_text(encoder):
    ids, _ = encode(encoder, [f"a{END}b"])
    assert encoder.reference.token_to_id(END) not in ids
    assert encoder.reference.decode(ids.tolist(), skip_special_tokens=False) == f"a{END}b"


def test_an_ordinary_added_token_is_found_by_both_engines(tmp_path):
    tokenizer = train_tokenizer(["some text"], 300, END)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    encoder = open_encoder(path, tokenizer_hash(path), END, "fastokens")
    ids, _ = encode(encoder, ["a <tool> b"])
    assert tokenizer.token_to_id("<tool>") in ids
    assert check_ids(encoder, "a <tool> b", ids)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "FAST_PIECE_CHARACTERS", 1000)


def test_a_long_text_is_cut_without_a_trace(encoder, seed, monkeypatch):
    text = " ".join(random_texts(seed, 400)) + " and the quick brown fox" + "x" * 3000 + " jumps over " * 200
    whole, _ = encode(encoder, [text])
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "FAST_PIECE_CHARACTERS", 1000)
    for one in (encoder, Encoder(encoder.reference, None)):
        pieces = list(cut_text(one, text))
        assert len(pieces) > 5 and "".join(pieces) == text
        assert [len(piece) for piece in pieces if len(piece) > 1000] == [len(piece) for piece in pieces if "x" * 3000 in piece]
        ids, offsets = encode(one, ["short", text, ""])
        assert np.array_equal(ids[int(offsets[1]) : int(offsets[2])], whole)


def test_a_text_without_a_place_to_cut(encoder, small_pieces):
    """Up to ten pieces long it is encoded whole, beyond it is refused."""
    ids, _ = encode(encoder, ["x" * 10_000])
    assert ids.tolist() == encoder.reference.encode("x" * 10_000).ids
    with pytest.raises(UncuttableError, match="no place to cut in 10000 characters behind character 0"):
        encode(encoder, ["x" * 10_001])


def test_a_tokenizer_that_merges_over_spaces_is_not_cut_there(monkeypatch):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")]))
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 10)
    assert list(cut_text(Encoder(tokenizer, None), "a b" * 30)) == ["a b" * 30]
    with pytest.raises(UncuttableError):
        list(cut_text(Encoder(tokenizer, None), "a b" * 40))


@pytest.mark.parametrize("length", [10, 60_000])
def test_the_guard_sees_one_differing_id(encoder, tokenizer_path, length):
    text = ("the quick brown fox " * 4000)[:length]
    ids, _ = encode(encoder, [text])
    assert check_ids(encoder, text, ids)
    if length == 10:
        wrong = ids.copy()
        wrong[-1] += 1
        assert not check_ids(encoder, text, wrong)
        assert not check_ids(encoder, text, ids[:-1])
    else:  # of a long text the start is encoded anew: only an engine that errs is seen
        other = train_tokenizer(["entirely different words"], 300, END)
        assert encoder.fast is not None
        assert not check_ids(Encoder(other, encoder.fast), text, ids)


def test_engines_and_what_they_cannot_read(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([END])
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    digest = tokenizer_hash(path)
    assert open_encoder(path, digest, END, "tokenizers").fast is None
    encoder = open_encoder(path, digest, END, "auto")
    ids, offsets = encode(encoder, ["a b", "a"])
    assert (ids.tolist(), offsets.tolist()) == ([0, 1, 0], [0, 2, 3])
    if encoder.fast is None:
        with pytest.raises(UserError, match="fastokens does not read this tokenizer"):
            open_encoder(path, digest, END, "fastokens")


def test_nothing_to_encode(encoder):
    ids, offsets = encode(encoder, [])
    assert ids.size == 0 and offsets.tolist() == [0]
