"""What is read, in which order, by whom; and what is refused before anything starts."""

import gzip
import json
import os
import random
import sysconfig
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from configs.schema import DataSection, SourceSection
from data_pipeline.documents import Document, Rejected, TokenDocument
from data_pipeline.formats import InputFile
from data_pipeline.sampling import SAMPLED_UNITS, sample_texts
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import WorkUnit, find_files, pack_units, plan_units, read_unit

NOWHERE = Path("/nowhere")


def put(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def names(source: SourceSection, skipped: Counter[str] | None = None) -> list[str]:
    return [file.name for file in find_files(source, NOWHERE, Counter() if skipped is None else skipped)]


def test_files_are_found_sorted_and_the_rest_is_counted(tmp_path):
    put(
        tmp_path, b_DOT_txt=b"b", a__z_DOT_md=b"z", a__Z_DOT_TXT=b"Z", c_DOT_jsonl_DOT_gz=gzip.compress(b'{"text": "c"}'),
        d_DOT_png=b"d", e_DOT_txt_DOT_gz=b"e", LICENSE=b"f", _DOT_hidden=b"g", _DOT_git__h_DOT_txt=b"h",
    )  # fmt: skip
    skipped: Counter[str] = Counter()
    assert names(SourceSection(name="mine", path=str(tmp_path)), skipped) == ["a/Z.TXT", "a/z.md", "b.txt", "c.jsonl.gz"]
    assert skipped == {".png": 1, ".txt.gz": 1, "(none)": 1}
    assert names(SourceSection(name="mine", path=str(tmp_path), pattern="a/*")) == ["a/Z.TXT", "a/z.md"]
    assert len(names(SourceSection(name="mine", path=str(tmp_path), format="text"))) == 7


def test_links_are_counted_not_followed(tmp_path):
    outside = put(tmp_path / "outside", secret_DOT_txt=b"s")
    root = put(tmp_path / "root", a_DOT_txt=b"a", sub__b_DOT_txt=b"b")
    (root / "file.txt").symlink_to(outside / "secret.txt")
    (root / "folder").symlink_to(outside)
    (root / "inside.txt").symlink_to(root / "a.txt")
    (root / "dangling.txt").symlink_to(root / "none")
    for pattern in ("**/*", "*/*", "*"):
        skipped: Counter[str] = Counter()
        found = names(SourceSection(name="mine", path=str(root), pattern=pattern), skipped)
        assert not {"file.txt", "folder/secret.txt", "inside.txt"} & set(found)
        assert skipped["symlink"] >= 1
    (tmp_path / "link").symlink_to(root)  # the root itself may be a link: the user named it
    assert names(SourceSection(name="mine", path=str(tmp_path / "link"))) == ["a.txt", "sub/b.txt"]


def test_stdlib_without_installed_packages():
    found = names(SourceSection(name="stdlib", path="{stdlib}", pattern="**/*.py"))
    assert "abc.py" in found and "asyncio/__init__.py" in found and len(found) > 300
    assert not any("site-packages" in name or "dist-packages" in name for name in found)
    assert names(SourceSection(name="stdlib", path="{stdlib}/json")) == sorted(
        path.name for path in Path(sysconfig.get_path("stdlib"), "json").glob("*.py")
    )


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


def test_the_dataset_is_no_input(tmp_path):
    put(tmp_path, a_DOT_txt=b"a", built__units__00000__train_DOT_documents_DOT_parquet=b"p")
    plan = plan_units(DataSection(root=str(tmp_path / "built"), sources=(SourceSection(name="mine", path=str(tmp_path)),)))
    assert [file.name for file in plan.files] == ["a.txt"] and plan.skipped == {}


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


def refused(tmp_path: Path, *sources: SourceSection) -> str:
    with pytest.raises(UserError) as caught:
        plan_units(DataSection(root=str(NOWHERE), sources=sources))
    assert len(str(caught.value)) < 500 + len(str(tmp_path)) * 3
    return str(caught.value)


def test_refusals_name_what_to_change(tmp_path):
    def source(path: Path, **keys) -> SourceSection:
        return SourceSection(name="mine", path=str(path), **keys)

    assert "data.sources is empty" in refused(tmp_path)
    assert f"no {tmp_path / 'none'}" in refused(tmp_path, source(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "no file that matches '**/*'" in refused(tmp_path, source(tmp_path / "empty"))
    pictures = put(tmp_path / "pictures", a_DOT_png=b"a", b_DOT_png=b"b", c_DOT_gif=b"c")
    assert "found 2 .png, 1 .gif, wanted .txt" in refused(tmp_path, source(pictures))
    assert "set its format" in refused(tmp_path, source(pictures / "a.png"))
    assert "format: datasets" in refused(tmp_path, source(put(tmp_path / "hub", data_DOT_arrow=b"")))
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.txt").symlink_to(pictures / "a.png")
    assert "links are not followed" in refused(tmp_path, source(links))
    assert "are empty" in refused(tmp_path, source(put(tmp_path / "zero", a_DOT_txt=b"", b_DOT_txt=b"")))
    assert "cannot be used" in refused(tmp_path, source(pictures, pattern="/etc/*"))
    assert "wants the folder" in refused(tmp_path, source(pictures / "a.png", format="datasets"))
    assert "state.json" in refused(tmp_path, source(put(tmp_path / "no_state", state_DOT_json=b"{}"), format="datasets"))
    escaping = put(tmp_path / "escaping", state_DOT_json=b'{"_data_files": [{"filename": "../pictures/a.png"}]}')
    assert "not a file below" in refused(tmp_path, source(escaping, format="datasets"))
    os.mkdir(os.fsencode(tmp_path) + b"/odd")  # noqa: PTH102
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd/\xff.txt")).write_bytes(b"a")
    assert "is not UTF-8" in refused(tmp_path, source(tmp_path / "odd"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_missing_text_field_is_told_at_once(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), path)
    else:
        content = b'\n{"body": "a", "url": "b"}\n{"text": "c"}\n'
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    message = refused(tmp_path, SourceSection(name="mine", path=str(tmp_path)))
    assert "no field 'text'" in message and "body, url" in message and path.name in message


def test_the_same_file_twice_is_named(tmp_path):
    put(tmp_path, sub__a_DOT_txt=b"a")
    message = refused(
        tmp_path, SourceSection(name="one", path=str(tmp_path)), SourceSection(name="two", path=str(tmp_path / "sub" / "a.txt"))
    )
    assert str(tmp_path / "sub" / "a.txt") in message and "'one'" in message and "'two'" in message


def items_of(source: SourceSection, work_unit_bytes: int = 16_000_000, scratch: Path | None = None):
    """Everything a source gives, and the hashes told on the way."""
    plan = plan_units(DataSection(root=str(NOWHERE), sources=(source,), work_unit_bytes=work_unit_bytes))
    hashed: list[tuple[str, str, int]] = []
    told = lambda file, digest, num_bytes: hashed.append((file.name, digest, num_bytes))  # noqa: E731
    return [item for unit in plan.units for item in read_unit(unit, 10_000, scratch, told)], plan, hashed


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


def test_globs_and_file_urls(tmp_path):
    put(tmp_path, a__x_DOT_txt=b"x", a__y_DOT_md=b"y", b__z_DOT_txt=b"z", b__c__w_DOT_txt=b"w", b___DOT_h_DOT_txt=b"h", top_DOT_txt=b"t")
    assert names(SourceSection(name="mine", path=f"{tmp_path}/*/*.txt")) == ["a/x.txt", "b/z.txt"]
    assert names(SourceSection(name="mine", path=f"{tmp_path}/**/*.txt")) == ["a/x.txt", "b/c/w.txt", "b/z.txt", "top.txt"]
    assert names(SourceSection(name="mine", path=f"{tmp_path}/[b]*")) == ["b/c/w.txt", "b/z.txt"]
    assert names(SourceSection(name="mine", path=f"file://{tmp_path}/a")) == ["x.txt", "y.md"]
    assert "is listed twice" in refused(
        tmp_path, SourceSection(name="one", path=f"{tmp_path}/*/x.txt"), SourceSection(name="two", path=f"file://{tmp_path}/a/x.txt")
    )
    assert "no file that matches '*.nix'" in refused(tmp_path, SourceSection(name="one", path=f"{tmp_path}/*.nix"))
    assert "there is no folder" in refused(tmp_path, SourceSection(name="one", path=f"{tmp_path}/none/*.txt"))
    (tmp_path / "[odd].txt").write_bytes(b"o")  # what is there is meant, before any glob
    assert names(SourceSection(name="mine", path=f"{tmp_path}/[odd].txt")) == ["[odd].txt"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("key", ["id_field", "metadata_fields"])
def test_missing_fields_are_told_at_once(tmp_path, kind, key):
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"], "url": ["b"]}), tmp_path / "rows.parquet")
    else:
        put(tmp_path, a_DOT_jsonl=b"not json\n", rows_DOT_jsonl=b'{"text": "c", "url": "b"}\n')
    message = refused(tmp_path, SourceSection(name="mine", path=str(tmp_path), **{key: "uri" if key == "id_field" else ("url", "uri")}))
    if kind == "parquet":
        assert f"no field 'uri'; set {key} to one of: text, url" in message
    assert len(items_of(SourceSection(name="mine", path=str(tmp_path), metadata_fields=("url",)))[0]) == (1 if kind == "parquet" else 2)


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


def test_hub_data_sets_without_a_network(tmp_path):
    """The library's own json format: files are its shards, each a part."""
    for number in range(3):
        rows = [{"body": f"{number} {row}", "id": row, "date": None} for row in range(number + 1)] + [{"body": None, "id": 9, "date": 1}]
        put(tmp_path, **{f"{number}_DOT_jsonl": "\n".join(map(json.dumps, rows)).encode()})
    source = SourceSection(
        name="mine", path="json", format="hub", text_field="body", id_field="id", metadata_fields=("date",),
        settings={"data_files": str(tmp_path / "*.jsonl")},
    )  # fmt: skip
    items, plan, hashed = items_of(source)
    assert [item.text for item in items if isinstance(item, Document)] == ["0 0", "1 0", "1 1", "2 0", "2 1", "2 2"]
    assert [item.reason for item in items if isinstance(item, Rejected)] == ["not_text"] * 3
    assert [item.position for item in items[:3]] == [0, 1, 2**32] and items[0].name == "0"
    assert [file.part for unit in plan.units for file in unit.files] == [(0, 3), (1, 3), (2, 3)] and hashed == []
    assert [(file.root, file.name, file.kind) for file in plan.files] == [("json", "train", "hub")]
    os.utime(tmp_path / "0.jsonl", (1, 1))
    with pytest.raises(UserError, match="was changed"):
        list(read_unit(plan.units[0], 1000))
    assert "no field 'text'" in refused(tmp_path, source.model_copy(update={"text_field": "text"}))
    missing = SourceSection(name="mine", path="no/such-data", format="hub")
    assert "the hub data set 'no/such-data'" in refused(tmp_path, missing)


def test_secrets_are_refused(tmp_path):
    for settings in ({"key": "a"}, {"aws_secret_access_key": "a"}, {"client": {"password": "a"}}, {"hf_token": "a"}):
        assert "looks like a secret" in refused(tmp_path, SourceSection(name="mine", path="memory://x", settings=settings))
    for path in ("s3://me:word@bucket/x", "https://host/a.jsonl?X-Amz-Signature=1"):
        assert "looks like a secret" in refused(tmp_path, SourceSection(name="mine", path=path))


def test_a_sample_is_spread_over_the_units():
    def unit(index: int) -> WorkUnit:
        return WorkUnit(index, (input_file(f"{index}.txt", 10),))

    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def read(unit: WorkUnit):
        asked.append(unit.index)
        yield TokenDocument("mine", "a", 0, np.zeros(1))
        yield Document("mine", "a", 1, f"{unit.index:04d}")
        yield Rejected("mine", "a", 2, None, "empty", "", "")
        yield Document("mine", "a", 3, "é" * 10)

    for num_units in (0, 1, 10, SAMPLED_UNITS, 10_000):
        asked.clear()
        told.clear()
        texts = list(sample_texts(tuple(map(unit, range(num_units))), 2600, read, lambda done, size: told.append((done, size))))
        assert len(asked) == len(set(asked)) == min(num_units, SAMPLED_UNITS) == len(told)
        assert sum(len(text.encode()) for text in texts) <= 2600 and (not told or told[-1][1] <= 2600)
        if num_units == 10_000:
            assert asked[0] == 0 and asked[-1] > 9900 and max(np.diff(asked)) < 41
