"""What the manifest promises, and that every flipped bit is found."""

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.manifest import dataset_bytes, load_manifest, manifest_hash, verify_dataset, write_manifest
from data_pipeline.shards import Shard, ShardWriter


@pytest.fixture
def folder(corpus, data_for, build):
    return build(data_for(corpus)).folder


def test_manifest_round_trip(folder):
    manifest = load_manifest(folder)
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before
    assert manifest_hash(folder) == sha256_of_file(folder / "manifest.json")


def test_totals_are_those_of_the_shards(folder):
    manifest = load_manifest(folder)
    for split in ("train", "held_out"):
        shards = [Shard(folder / record.name) for record in manifest.shards(split)]
        assert manifest.total(split).num_tokens == sum(shard.num_tokens for shard in shards) > 0
        assert manifest.total(split).num_documents == sum(shard.num_documents for shard in shards)


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


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no dataset is here.*pretrain data build"):
        load_manifest(tmp_path / "none")
    manifest = (folder / "manifest.json").read_bytes()
    for content in (b"", b"[]", b"{}", manifest[:-20], b"\xff"):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match="not a manifest"):
            load_manifest(folder)
    (folder / "manifest.json").write_bytes(manifest.replace(b'"format_version": 3', b'"format_version": 1'))
    with pytest.raises(UserError, match="format version 1, this program reads 3"):
        load_manifest(folder)
    (folder / "manifest.json").write_bytes(manifest.replace(b'"kept": ', b'"kept": 1', 1))  # still a manifest, of another dataset
    with pytest.raises(UserError, match="does not have the SHA-256 that its last line says"):
        load_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"unfinished: \d work units.*pretrain data build"):
        load_manifest(folder)
    shutil.rmtree(folder / "units")
    with pytest.raises(UserError, match="no dataset is here"):
        manifest_hash(folder)


def test_what_training_imports_is_light():
    """`pretrain/` imports these three on every rank: no ray, no torch, no datasets comes with them."""
    code = (
        "import sys, data_pipeline.shards, data_pipeline.manifest, data_pipeline.tokenizer\n"
        "print([name for name in ('ray', 'torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
