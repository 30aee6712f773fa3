"""Text to ids and back without loss, and no document that can end itself."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipeline.tokenizer import end_of_text_id, load_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size

END = "<|endoftext|>"
TEXTS = ["the quick brown fox", "a naïve 東京 🦊", "def f(x):\r\n    return x\0", f"a text with {END} in it"] * 5


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 300, END).to_str(), encoding="utf-8")
    return path


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
@example("\0")
@example("a\r\nb\r\n\n  ")
@example("👨‍👩‍👧‍👦 e\u0301 \ufeff \u2028")
@example(END)
@example(f" x{END}{END}\n")
def test_round_trip(path, text):
    tokenizer = load_tokenizer(path, END)
    [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert end_of_text_id(tokenizer, END) not in encoding.ids
    assert all(0 <= token < vocabulary_size(tokenizer) for token in encoding.ids)


def test_training_is_deterministic(path):
    assert train_tokenizer(iter(TEXTS), 300, END).to_str() == path.read_text(encoding="utf-8")


def test_small_corpus_gives_a_small_vocabulary():
    tokenizer = train_tokenizer(["ab"], 10_000, END)
    assert 257 <= vocabulary_size(tokenizer) < 300
    with pytest.raises(ValueError, match="256 bytes"):
        train_tokenizer(["ab"], 256, END)


def test_vocabulary_counts_added_tokens(path):
    tokenizer = load_tokenizer(path, END)
    before = vocabulary_size(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    assert vocabulary_size(tokenizer) == before + 1


def test_foreign_settings_cannot_lose_text(path, tmp_path):
    """Truncation, padding and an end token that is listed as ordinary: all stand in files that people share."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": END,
    }  # fmt: skip
    content["added_tokens"][0]["special"] = False
    foreign = tmp_path / "tokenizer.json"
    foreign.write_text(json.dumps(content), encoding="utf-8")
    text = f"a long text, longer than two tokens, with {END} inside"
    tokenizer = load_tokenizer(foreign, END)
    [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert encoding.ids == load_tokenizer(path, END).encode(text, add_special_tokens=False).ids


def test_what_is_refused(path, tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none.json", END)
    with pytest.raises(UserError, match=r"has no token '</s>'.*<|endoftext|>"):
        load_tokenizer(path, "</s>")
    for content in (b"{}", b"\xff\xfe", b"not json"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.json"):
            load_tokenizer(tmp_path / "bad.json", END)
    with pytest.raises(UserError, match="</s>"):
        end_of_text_id(load_tokenizer(path, END), "</s>")


def test_hash_knows_every_byte(path, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_bytes(path.read_bytes().replace(b'"version":"1.0"', b'"version":"1.0" '))
    assert tokenizer_hash(other) != tokenizer_hash(path)
