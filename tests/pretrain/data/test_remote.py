"""A dataset by URL gives the very batches that the folder gives, through a cache that is smaller or larger than it."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.checksums import BLOCK_BYTES
from data_pipeline.manifest import MANIFEST, TOKENIZER, load_manifest, manifest_hash, write_manifest
from pretrain.build import build_with_progress
from pretrain.data import staging
from pretrain.data.batches import Batches, MicroBatch, held_out_batches
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.order import DataOrder
from pretrain.data.remote import described_in
from tests.pretrain.data.test_arriving import assert_equal
from tests.pretrain.data.test_samples import pack
from tests.tiny import write_shard, write_tiny_dataset

CPU = torch.device("cpu")
T, GLOBAL, END = 8, 12, 0


@pytest.fixture(name="dataset")
def _dataset(tmp_path: Path, seed: int) -> Path:
    """Two sources in four shards of some blocks, and a held-out one."""
    random = np.random.default_rng(seed)
    folder = tmp_path / "dataset"
    manifest = write_tiny_dataset(folder, num_documents=30)
    shards = []
    for number, source in enumerate(("web", "code", "web", "code", "web")):
        lengths = random.integers(2, 900, 150).tolist()
        documents = [np.append(random.integers(1, 50_000, length - 1), END) for length in lengths]
        shards.append(pack(folder, write_shard(folder, f"more/{number}", source, documents, "int32"), lengths))
    splits = {"train": tuple(shards[:4]), "held_out": tuple(shards[4:])}
    write_manifest(
        folder, manifest.model_copy(update={"dtype": "int32", "vocabulary_size": 50_000, "end_of_text_id": END, "splits": splits})
    )
    (folder / TOKENIZER).write_text("{}")
    return folder


@pytest.fixture(name="url")
def _url(dataset: Path) -> Iterator[str]:
    """The same in an object store."""
    store, url = MemoryFileSystem(), f"memory://{dataset.parent.name}/corpus"
    store.put(str(dataset), url.removeprefix("memory:/"), recursive=True)
    yield url
    store.rm(f"/{dataset.parent.name}", recursive=True)


def config_of(root: Path | str, cache: Path, packing: str = "chop", **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"root": str(root), "tokenizer": {"path": "unused"}, "cache": str(cache), **data},
            "model": {"vocabulary_size": 50_000},
            "training": {"sequence_length": T, "packing": packing, "global_batch_samples": GLOBAL, "micro_batch_samples": 2},
        }
    )


def feed(config: RunConfig, num_steps: int, start: int = 0) -> tuple[Corpus, list[MicroBatch]]:
    corpus = open_corpus(config)
    order = DataOrder(corpus.sources, config.mixture, config.training, config.run.seed)
    with closing(Batches(corpus, order, config.training, 1, 2, CPU, start)) as reader:
        found = [batch for _ in range(num_steps) for batch in reader.next_step()]
    return corpus, [*found, *held_out_batches(corpus.held_out, config.training, 64, 0, 1, CPU)]


@pytest.mark.parametrize("packing", ["chop", "best_fit"])
@pytest.mark.parametrize("cache_bytes", [3 * BLOCK_BYTES, 10**8])
def test_batches_by_url_are_those_of_the_folder(dataset: Path, url: str, tmp_path: Path, packing: str, cache_bytes: int) -> None:
    """Also of held-out text, from any step on, and by a second process that finds what the first has fetched."""
    there, cache = config_of(dataset, tmp_path / "no", packing), tmp_path / "cache"
    by_url = config_of(url, cache, packing, cache_bytes=cache_bytes)
    for start in (0, 5 * GLOBAL):
        (local, expected), (remote, found) = feed(there, 60, start), feed(by_url, 60, start)
        assert_equal(found, expected)
        assert remote.sources == local.sources
    assert sum(path.stat().st_blocks * 512 for path in (cache / manifest_hash(dataset)).iterdir()) <= cache_bytes


def test_with_room_for_all_each_block_is_fetched_once(dataset: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[str, int, int]] = []
    plain = staging._fetch_ranges

    def fetch(where: str, wanted: list[Any], *rest: Any) -> list[bytes]:
        ranges.extend((one.name, one.first, one.end) for one in wanted if one.first is not None)
        return plain(where, wanted, *rest)

    monkeypatch.setattr(staging, "_fetch_ranges", fetch)
    config = config_of(url, tmp_path / "cache")
    num_steps = sum(source.num_samples for source in open_corpus(config).sources) // GLOBAL + 1
    feed(config, num_steps)
    fetched = [(name, block) for name, first, end in ranges for block in range(first // BLOCK_BYTES, -(-end // BLOCK_BYTES))]
    sizes = {path.relative_to(dataset).as_posix(): path.stat().st_size for path in (dataset / "more").glob("*.bin")}
    assert sorted(fetched) == sorted((name, block) for name, size in sizes.items() for block in range(-(-size // BLOCK_BYTES)))
    ranges.clear()
    feed(config, num_steps)
    assert ranges == [], "the next start finds all of it"


def test_a_rank_without_held_out_text_has_batches_of_padding(dataset: Path, url: str, tmp_path: Path) -> None:
    """It takes part in the evaluation all the same, and asks the store for nothing."""
    local, remote = (open_corpus(config_of(root, tmp_path / "cache")).held_out for root in (dataset, url))
    training = config_of(url, tmp_path).training
    for rank in (0, 1):
        expected, found = (list(held_out_batches(one, training, 20_000, rank, 2, CPU)) for one in (local, remote))
        assert_equal(found, expected)
        assert (found[0].num_valid == 0) == (rank == 1)


def test_the_description_is_the_manifest_and_its_tokenizer(dataset: Path, url: str, tmp_path: Path) -> None:
    config = config_of(url, tmp_path / "cache")
    for _ in range(2):
        folder = described_in(config.data)
        assert folder.name == manifest_hash(dataset) and load_manifest(folder) == load_manifest(dataset)
        assert (folder / TOKENIZER).read_text() == "{}"
    assert described_in(config_of(dataset, tmp_path).data) == dataset


def test_what_is_not_there_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{url}/nothing/{MANIFEST}: there is no such file"):
        open_corpus(config_of(f"{url}/nothing", tmp_path / "cache"))
    fsspec.filesystem("memory").rm(f"{url}/more/2.bin")
    with pytest.raises(UserError, match="more/2.bin: there is no such file"):
        feed(config_of(url, tmp_path / "cache"), 200)


def test_closing_ends_the_wait_for_a_store_that_is_down(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread would try again for five minutes; a run that is asked to stop has no such time."""
    config = config_of(url, tmp_path / "cache")
    corpus = open_corpus(config)

    def fail(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", fail)
    reader = Batches(corpus, DataOrder(corpus.sources, config.mixture, config.training, 1), config.training, 0, 1, CPU)
    assert not reader.is_ready(0.3)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 5


def test_a_build_goes_into_a_folder(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"data.root is {url}, and `pretrain data build` needs a folder; give one with data.root=FOLDER"):
        build_with_progress(config_of(url, tmp_path).data, print)


@pytest.mark.parametrize("key", ["train_while_building", "verify_before_training"])
def test_what_needs_a_folder_is_refused(url: str, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="root is a URL: train_while_building and verify_before_training need a folder"):
        config_of(url, tmp_path, **{key: True})


def test_the_cache_is_below_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate({"data": {"root": "s3://bucket/web"}})
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert config.data.is_remote and config.data.cache_folder() == "/elsewhere/pretrain/staged"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert config.data.cache_folder() == str(Path.home() / ".cache/pretrain/staged")
    assert not RunConfig.model_validate({"data": {"root": "datasets/web"}}).data.is_remote
