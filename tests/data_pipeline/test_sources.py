"""What is read, in which order, by whom."""

import gzip
import json
import os
import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data_section import DataSection, SourceSection
from configs.errors import UserError
from data_pipeline.documents import Document, Rejected, TokenDocument
from data_pipeline.input_file import InputFile
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import pack_units, plan_units, read_unit
from tests.data_pipeline.planning import NOWHERE, items_of, put, refused


def input_file(name: str, num_bytes: int, source: str = "mine") -> InputFile:
    return InputFile(source, "/texts", name, "text", num_bytes, "1", "text", None, (), None, num_bytes)


def test_units_are_packed_by_size_and_by_names(tmp_path):
    """No unit is larger than asked for (but for a file that is), none spans two sources, all but few are at least half full."""
    chosen = random.Random(5)
    files = [input_file(f"{number:03d}.txt", chosen.choice([0, 3, 10, 30, 70, 500])) for number in range(300)]
    files += [input_file("a.txt", 1, "other"), input_file("b.txt", 1, "other")]
    units = list(pack_units(files, 100))
    assert [file for unit in units for file in unit.files] == files
    assert [unit.index for unit in units] == list(range(len(units)))
    sizes = [sum(file.part_bytes for file in unit.files) for unit in units]
    assert all(size <= 100 or len(unit.files) == 1 for size, unit in zip(sizes, units, strict=True))
    assert [file.source for file in units[-1].files] == ["other", "other"] and units[-2].files[-1].source == "mine"
    assert list(pack_units(files, 100)) == units
    assert [len(unit.files) for unit in pack_units(files[:0], 100)] == []


@pytest.mark.parametrize(("num_files", "largest"), [(200, 100), (200, 400), (5000, 10)])
def test_a_change_of_one_file_changes_the_units_around_it(num_files, largest, seed):
    """A file is added, removed or grown: a handful of units change, the rest holds what it held."""
    chosen = random.Random(seed)
    num_changed: list[int] = []
    for _ in range(5 if num_files == 5000 else 30):
        files = [input_file(f"{chosen.randrange(10**9):09d}.txt", chosen.randrange(1, largest)) for _ in range(num_files)]
        files.sort(key=lambda file: file.name)
        at = chosen.randrange(num_files)
        grown = replace(files[at], num_bytes=files[at].num_bytes + 50, part_bytes=files[at].num_bytes + 50)
        added = input_file(files[at].name + "x", 50)
        before = {unit.files for unit in pack_units(files, 1000)}
        assert len(before) > 9
        for changed in ([*files[:at], added, *files[at:]], [*files[:at], *files[at + 1 :]], [*files[:at], grown, *files[at + 1 :]]):
            num_changed.append(sum(unit.files not in before for unit in pack_units(changed, 1000)))
    assert sum(num_changed) / len(num_changed) < 6, num_changed


@pytest.mark.parametrize("several", [False, True])
def test_hugging_face_folder(tmp_path, several):
    """Written by the library itself: a Dataset or a DatasetDict, in several files, read in ranges of rows."""
    import datasets

    texts = [f"row {number} " + "x" * 100 for number in range(300)]
    one = datasets.Dataset.from_dict({"body": texts, "n": list(range(300))})
    whole = datasets.DatasetDict({"test": one.select([5, 3]), "train": one}) if several else one
    whole.save_to_disk(str(tmp_path / "saved"), **({"num_shards": {"test": 1, "train": 3}} if several else {"num_shards": 2}))
    (tmp_path / "saved" / ("train" if several else "") / "cache-123.arrow").write_bytes(b"rows that were mapped")
    source = SourceSection(name="hub", path=str(tmp_path / "saved"), format="datasets", text_field="body")
    plan = plan_units(DataSection(root=str(NOWHERE), sources=(source,), work_unit_bytes=5_000))
    items = [item for unit in plan.units for item in read_unit(unit, 1000)]
    assert all(isinstance(item, Document) for item in items)
    assert [item.text for item in items if isinstance(item, Document)] == ([texts[5], texts[3]] if several else []) + texts
    assert len(plan.units) > len(plan.files) == (4 if several else 2)
    assert len({item.document_id for item in items if isinstance(item, Document)}) == len(items)
    assert plan.skipped == {".json": 5 if several else 2, ".arrow": 1}


def test_large_files_are_split_and_hashed_once(tmp_path):
    lines = "".join(json.dumps({"text": f"line {number}", "id": number}) + "\n" for number in range(400)).encode()
    put(tmp_path, a_DOT_jsonl=lines, b_DOT_jsonl_DOT_gz=gzip.compress(lines), c_DOT_jsonl=lines[:100])
    pq.write_table(pa.table({"text": ["row"] * 400, "id": range(400)}), tmp_path / "d.parquet", row_group_size=50)
    source = SourceSection(name="mine", path=str(tmp_path), id_field="id")
    whole, one, _ = items_of(source)
    items, plan, hashed = items_of(source, 1500)
    assert items == whole and len(items) == 400 * 3 + 4 and plan.files == one.files
    assert [file.part for file in plan.files] == [None] * 4
    parts = [file for unit in plan.units for file in unit.files]
    num_parts = Counter(file.name for file in parts)
    assert num_parts.pop("d.parquet") > 1 and num_parts == {"a.jsonl": -(-len(lines) // 1500), "b.jsonl.gz": 1, "c.jsonl": 1}
    assert len({unit.index for unit in plan.units}) == len(plan.units) > 10
    assert sum(num_bytes for _, _, num_bytes in hashed) == sum(file.num_bytes for file in plan.files)
    for name in ("b.jsonl.gz", "c.jsonl", "d.parquet"):
        content = (tmp_path / name).read_bytes()
        assert [told for told in hashed if told[0] == name] == [(name, sha256(content).hexdigest(), len(content))]


def test_a_file_that_changes_is_noticed(tmp_path):
    path = put(tmp_path, a_DOT_jsonl=b'{"text": "a"}\n{"text": "b"}\n') / "a.jsonl"
    unit = plan_units(DataSection(root=str(NOWHERE), sources=(SourceSection(name="mine", path=str(path)),))).units[0]
    assert len(list(read_unit(unit, 100))) == 2
    reading = read_unit(unit, 100)
    next(reading)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match="was changed while the build read it"):
        list(reading)
    with pytest.raises(UserError, match="was changed while the build read it"):
        list(read_unit(unit, 100))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(read_unit(unit, 100))


def test_only_damaged_files_are_rejected_not_refused(tmp_path):
    put(tmp_path, a_DOT_jsonl_DOT_gz=b"garbage", b_DOT_jsonl_DOT_zst=b"garbage", c_DOT_parquet=b"garbage", d_DOT_warc=b"garbage")
    items, _, hashed = items_of(SourceSection(name="mine", path=str(tmp_path), id_field="id"))
    assert [(item.file, item.reason) for item in items if isinstance(item, Rejected)] == [
        (name, "damaged_file") for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet", "d.warc")
    ]
    assert len(hashed) == 4


def write_pair(prefix: Path, *documents: list[int]) -> None:
    with ShardWriter(prefix, np.dtype(np.uint16)) as shard:
        for tokens in documents:
            shard.add_document(np.array(tokens))


def test_token_shards(tmp_path):
    write_pair(tmp_path / "a.b", [1, 2], [3])
    write_pair(tmp_path / "c", [4])
    for path in (tmp_path, tmp_path / "*", tmp_path / "*.bin"):
        items, plan, hashed = items_of(SourceSection(name="mine", path=str(path), format="megatron"), 1)
        assert [(item.file, item.position, item.tokens.tolist()) for item in items if isinstance(item, TokenDocument)] == [
            ("a.b.bin", 0, [1, 2]),
            ("a.b.bin", 1, [3]),
            ("c.bin", 0, [4]),
        ]
        both = (tmp_path / "c.idx").read_bytes() + (tmp_path / "c.bin").read_bytes()
        assert hashed[1] == ("c.bin", sha256(both).hexdigest(), len(both)) and plan.files[1].num_bytes == len(both)
        assert plan.skipped == {}
    assert [item.file for item in items_of(SourceSection(name="mine", path=str(tmp_path / "a.b"), format="megatron"))[0]] == ["a.b.bin"] * 2
    (tmp_path / "c.idx").write_bytes(b"")
    with pytest.raises(UserError, match="c.idx"):
        items_of(SourceSection(name="mine", path=str(tmp_path), format="megatron"))
    (tmp_path / "c.idx").unlink()
    assert "c.bin has no .idx" in refused(tmp_path, SourceSection(name="mine", path=str(tmp_path), format="megatron"))
    assert "set format: megatron" in refused(tmp_path, SourceSection(name="mine", path=str(tmp_path)))


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    put(tmp_path / "data", a_DOT_odd=b"a b", b_DOT_odd=b"c")
    put(tmp_path, my_words_DOT_py=b"def words(path, field):\n    yield from ({field: word} for word in path.read_text().split())\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def source(**keys) -> SourceSection:
        return SourceSection(name="mine", path=str(tmp_path / "data"), format="my_words:words", **keys)

    items, plan, _ = items_of(source(settings={"field": "text"}))
    assert [item.text for item in items if isinstance(item, Document)] == ["a", "b", "c"]
    assert plan.files[0].kind == "my_words:words" and len(plan.files[0].function_sha256) == 64
    assert "cannot be called with a local path and the settings" in refused(tmp_path, source(settings={"other": 1}))
    assert "no field 'text'; set text_field to one of: body" in refused(tmp_path, source(settings={"field": "body"}))
