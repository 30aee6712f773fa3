"""What the manifest promises, and that every flipped bit is found."""

import copy
import gc
import json
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.sealed import seal, unseal
from data_pipeline import manifest as manifest_module
from data_pipeline.manifest import (
    Counts,
    FileRecord,
    InputRecord,
    PackingRecord,
    ShardRecord,
    dataset_bytes,
    load_manifest,
    manifest_hash,
    verify_dataset,
    write_manifest,
)
from data_pipeline.shards import Shard, ShardWriter
from tests.tiny import write_tiny_dataset


@pytest.fixture
def folder(corpus, data_for, build):
    return build(data_for(corpus)).folder


@pytest.fixture(name="tiny")
def _tiny(tmp_path):
    """Without a build: two inputs, and packed shards to learn from."""
    folder = tmp_path / "tiny"
    manifest = write_tiny_dataset(folder, num_documents=30)
    inputs = [InputRecord(source="sums", file=f"{number} — ü\n.jsonl", bytes=number, sha256=f"{number:064x}") for number in range(2)]
    shards = [pack(shard) for shard in manifest.shards("train")]
    write_manifest(folder, manifest.model_copy(update={"inputs": inputs, "splits": {**manifest.splits, "train": shards}}))
    return folder


def pack(shard):
    """Packs of two lengths, in the record alone."""
    files = {f"{shard.name}.packed-{length}.npy": FileRecord(bytes=length, sha256=f"{length:064x}") for length in (8, 16)}
    packings = {
        str(length): PackingRecord(num_packs=length, documents_cut=1, padding_tokens=2, documents_cut_when_chopped=3) for length in (8, 16)
    }
    return shard.model_copy(update={"files": shard.files | files, "packings": packings})


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


def test_a_row_is_the_record_that_was_written(tiny):
    """In everything that can be asked of it, and so is a copy."""
    manifest = load_manifest(tiny)
    written = [pack(shard) for shard in write_tiny_dataset(tiny.parent / "again", num_documents=30).shards("train")]
    shards = manifest.shards("train")
    assert len(shards) == len(written) == 2 and list(shards) == written and written == list(shards)
    assert shards[0] != shards[1] and shards[0] == shards[-2] and shards[1:] == (written[1],) and shards[2:] == ()
    with pytest.raises(IndexError):
        shards[2]
    for row, record in zip(shards, written, strict=True):
        for name in (*ShardRecord.model_fields, "source"):
            assert getattr(row, name) == getattr(record, name), name
        assert list(row.files) == list(record.files) and row.sha256_of(".idx") == record.sha256_of(".idx")
        assert row.num_packs(8) == record.num_packs(8) == 8
        assert row.model_dump() == record.model_dump() and repr(row) == repr(record)
        assert copy.copy(row) == copy.deepcopy(row) == pickle.loads(pickle.dumps(row)) == record
        for one in (row, record):
            with pytest.raises(KeyError):
                one.num_packs(32)
            with pytest.raises(KeyError):
                one.sha256_of(".packed-32.npy")
        assert not hasattr(row, "other")
    assert [record.bytes for record in manifest.inputs] == [0, 1] and manifest.inputs[1].file == "1 — ü\n.jsonl"
    assert list(manifest.shards("held_out")[0].packings) == []


def test_every_shard_is_a_line(tiny):
    lines = [line.strip().rstrip(",") for line in (tiny / "manifest.json").read_text().splitlines()]
    for shard in load_manifest(tiny).shards("train"):
        (line,) = [line for line in lines if shard.name in line]
        assert json.loads(line)[:3] == [shard.name, "sums", shard.num_tokens] and shard.sha256_of(".bin") in line


@pytest.mark.skipif(shutil.which("jq") is None, reason="no jq")
def test_jq_makes_objects_of_the_rows(tiny):
    """As the module says."""
    (command,) = [line.strip() for line in manifest_module.__doc__.splitlines() if line.strip().startswith("jq ")]
    lines = subprocess.run(command, shell=True, cwd=tiny, capture_output=True, text=True, check=True).stdout.splitlines()
    shards = load_manifest(tiny).shards("train")
    assert [json.loads(line)["name"] for line in lines] == [shard.name for shard in shards]
    assert [json.loads(line)[".bin sha256"] for line in lines] == [shard.sha256_of(".bin") for shard in shards]
    assert [json.loads(line)["16 padding_tokens"] for line in lines] == [2, 2]


def test_shards_that_one_table_cannot_hold_are_no_manifest(tiny):
    manifest = load_manifest(tiny)
    first, second = manifest.shards("train")
    half = Counts(num_tokens=1)
    for changes, what in (
        ({"files": dict(list(second.files.items())[1:])}, "has other files or packings than units/00000/train"),
        ({"files": {**second.files, "more": FileRecord(bytes=1, sha256="0" * 64)}}, "has other files or packings"),
        ({"packings": {}}, "has other files or packings"),
        ({"sources": {**second.sources, "other": half}}, "is not of one source"),
        ({"sources": {"sums": half}}, "is not of one source"),
    ):
        shards = (first, second.model_copy(update=changes))
        with pytest.raises(ValueError, match=f"units/00001/train {what}"):
            manifest.__class__(**{**dict(manifest), "splits": {**manifest.splits, "train": shards}})


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


def set_row(place, value):
    """A change of a value of the second training shard."""

    def change(found):
        found["splits"]["train"]["rows"][1][place] = value

    return change


def edit(key, method, *arguments):
    """A change of the list of rows, or of columns, of the training shards."""
    return lambda found: getattr(found["splits"]["train"][key], method)(*arguments)


def update(place, changes):
    """A change of a mapping inside the manifest; None: the key is taken away."""

    def change(found):
        for key in place:
            found = found[key]
        found |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del found[key]

    return change


COLUMNS = ["name", "source", "num_tokens", "num_documents", "num_bytes"]
HASH, TRAIN = "a" * 64, ("splits", "train")
REFUSED = {
    "a negative number": (set_row(2, -5), "splits.train: row 1: num_tokens is -5, not a whole number from 0 on"),
    "a text for a number": (set_row(3, "5"), "splits.train: row 1: num_documents is '5', not a whole number"),
    "a fraction": (set_row(4, 5.0), "row 1: num_bytes is 5.0, not a whole number"),
    "a number that is none": (set_row(5, True), "row 1: .bin bytes is True, not a whole number"),
    "nothing": (set_row(5, None), "row 1: .bin bytes is None"),
    "a number of sixty-five bits": (set_row(5, -(1 << 64)), "row 1: .bin bytes is -18446744073709551616"),
    "a number for a name": (set_row(0, 5), "row 1: name is 5, not a text"),
    "a list for a source": (set_row(1, ["sums"]), "row 1: source is \\['sums'\\], not a text"),
    "a hash in capitals": (set_row(6, HASH.upper()), f"row 1: .bin sha256 is '{HASH.upper()}', not 64 hexadecimal digits"),
    "a short hash": (set_row(6, HASH[:-1]), "row 1: .bin sha256 is 'a*', not 64 hexadecimal digits"),
    "a long hash": (set_row(6, HASH * 2), "row 1: .bin sha256 is 'a*', not 64 hexadecimal digits"),
    "a hash with a space": (set_row(6, HASH[:-2] + " a"), "row 1: .bin sha256 is 'a* a', not"),
    "a hash with spaces": (set_row(6, HASH[:-2] + "  "), "row 1: .bin sha256 is 'a*  ', not"),
    "a hash with another letter": (set_row(6, HASH[:-1] + "g"), "row 1: .bin sha256 is 'a*g', not"),
    "a hash with another digit": (set_row(6, HASH[:-1] + "٣"), "row 1: .bin sha256 is 'a*٣', not"),
    "a number for a hash": (set_row(6, 5), "row 1: .bin sha256 is 5, not"),
    "a negative number of packs": (set_row(-8, -1), "row 1: 8 num_packs is -1, not"),
    "a row of fewer values": (set_row(slice(7), []), r"splits.train: row 1 is not a list of \d+ values"),
    "a row of more values": (set_row(slice(0), [5]), "row 1 is not a list of"),
    "a text for a row": (edit("rows", "append", "x" * 25), "row 2 is not a list of"),
    "a number for a row": (edit("rows", "append", 5), "row 2 is not a list of"),
    "no column": (update(("splits", "held_out"), {"columns": []}), "splits.held_out: of its columns name is missing, source is missing"),
    "a missing column": (
        edit("columns", "remove", "num_tokens"),
        r"of its columns num_tokens is missing\)",
    ),
    "a missing column of a file": (edit("columns", "remove", ".bin bytes"), r"of its columns .bin bytes is missing\)"),
    "half a packing": (edit("columns", "remove", "8 documents_cut"), r"of its columns 8 documents_cut is missing\)"),
    "an unknown column": (edit("columns", "append", "more"), r"of its columns more is unknown\)"),
    "a column twice": (
        edit("columns", "extend", [".bin bytes", ".bin sha256"]),
        "of its columns the order is another",
    ),
    "columns in another order": (edit("columns", "reverse"), "of its columns the order is another"),
    "a column without a name": (edit("columns", "append", 5), "of its columns 5 is unknown"),
    "no table": (update(("splits",), {"train": []}), 'splits.train: not a table of "columns" and "rows"'),
    "a table without rows": (update(TRAIN, {"rows": None}), 'splits.train: not a table of "columns" and "rows"'),
    "a table with more": (update(TRAIN, {"more": 1}), 'splits.train: not a table of "columns" and "rows"'),
    "columns that are no list": (update(TRAIN, {"columns": "name"}), '"columns" and "rows" must be lists'),
    "rows that are no list": (update(TRAIN, {"rows": {}}), '"columns" and "rows" must be lists'),
    "no split": (update((), {"splits": []}), "splits: Input should be an object"),
    "a missing split": (update(("splits",), {"held_out": None}), "splits: held_out is missing"),
    "another split": (
        update(("splits",), {"more": {"columns": COLUMNS, "rows": []}}),
        "splits.more.*: Input should be 'train' or 'held_out'",
    ),
    "an input without a name": (
        update(("inputs",), {"columns": ["source", "bytes", "sha256"]}),
        "inputs: of its columns file is missing",
    ),
    "an input of a negative size": (lambda found: found["inputs"]["rows"][0].__setitem__(2, -1), "inputs: row 0: bytes is -1"),
    "no inputs": (update((), {"inputs": []}), 'inputs: not a table of "columns" and "rows"'),
    "a missing key": (update((), {"dtype": None}), "dtype: Field required"),
    "another key": (update((), {"more": 1}), "more: Extra inputs are not permitted"),
    "a text for the vocabulary": (update((), {"vocabulary_size": "300"}), "vocabulary_size: Input should be a valid integer"),
    "a negative vocabulary": (update((), {"vocabulary_size": -1}), "vocabulary_size: Input should be greater than or equal to 0"),
    "a short hash of the tokenizer": (update((), {"tokenizer_sha256": "a"}), "tokenizer_sha256: String should match"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_content_of_another_form_is_refused_by_name(tiny, name):
    """Also where it is sealed: whoever wrote it, it is no manifest."""
    change, what = REFUSED[name]
    found = unseal((tiny / "manifest.json").read_bytes())
    change(found)
    (tiny / "manifest.json").write_bytes(seal(found))
    with pytest.raises(UserError, match=rf"manifest.json: not a manifest \((splits.train: )?{what}"):
        load_manifest(tiny)


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
