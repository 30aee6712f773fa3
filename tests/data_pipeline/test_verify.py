"""That every flipped bit of a dataset is found, and what else is wrong with it is named."""

import random

import numpy as np
import pytest

from configs.durable import sha256_of_file
from data_pipeline.manifest import load_manifest, write_manifest
from data_pipeline.shards import Shard, ShardWriter
from data_pipeline.verify import dataset_bytes, verify_dataset


def test_whole_dataset_has_no_problem(folder):
    checked: list[int] = []
    assert verify_dataset(folder, checked.append) == []
    assert sum(checked) == dataset_bytes(load_manifest(folder)) + (folder / "tokenizer.json").stat().st_size


def test_every_flipped_bit_is_found(folder):
    """One random bit in each file of the dataset, one at a time: found, and the file named."""
    print("seed 11")
    chosen = random.Random(11)
    names = ["tokenizer.json"] + [name for split in load_manifest(folder).splits.values() for shard in split for name in shard.files]
    assert len(names) > 12
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        [problem] = verify_dataset(folder)
        assert problem.startswith(f"{name}: its SHA-256")
        path.write_bytes(whole)
    assert verify_dataset(folder) == []


def test_missing_and_cut_files_are_named(folder):
    name = load_manifest(folder).shards("train")[0].name
    (folder / f"{name}.bin").write_bytes(b"cut")
    (folder / f"{name}.documents.parquet").unlink()
    (folder / "tokenizer.json").unlink()
    problems = verify_dataset(folder)
    assert problems[0] == "tokenizer.json: missing" and len(problems) == 3
    assert problems[1].startswith(f"{name}.bin: 3 bytes") and problems[2] == f"{name}.documents.parquet: missing"


@pytest.mark.parametrize("suffix", ["bin", "idx", "documents.parquet"])
def test_a_missing_file_is_named_once(folder, suffix):
    name = f"{load_manifest(folder).shards('train')[0].name}.{suffix}"
    (folder / name).unlink()
    assert verify_dataset(folder) == [f"{name}: missing"]


def test_tokens_outside_the_vocabulary_are_found(folder):
    """Also where somebody wrote matching hashes for them."""
    manifest = load_manifest(folder)
    record = manifest.shards("train")[0]
    lengths = np.diff(Shard(folder / record.name).document_starts)
    with ShardWriter(folder / record.name, np.dtype(np.uint16)) as writer:
        for length in lengths:
            writer.add_document(np.full(length, manifest.vocabulary_size))
    files = {name: file.model_copy(update={"sha256": sha256_of_file(folder / name)}) for name, file in record.files.items()}
    shards = (record.model_copy(update={"files": files}), *manifest.shards("train")[1:])
    write_manifest(folder, manifest.model_copy(update={"splits": {**manifest.splits, "train": shards}}))
    assert verify_dataset(folder) == [
        f"{record.name}.bin: holds token ids outside the vocabulary of {manifest.vocabulary_size}",
        f"{record.name}.bin: a document does not end with the end-of-text token",
    ]
