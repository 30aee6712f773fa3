"""Tables of records: a row is the record that was written, and what is no table is refused by name."""

import copy
import json
import pickle
import shutil
import subprocess

import pytest

from data_pipeline import record_tables
from data_pipeline.manifest import load_manifest, write_manifest
from data_pipeline.records import Counts, FileRecord, InputRecord, PackingRecord, ShardRecord
from tests.data_pipeline.tampering import assert_refused, update
from tests.tiny import write_tiny_dataset


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


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq, which not every machine has")
def test_jq_makes_objects_of_the_rows(tiny):
    """As the module says."""
    (command,) = [line.strip() for line in record_tables.__doc__.splitlines() if line.strip().startswith("jq ")]
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


def set_row(place, value):
    """A change of a value of the second training shard."""

    def change(found):
        found["splits"]["train"]["rows"][1][place] = value

    return change


def edit(key, method, *arguments):
    """A change of the list of rows, or of columns, of the training shards."""
    return lambda found: getattr(found["splits"]["train"][key], method)(*arguments)


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
    "an input without a name": (
        update(("inputs",), {"columns": ["source", "bytes", "sha256"]}),
        "inputs: of its columns file is missing",
    ),
    "an input of a negative size": (lambda found: found["inputs"]["rows"][0].__setitem__(2, -1), "inputs: row 0: bytes is -1"),
    "no inputs": (update((), {"inputs": []}), 'inputs: not a table of "columns" and "rows"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_content_of_another_form_is_refused_by_name(tiny, name):
    """Also where it is sealed: whoever wrote it, it is no manifest."""
    assert_refused(tiny, *REFUSED[name])
