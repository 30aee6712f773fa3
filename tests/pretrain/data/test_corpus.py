"""Opening a dataset: what fits is opened, what does not is refused in a sentence that says what to change."""

from pathlib import Path

import pytest

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.schema import RunConfig
from pretrain.data.corpus import open_corpus
from tests.tiny import tiny_texts, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "dataset"
    write_tiny_dataset(folder, num_documents=60, seed=3)
    return folder


def config(folder: Path, vocabulary_size: int = 300, sequence_length: int = 64) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"root": str(folder), "tokenizer": {"path": "unused"}},
            "model": {"vocabulary_size": vocabulary_size, "largest_context": 10**6},
            "training": {"sequence_length": sequence_length},
        }
    )


def test_opens_both_splits_and_names_what_they_are(dataset: Path) -> None:
    corpus = open_corpus(config(dataset))
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in tiny_texts(60, 3)[40:])
    assert corpus.identity == {"data": sha256_of_file(dataset / "manifest.json"), "tokenizer": sha256_of_file(dataset / "tokenizer.json")}
    for stream, num_documents in ((corpus.train, 40), (corpus.held_out, 20)):
        tokens = stream.read(0, len(stream))
        assert int((tokens == corpus.end_of_text).sum()) == num_documents
        assert tokens[-1] == corpus.end_of_text


def test_unfinished_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "units" / "00000").mkdir(parents=True)
    with pytest.raises(UserError, match="unfinished: 1 work units are there"):
        open_corpus(config(tmp_path))
    with pytest.raises(UserError, match="no dataset is here"):
        open_corpus(config(tmp_path / "nowhere"))


def test_a_vocabulary_larger_than_the_models_is_refused(dataset: Path) -> None:
    assert len(open_corpus(config(dataset, vocabulary_size=300)).train)
    with pytest.raises(UserError, match=r"token ids up to 299 and model\.vocabulary_size is 299; it must be at least 300"):
        open_corpus(config(dataset, vocabulary_size=299))


def test_too_few_tokens_are_refused_exactly_there(dataset: Path) -> None:
    num_tokens = len(open_corpus(config(dataset)).train)
    assert len(open_corpus(config(dataset, sequence_length=num_tokens - 1)).train) == num_tokens
    with pytest.raises(UserError, match=f"{num_tokens} tokens to learn from and one sample needs {num_tokens + 1}"):
        open_corpus(config(dataset, sequence_length=num_tokens))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "dataset", num_documents=30)
    (tmp_path / "dataset/units/00001/train.bin").unlink()
    with pytest.raises(UserError, match=r"00001/train\.bin: no such file"):
        open_corpus(config(tmp_path / "dataset"))
