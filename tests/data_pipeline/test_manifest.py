"""What the manifest promises."""

import gc
import shutil
import subprocess
import sys

import pytest

from configs.durable import sha256_of_file
from configs.errors import UserError
from data_pipeline.manifest import load_manifest, manifest_hash, write_manifest
from data_pipeline.shards import Shard
from tests.data_pipeline.tampering import assert_refused, update
from tests.tiny import write_tiny_dataset


@pytest.fixture(name="tiny")
def _tiny(tmp_path):
    """Without a build."""
    write_tiny_dataset(tmp_path / "tiny", num_documents=30)
    return tmp_path / "tiny"


def test_manifest_round_trip(folder):
    manifest = load_manifest(folder)
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before
    assert manifest_hash(folder) == sha256_of_file(folder / "manifest.json")


def test_what_is_read_equals_what_was_built(corpus, data_for, build):
    result = build(data_for(corpus))
    assert load_manifest(result.folder) == result.manifest
    assert load_manifest(result.folder) != result.manifest.model_copy(update={"inputs": result.manifest.inputs[1:]})


def test_totals_are_those_of_the_shards(folder):
    manifest = load_manifest(folder)
    for split in ("train", "held_out"):
        shards = [Shard(folder / record.name) for record in manifest.shards(split)]
        assert manifest.total(split).num_tokens == sum(shard.num_tokens for shard in shards) > 0
        assert manifest.total(split).num_documents == sum(shard.num_documents for shard in shards)


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no dataset is here.*pretrain data build"):
        load_manifest(tmp_path / "none")
    manifest = (folder / "manifest.json").read_bytes()
    for content in (b"", b"[]", b"{}", manifest[:-20], b"\xff"):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match="not a manifest"):
            load_manifest(folder)
    (folder / "manifest.json").write_bytes(manifest.replace(b'"format_version": 4', b'"format_version": 3'))
    with pytest.raises(UserError, match="format version 3, this program reads 4; build the dataset again into another data.root"):
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


COLUMNS = ["name", "source", "num_tokens", "num_documents", "num_bytes"]
REFUSED = {
    "no split": (update((), {"splits": []}), "splits: Input should be an object"),
    "a missing split": (update(("splits",), {"held_out": None}), "splits: held_out is missing"),
    "another split": (
        update(("splits",), {"more": {"columns": COLUMNS, "rows": []}}),
        "splits.more.*: Input should be 'train' or 'held_out'",
    ),
    "a missing key": (update((), {"dtype": None}), "dtype: Field required"),
    "another key": (update((), {"more": 1}), "more: Extra inputs are not permitted"),
    "a text for the vocabulary": (update((), {"vocabulary_size": "300"}), "vocabulary_size: Input should be a valid integer"),
    "a negative vocabulary": (update((), {"vocabulary_size": -1}), "vocabulary_size: Input should be greater than or equal to 0"),
    "a short hash of the tokenizer": (update((), {"tokenizer_sha256": "a"}), "tokenizer_sha256: String should match"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_content_of_another_form_is_refused_by_name(tiny, name):
    """Also where it is sealed: whoever wrote it, it is no manifest."""
    assert_refused(tiny, *REFUSED[name])


@pytest.mark.parametrize("is_enabled", [True, False])
def test_reading_leaves_the_search_for_garbage_as_it_was(tiny, is_enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        load_manifest(tiny)
        assert gc.isenabled() == is_enabled
        (tiny / "manifest.json").write_bytes(b"{}")
        with pytest.raises(UserError, match="not a manifest"):
            load_manifest(tiny)
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_what_training_imports_is_light():
    """`pretrain/` imports these three on every rank: no ray, no torch, no datasets comes with them."""
    code = (
        "import sys, data_pipeline.shards, data_pipeline.manifest, data_pipeline.tokenizer\n"
        "print([name for name in ('ray', 'torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
