"""Opening a dataset: what fits is opened, what does not is refused in a sentence that says what to change."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.manifest import Manifest, load_manifest, write_manifest
from data_pipeline.tokenizer import tokenizer_hash
from pretrain.data.corpus import HeldOutSource, hash_segment, open_corpus
from tests.tiny import tiny_texts, write_shard, write_tiny_dataset


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


def write_sources(folder: Path, names: str, lengths: list[int]) -> tuple[Manifest, list[np.ndarray]]:
    """A tiny dataset whose training shards are these, one letter per shard naming its source; the tokens of each."""
    write_tiny_dataset(folder, num_documents=30)
    manifest = load_manifest(folder)
    tokens = [np.arange(sum(lengths[:number]), sum(lengths[: number + 1])) % 256 for number in range(len(lengths))]
    shards = [write_shard(folder, f"more/{number}", name, [tokens[number]]) for number, name in enumerate(names)]
    manifest = manifest.model_copy(update={"splits": {**manifest.splits, "train": tuple(shards)}})
    write_manifest(folder, manifest)
    return manifest, tokens


def test_opens_both_splits_and_names_what_they_are(dataset: Path) -> None:
    corpus = open_corpus(config(dataset))
    manifest = load_manifest(dataset)
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in tiny_texts(60, 3)[40:])
    assert corpus.held_out_sources == (HeldOutSource("sums", len(corpus.held_out), corpus.held_out_bytes),)
    assert corpus.tokenizer_sha256 == tokenizer_hash(dataset / "tokenizer.json")
    assert corpus.end_of_text == manifest.end_of_text_id
    (train,), (source,) = corpus.streams, corpus.sources
    assert (source.name, source.segments, source.num_samples) == ("sums", (len(train) // 64,), len(train) // 64)
    hashes = [sha256_of_file(dataset / f"units/{unit}/train.bin") for unit in ("00000", "00001")]
    assert source.identities[0] == sha256("".join(hashes).encode()).hexdigest() == hash_segment(manifest.shards("train"))
    for stream, split, num_documents in ((train, "train", 40), (corpus.held_out, "held_out", 20)):
        assert len(stream) == manifest.total(split).num_tokens  # type: ignore[arg-type]
        tokens = stream.read(0, len(stream))
        assert int((tokens[1:] == corpus.end_of_text).sum()) == num_documents
        assert tokens[0] == tokens[-1] == corpus.end_of_text


def test_every_source_is_a_stream_of_its_own_in_the_order_of_the_shards(tmp_path: Path) -> None:
    """Also when its shards do not stand together, and when it is too short for a sample."""
    manifest, tokens = write_sources(tmp_path / "data", "webwdw", [100, 7, 65, 90, 63, 31])
    corpus = open_corpus(config(tmp_path / "data"))
    shards = manifest.shards("train")
    places = {"w": [0, 3, 5], "e": [1], "b": [2], "d": [4]}
    assert [(source.name, source.num_samples) for source in corpus.sources] == [("w", 3), ("e", 0), ("b", 1), ("d", 0)]
    assert [source.identities[0] for source in corpus.sources] == [hash_segment([shards[place] for place in at]) for at in places.values()]
    for stream, at in zip(corpus.streams, places.values(), strict=True):
        expected = np.concatenate([tokens[place] for place in at])
        assert stream.read(0, len(stream)).tolist() == [corpus.end_of_text, *expected]


def test_the_hash_of_a_source_is_of_its_tokens_in_their_order(tmp_path: Path) -> None:
    """Not of what its files are called, of how many documents they hold, or of another source's."""
    first, second = np.arange(50), np.arange(50) + 1

    def shard(name: str, *documents: np.ndarray) -> str:
        return hash_segment([write_shard(tmp_path, name, "web", documents)])

    def shards(*parts: np.ndarray) -> str:
        return hash_segment([write_shard(tmp_path, f"s{number}", "web", [part]) for number, part in enumerate(parts)])

    assert shard("one", first) == shard("two/other", first) == shard("three", first[:20], first[20:]) != shard("four", second)
    assert shards(first, second) != shards(second, first)
    assert shards(first, second) != shards(first)


def test_unfinished_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "units" / "00000").mkdir(parents=True)
    with pytest.raises(UserError, match="unfinished: 1 work units are there"):
        open_corpus(config(tmp_path))
    with pytest.raises(UserError, match="no dataset is here"):
        open_corpus(config(tmp_path / "nowhere"))


def test_a_vocabulary_larger_than_the_models_is_refused(dataset: Path) -> None:
    assert len(open_corpus(config(dataset, vocabulary_size=300)).streams) == 1
    with pytest.raises(UserError, match=r"token ids up to 299 and model\.vocabulary_size is 299; it must be at least 300"):
        open_corpus(config(dataset, vocabulary_size=299))


def test_too_few_tokens_are_refused_exactly_there(tmp_path: Path) -> None:
    """Every token is a target: a sample of T needs T tokens, of one source."""
    write_sources(tmp_path / "data", "ab", [100, 80])
    corpus = open_corpus(config(tmp_path / "data", sequence_length=100))
    assert [source.num_samples for source in corpus.sources] == [1, 0]
    with pytest.raises(UserError, match="has 180 tokens to learn from in 2 sources and one sample needs 101 of one; add text, or lower"):
        open_corpus(config(tmp_path / "data", sequence_length=101))


def test_a_missing_shard_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "dataset", num_documents=30)
    path = tmp_path / "dataset/units/00001/train.bin"
    num_tokens = path.stat().st_size // 2
    path.unlink()
    (stream,) = open_corpus(config(tmp_path / "dataset")).streams
    assert stream.read(0, len(stream) - num_tokens).size == len(stream) - num_tokens + 1
    with pytest.raises(UserError, match=r"00001/train\.bin: no such file"):
        stream.read(0, len(stream) - num_tokens + 1)
