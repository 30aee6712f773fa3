"""Entries of a trained tokenizer that are one token wherever they stand: in both engines, through a build, and part of what it is."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.data_section import TokenizerSection
from configs.errors import UserError
from data_pipeline import encoding
from data_pipeline.build import build_dataset
from data_pipeline.changes import describe_configuration
from data_pipeline.encoding import Encoder, check_ids, encode, open_encoder
from data_pipeline.execution import open_here
from data_pipeline.shards import Shard
from data_pipeline.stages import Progress
from data_pipeline.tokenizer import end_of_text_id, entry_id, load_tokenizer, tokenizer_hash, train_tokenizer, vocabulary_size

END = "<|endoftext|>"
ADDED = ("<|sep|>", "<a>", "<a><b>", "[a mark]")
TEXTS = ["the quick brown fox<|sep|>el zorro", "naïve 東京 🦊<a>x<a><b>", f"a text with {END} in it"] * 20


@pytest.fixture(scope="module", name="path")
def _path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 300, END, ADDED).to_str(), encoding="utf-8")
    return path


# --- training -----------------------------------------------------------------------------------------------


def test_they_are_the_last_entries_and_within_the_vocabulary(path: Path) -> None:
    tokenizer = load_tokenizer(path, END)
    assert vocabulary_size(tokenizer) == 300
    assert [tokenizer.token_to_id(token) for token in ADDED] == [296, 297, 298, 299]
    assert end_of_text_id(tokenizer, END) == 0
    with pytest.raises(ValueError, match="258 entries .* besides 2 added tokens"):
        train_tokenizer(TEXTS, 258, END, ADDED[:2])
    assert vocabulary_size(train_tokenizer(["ab"], 10_000, END, ADDED)) < 270


def test_what_is_trained_on_is_the_text_between_them() -> None:
    """No entry is spent on their spelling, and no pair is merged across them."""
    trained = train_tokenizer(["red<|sep|>rojo"] * 50, 320, END, ["<|sep|>"])
    plain = train_tokenizer(["red", "rojo"] * 50, 319, END)
    vocabulary = trained.get_vocab()
    assert vocabulary.pop("<|sep|>") == len(vocabulary)
    assert vocabulary == plain.get_vocab()
    assert train_tokenizer(TEXTS, 300, END).to_str() == train_tokenizer(TEXTS, 300, END, ()).to_str()


@given(parts=st.lists(st.one_of(st.sampled_from([*ADDED, END, " ", "\n", "<a", "<b>"]), st.text(max_size=5))))
def test_their_spelling_is_the_token_in_both_engines_and_comes_back(path: Path, parts: list[str]) -> None:
    text = "".join(part.encode("utf-8", "ignore").decode() for part in parts)
    encoder = open_encoder(path, tokenizer_hash(path), END, "fastokens")
    ids, _ = encode(encoder, [text])
    slow_ids, _ = encode(Encoder(encoder.reference, None), [text])
    assert np.array_equal(ids, slow_ids)
    assert encoder.reference.decode(ids.tolist(), skip_special_tokens=False) == text
    assert end_of_text_id(encoder.reference, END) not in ids, "a document cannot end itself"
    for token in ADDED:
        expected = text.replace("<a><b>", "\0").count(token) if token == "<a>" else text.count(token)
        assert np.count_nonzero(ids == encoder.reference.token_to_id(token)) == expected


def test_a_long_text_is_not_cut_inside_one(path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_encoder(path, tokenizer_hash(path), END, "fastokens")
    chosen = random.Random(seed)
    text = "".join(chosen.choices(["[a mark]", " fox", " the quick", "<|sep|>"], weights=[5, 1, 1, 1], k=2000))
    whole, _ = encode(encoder, [text])
    for name in ("PIECE_CHARACTERS", "FAST_PIECE_CHARACTERS"):
        monkeypatch.setattr(encoding, name, 500)
    for one in (encoder, Encoder(encoder.reference, None)):
        assert np.array_equal(encode(one, [text])[0], whole)


def test_where_the_engines_disagree_tokenizers_encodes_and_it_is_said(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fastokens that knows nothing of added tokens is stood in for by one that was given a tokenizer without them."""
    other = tmp_path / "tokenizer.json"
    other.write_text(path.read_text() + "\n")
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:1]
    blind = encoding.fastokens.Tokenizer.from_json_str(json.dumps(content))
    stand_in = type("Tokenizer", (), {"from_json_str": staticmethod(lambda text: blind)})
    monkeypatch.setattr(encoding.fastokens, "Tokenizer", stand_in)
    encoder = open_encoder(other, tokenizer_hash(other), END, "auto")
    assert encoder.fast is None and "finds other added tokens than tokenizers in '<|sep|>'" in encoder.fallback
    ids, _ = encode(encoder, ["a<|sep|>b"])
    assert encoder.reference.token_to_id("<|sep|>") in ids and check_ids(encoder, "a<|sep|>b", ids)
    with pytest.raises(UserError, match="other added tokens.*data.tokenizer.engine to auto or tokenizers"):
        open_encoder(other, tokenizer_hash(other), END, "fastokens")
    assert open_encoder(other, tokenizer_hash(other), END, "tokenizers").fallback == ""


def test_an_entry_is_found_by_its_text(path: Path) -> None:
    tokenizer = load_tokenizer(path, END)
    assert entry_id(tokenizer, "<a>", "objective.separator") == tokenizer.token_to_id("<a>")
    with pytest.raises(UserError, match=r"some.key: .* no entry '<c>' \(its added tokens: .*<a>.*\); add it to data.tokenizer"):
        entry_id(tokenizer, "<c>", "some.key")


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"added_tokens": ("<a>",), "path": "tokenizer.json"}, "path names one that is there"),
        ({"added_tokens": ("<a>", "<a>")}, "different from one another"),
        ({"added_tokens": (END,)}, "different from one another and from end_of_text"),
        ({"added_tokens": ("",)}, "printable ASCII"),
        ({"added_tokens": ("<é>",)}, "printable ASCII"),
        ({"added_tokens": (" a",)}, "without spaces at their ends"),
        ({"added_tokens": ("<a>", "<b>"), "vocabulary_size": 258}, "set it to 259 or more"),
    ],
)
def test_what_is_refused(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TokenizerSection.model_validate(section)


# --- through a build ----------------------------------------------------------------------------------------


@pytest.fixture(name="pairs")
def _pairs(tmp_path: Path) -> list[str]:
    """60 texts in a file of lines, one token between their halves; one text has it twice, one not at all."""
    texts = [f"word {number}<|sep|>palabra {number}" for number in range(58)] + ["one<|sep|>two<|sep|>three", "no separator"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.mark.parametrize("engine", ["fastokens", "tokenizers"])
def test_a_text_that_holds_one_becomes_the_token(tmp_path: Path, pairs: list[str], data_for: Any, build: Any, engine: str) -> None:
    settings = TokenizerSection(vocabulary_size=400, added_tokens=("<|sep|>",), engine=engine, checked_fraction=1.0)  # type: ignore[arg-type]
    result = build(data_for(tmp_path / "pairs.jsonl", tokenizer=settings))
    tokenizer = load_tokenizer(result.folder / "tokenizer.json", END)
    separator = tokenizer.token_to_id("<|sep|>")
    assert separator == result.manifest.vocabulary_size - 1
    found: dict[str, int] = {}
    for split in ("train", "held_out"):
        for record in result.manifest.shards(split):
            shard = Shard(result.folder / record.name)
            for number in range(shard.num_documents):
                *ids, _ = shard.document(number).tolist()
                found[tokenizer.decode(ids, skip_special_tokens=False)] = ids.count(separator)
    assert found == {text: text.count("<|sep|>") for text in pairs}


def test_they_are_part_of_what_a_dataset_is(tmp_path: Path, pairs: list[str], data_for: Any, build: Any) -> None:
    def data_with(*added: str) -> Any:
        return data_for(tmp_path / "pairs.jsonl", tokenizer=TokenizerSection(vocabulary_size=400, added_tokens=added))

    first = build(data_with("<|sep|>"))
    assert build(data_with("<|sep|>")).outcome == "unchanged"
    with pytest.raises(UserError, match="data.tokenizer.added_tokens"):
        build(data_with("<|sep|>", "<|mark|>"))
    before = first.manifest.tokenizer_sha256
    second = build(data_with("<|sep|>", "<|mark|>"), rebuild=True)
    assert second.manifest.tokenizer_sha256 != before
    assert load_tokenizer(second.folder / "tokenizer.json", END).token_to_id("<|mark|>") is not None


def test_a_build_says_when_it_falls_back(tmp_path: Path, pairs: list[str], data_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> None:
        raise ValueError("too new")

    monkeypatch.setattr(encoding.fastokens, "Tokenizer", type("Tokenizer", (), {"from_json_str": staticmethod(refuse)}))
    told: list[Progress] = []
    settings = TokenizerSection(vocabulary_size=390, added_tokens=("<|sep|>",))
    build_dataset(data_for(tmp_path / "pairs.jsonl", tokenizer=settings), told.append, open_here, False)
    said = [progress.detail for progress in told if progress.stage == "tokenizer"]
    assert said[-1] == "fastokens does not read this tokenizer (too new): tokenizers encodes, at a fraction of the speed"


def test_a_dataset_without_them_is_what_it_was_before_there_were_any(data_for: Any, tmp_path: Path) -> None:
    """So a dataset of an older version is still that of its run file."""
    assert "added_tokens" not in describe_configuration(data_for(tmp_path))["tokenizer"]
    with_some = data_for(tmp_path, tokenizer=TokenizerSection(added_tokens=("<a>",)))
    assert describe_configuration(with_some)["tokenizer"]["added_tokens"] == ["<a>"]
