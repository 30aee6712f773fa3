"""How two datasets differ: what is told is so, and what differs is told."""

import copy
import json
import random
from typing import Any

import pyarrow.parquet
import pytest

from configs.data_section import RuleSection, TokenizerSection
from configs.errors import UserError
from data_pipeline.compare import compare_datasets, differing_keys
from data_pipeline.documents import identify_document, place_document
from data_pipeline.manifest import load_manifest
from data_pipeline.show import sample_documents, show_dataset

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


def test_equal_builds_do_not_differ(corpus, data_for, build):
    one, other = build(data_for(corpus)), build(data_for(corpus, root="other", workers=1))
    found = compare_datasets(one.folder, other.folder)
    assert json.loads(json.dumps(found)) == found
    assert found["equal"] and found["sha256"][0] == found["sha256"][1]
    for key in ("configuration", "libraries", "tokenizer", "dropped", "quarantined"):
        assert found[key] == {}, key
    num_shards = sum(len(shards) for shards in one.manifest.splits.values())
    assert found["shards"] == {"equal": num_shards, "only_in_a": 0, "only_in_b": 0}
    assert found["documents"]["in_both"] == 24 and sum(found["documents"].values()) == 24
    assert found["inputs"]["num_equal"] == 24


def test_changed_inputs_are_found_exactly(corpus, data_for, build):
    """One file goes, two come, one grows, one keeps its length; the tokenizer stays."""
    one = build(data_for(corpus)).folder
    tokenizer = TokenizerSection(path=str(one / "tokenizer.json"))
    files = sorted((corpus / "odd").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes() + b" and more")
    changed = bytearray(files[2].read_bytes())
    changed[:3] = b"abc"
    files[2].write_bytes(changed)
    (corpus / "odd" / "zz-new.txt").write_text("a new one")
    (corpus / "odd" / "zz-newer.txt").write_text("a newer one")
    other = build(data_for(corpus, root="other", tokenizer=tokenizer)).folder
    found = compare_datasets(one, other)
    assert not found["equal"]
    names = [f"mine:odd/{path.name}" for path in files]
    assert found["inputs"] == {
        "num_equal": 21,
        "only_in_a": [names[0]],
        "only_in_b": ["mine:odd/zz-new.txt", "mine:odd/zz-newer.txt"],
        "changed": names[1:3],
        "of_equal_size_in_other_parts": [],
    }
    assert set(found["configuration"]) == {"tokenizer.path", "tokenizer.vocabulary_size", "tokenizer.training_bytes"}
    assert found["tokenizer"] == {}
    documents = found["documents"]
    assert (documents["in_both"], documents["only_in_a"], documents["only_in_b"]) == (23, 1, 2)
    before, after = ({d.document_id: (d.num_tokens, d.num_bytes) for d in all_documents(folder)} for folder in (one, other))
    other_facts = [identity for identity in before if identity in after and before[identity] != after[identity]]
    assert documents["with_other_num_tokens_or_num_bytes"] == len(other_facts) >= 1
    assert identify_document("mine", f"odd/{files[1].name}", 0) in other_facts
    assert found["sources"] == {"mine": [show_dataset(folder)["sources"]["mine"] for folder in (one, other)]}
    shards = found["shards"]
    assert shards["equal"] >= 2 and shards["only_in_a"] >= 1 and shards["only_in_b"] >= 1
    reverse = compare_datasets(other, one)["documents"]
    assert (reverse["only_in_a"], reverse["only_in_b"]) == (2, 1)
    assert {key: reverse[key] for key in ("in_both", "in_other_split")} == {key: documents[key] for key in ("in_both", "in_other_split")}


def test_documents_that_change_their_split_are_counted(corpus, data_for, build):
    one, other = (build(data_for(corpus, root=f"split-{part}", held_out_fraction=part)).folder for part in (0.2, 0.6))
    found = compare_datasets(one, other)
    moved = [document for document in all_documents(one) if 0.2 <= place_document(document.document_id) < 0.6]
    assert found["documents"] == {
        "in_both": 24,
        "only_in_a": 0,
        "only_in_b": 0,
        "with_other_num_tokens_or_num_bytes": 0,
        "in_other_split": len(moved),
    }
    assert found["configuration"] == {"held_out_fraction": [0.2, 0.6]} and moved


def test_rules_and_counts_that_differ_are_named(two_sources, build, tmp_path):
    rule = two_sources.clean[0].rule
    longer = (RuleSection(rule=rule, settings={"words": 5}), RuleSection(rule=rule, settings={"words": 2}))
    one = build(two_sources).folder
    other = build(two_sources.model_copy(update={"clean": longer, "root": str(tmp_path / "other")})).folder
    turned = build(two_sources.model_copy(update={"clean": longer[::-1], "root": str(tmp_path / "turned")})).folder
    found = compare_datasets(one, other)
    assert [json.loads(rule["settings"])["settings"] for rule in found["rules"]["only_in_a"]] == [{}]
    assert [json.loads(rule["settings"])["settings"] for rule in found["rules"]["only_in_b"]] == [{"words": 5}, {"words": 2}]
    assert found["configuration"] == {} and found["dropped"] == {} and not found["rules"]["in_other_order"]
    assert compare_datasets(other, turned)["rules"] == {"only_in_a": [], "only_in_b": [], "in_other_order": True}
    without = build(two_sources.model_copy(update={"clean": (), "root": str(tmp_path / "without")})).folder
    found = compare_datasets(one, without)
    assert found["dropped"] == {"too_short": [9, None]}
    assert [one["kept"] for one in found["sources"]["rows"]] == [10, 19]
    assert found["documents"]["only_in_b"] == 9


def test_sources_are_compared_by_name_and_their_order_is_told(two_sources, build, tmp_path):
    texts, rows = two_sources.sources
    one = build(two_sources).folder
    turned = build(two_sources.model_copy(update={"sources": (rows, texts), "root": str(tmp_path / "turned")})).folder
    assert compare_datasets(one, turned)["configuration"] == {"sources": [["texts", "rows"], ["rows", "texts"]]}
    alone = build(two_sources.model_copy(update={"sources": (texts,), "root": str(tmp_path / "alone")})).folder
    found = compare_datasets(one, alone)
    assert list(found["configuration"]) == ["sources.rows"] and found["configuration"]["sources.rows"][1] is None
    assert found["sources"]["rows"][1] is None and found["inputs"]["only_in_a"] == ["rows:rows.jsonl"]
    lines = rows.model_copy(update={"name": "lines"})
    renamed = build(two_sources.model_copy(update={"sources": (texts, lines), "root": str(tmp_path / "renamed")})).folder
    assert compare_datasets(one, renamed)["configuration"] == {"sources.lines.name": ["rows", "lines"]}


def test_keys_differ_where_configurations_do(seed):
    """Of any configurations: nothing differs just where they are equal (a key without a value is as none), and no pair is equal."""
    chosen = random.Random(seed)

    def make(depth: int) -> Any:
        kind = chosen.choice(("mapping", "named", "list", "value") if depth else ("value",))
        below = [make(depth - 1) for _ in range(chosen.randrange(3))] if depth else []
        if kind == "mapping":
            return dict(zip("ab", below, strict=False))
        if kind == "named":
            return [{"name": chosen.choice("pqr"), "value": value} for value in below]
        return [{"value": value} for value in below] if kind == "list" else chosen.choice((0, "", "x", [], ["x"]))

    num_equal = 0
    for _ in range(5000):
        one, other = ({key: chosen.choice((None, make(2), make(2))) for key in "kl"} for _ in range(2))
        found, turned = differing_keys(one, other), differing_keys(other, one)
        assert (found == {}) == (one == other) == (turned == {}), (one, other)
        assert differing_keys(one, copy.deepcopy(one)) == {}
        assert all(left != right for left, right in found.values()), (one, other, found)
        num_equal += one == other
    assert num_equal > 10


def test_matched_by_name(seed):
    """Sources that are removed, added, renamed and shuffled: told are just these, and what was changed of the others."""
    chosen = random.Random(seed)
    for _ in range(300):
        before = [{"name": f"s{number}", "path": f"p{number}", "settings": {"split": number}} for number in range(6)]
        now = copy.deepcopy(before)
        removed, renamed, changed = chosen.sample(now, 3)
        renamed["name"], changed["settings"] = "new", {"split": "other"}
        now.remove(removed)
        added = {"name": "added", "path": "p", "settings": {}}
        now.insert(chosen.randrange(6), added)
        old_name = f"s{renamed['path'][1:]}"
        number = int(changed["path"][1:])
        wanted = {
            f"sources.{removed['name']}": [removed, None],
            "sources.added": [None, added],
            "sources.new.name": [old_name, "new"],
            f"sources.s{number}.settings.split": [number, "other"],
        }
        assert differing_keys({"sources": before}, {"sources": now}) == wanted
        now.append(now.pop(next(place for place, source in enumerate(now) if source["name"] != "added")))
        in_order = [source["name"] for source in now if source["name"] != "added"]
        assert differing_keys({"sources": before}, {"sources": now}).keys() - wanted.keys() == {"sources"}, in_order


def test_damage_is_said_and_not_compared(corpus, data_for, build, tmp_path):
    one = build(data_for(corpus)).folder
    other = build(data_for(corpus, root="other", tokenizer=TokenizerSection(vocabulary_size=300, training_bytes=50_000))).folder
    assert compare_datasets(one, other)["shards"]["equal"] == 0
    sidecar = other / f"{load_manifest(other).shards('train')[0].name}.documents.parquet"
    whole = pyarrow.parquet.read_table(sidecar)
    pyarrow.parquet.write_table(whole.slice(1), sidecar)
    with pytest.raises(UserError, match="other numbers of documents than its manifest"):
        compare_datasets(one, other)
    sidecar.write_bytes(sidecar.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"documents.parquet: cannot be read as parquet.*data verify"):
        compare_datasets(one, other)
    with pytest.raises(UserError, match="no dataset is here"):
        compare_datasets(one, tmp_path / "none")


def all_documents(folder):
    return [document for split in ("train", "held_out") for document in sample_documents(folder, None, split, 10_000, 0, 1)]
