"""What is shown of a dataset is what is in it, and what differs between two is found exactly."""

import json
import re

import pyarrow.parquet
import pytest

from configs.errors import UserError
from configs.schema import RuleSection, SourceSection, TokenizerSection
from data_pipeline.documents import identify_document, place_document
from data_pipeline.manifest import load_manifest
from data_pipeline.shards import Shard, read_spans
from data_pipeline.show import compare_datasets, find_document, sample_documents, show_dataset, split_pieces
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer

END = "<|endoftext|>"
SHORT = [f"short {number}" for number in range(9)]


@pytest.fixture
def two_sources(corpus, tmp_path, data_for):
    """A `data` section: 24 texts, and 20 rows with names and metadata of which 9 are short and one is unreadable."""
    rows = [{"text": text, "url": f"http://x/{number}", "lang": "en"} for number, text in enumerate(SHORT)]
    rows += [{"text": f"row {number} is\nlong enough to be kept", "url": f"http://y/{number}", "lang": "de"} for number in range(10)]
    rows_file = tmp_path / "rows" / "rows.jsonl"
    rows_file.parent.mkdir()
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n")
    sources = (
        SourceSection(name="texts", path=str(corpus)),
        SourceSection(name="rows", path=str(rows_file.parent), id_field="url", metadata_fields=("lang",)),
    )
    return data_for(corpus, sources=sources, clean=(RuleSection(rule=f"{__name__}:drop_short"),), quarantine_limit=0.1)


def drop_short(document, *, words=4):
    return document if len(document.text.split()) >= words else "too_short"


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    """Nothing here is about power cuts, and most of a small build is waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def test_summary_is_json_and_adds_up(two_sources, build):
    summary = show_dataset(build(two_sources).folder)
    assert json.loads(json.dumps(summary)) == summary
    for key in ("num_tokens", "num_documents", "num_bytes"):
        for split in ("train", "held_out"):
            parts = summary["splits"][split]
            assert parts[key] == sum(source[key] for source in parts["sources"].values())
        assert summary["total"][key] == sum(summary["splits"][split][key] for split in ("train", "held_out"))
        assert summary["total"][key] == sum(source[key] for source in summary["sources"].values())
    assert summary["documents"] == {"read": 44, "kept": 34, "dropped": {"too_short": 9}, "quarantined": {"not_an_object": 1}}
    assert [(name, source["read"], source["kept"], source["dropped"]) for name, source in summary["sources"].items()] == [
        ("texts", 24, 24, {}),
        ("rows", 20, 10, {"too_short": 9}),
    ]
    train = summary["splits"]["train"]
    assert summary["mixture"] == {name: round(source["num_tokens"] / train["num_tokens"], 6) for name, source in train["sources"].items()}
    assert sum(summary["mixture"].values()) == pytest.approx(1, abs=1e-5)
    assert [rule["rule"] for rule in summary["rules"]] == [f"{__name__}:drop_short"]
    assert summary["libraries"]["tokenizers"] and summary["inputs"]["num_files"] == 25


def test_examples_are_the_starts_of_real_documents(two_sources, corpus, build):
    folder = build(two_sources).folder
    examples = show_dataset(folder)["examples"]
    assert examples == show_dataset(folder)["examples"]
    assert [example["source"] for example in examples] == ["rows", "texts"]
    rows, texts = examples
    assert re.fullmatch(r"row \d is\nlong enough to be kept" + re.escape(END), rows["text"])
    assert (corpus / texts["file"]).read_bytes().decode().startswith(texts["text"]) and len(texts["text"]) > 100


def test_a_sample_is_what_the_shards_hold(two_sources, corpus, build):
    folder = build(two_sources).folder
    tokenizer = load_tokenizer(folder / "tokenizer.json", END)
    documents = sample_documents(folder, "texts", "train", 5, seed=1, num_tokens=10_000)
    assert len({document.document_id for document in documents}) == 5
    for document in documents:
        assert (document.source, document.split, document.name, document.metadata) == ("texts", "train", None, None)
        assert document.document_id == identify_document("texts", document.file, 0)
        assert document.ids == Shard(folder / document.shard).document(document.number).tolist()
        assert document.num_tokens == len(document.ids) == len(document.pieces)
        text = (corpus / document.file).read_bytes().decode()
        assert document.text == text + END and document.num_bytes == len(text.encode())
        assert document.pieces[-1] == document.last_piece == END
        if not any("\\x" in piece for piece in document.pieces):
            assert "".join(document.pieces) == document.text
    assert documents == sample_documents(folder, "texts", "train", 5, seed=1, num_tokens=10_000)
    assert documents != sample_documents(folder, "texts", "train", 5, seed=2, num_tokens=10_000)
    cut = sample_documents(folder, "texts", "train", 5, seed=1, num_tokens=7)
    assert [document.ids for document in cut] == [document.ids[:7] for document in documents]
    assert [document.text for document in cut] == [tokenizer.decode(document.ids[:7], skip_special_tokens=False) for document in documents]
    assert [(document.num_tokens, document.last_piece) for document in cut] == [(document.num_tokens, END) for document in documents]


def test_a_sample_is_drawn_evenly_and_ends_with_what_there_is(two_sources, build):
    """Every training document of a source comes with some seed, and a count above them all gives each once, with its facts."""
    folder = build(two_sources).folder
    manifest = load_manifest(folder)
    there = sum(shard.sources["rows"].num_documents for shard in manifest.shards("train") if "rows" in shard.sources)
    whole = sample_documents(folder, "rows", "train", 1000, seed=0, num_tokens=100)
    assert len(whole) == there > 3
    for document in whole:
        assert re.fullmatch(r"http://y/\d", document.name or "") and document.metadata == {"lang": "de"}
        assert document.position > 0 and document.file == "rows.jsonl"
    drawn = {sample_documents(folder, "rows", "train", 1, seed, 1)[0].document_id for seed in range(100)}
    assert drawn == {document.document_id for document in whole}
    every = sample_documents(folder, None, "train", 1000, seed=0, num_tokens=1)
    assert len(every) == manifest.total("train").num_documents
    held_out = sample_documents(folder, None, "held_out", 1000, seed=0, num_tokens=1)
    assert {document.document_id for document in (*every, *held_out)} == {
        identity
        for split in manifest.splits.values()
        for shard in split
        for identity in read_spans(folder / shard.name)["document_id"].to_pylist()
    }


def test_pieces_of_a_character_are_shown_as_bytes():
    tokenizer = train_tokenizer(["aaa bbb"], 300, END)
    ids = [*tokenizer.encode("é🦊 \n").ids, tokenizer.token_to_id(END)]
    assert split_pieces(tokenizer, ids) == ["\\xc3", "\\xa9", "\\xf0", "\\x9f", "\\xa6", "\\x8a", " ", "\n", END]


def test_every_byte_has_its_letter():
    tokenizer = train_tokenizer(["x"], 300, END)
    vocabulary = {number: piece for piece, number in tokenizer.get_vocab().items() if piece != END}
    pieces = split_pieces(tokenizer, sorted(vocabulary))
    assert {piece.encode() if len(piece) == 1 else bytes.fromhex(piece[2:]) for piece in pieces} >= {bytes([byte]) for byte in range(256)}


def test_a_document_is_found_by_its_id(two_sources, build):
    folder = build(two_sources).folder
    for split in ("train", "held_out"):
        for document in sample_documents(folder, None, split, 3, seed=4, num_tokens=9):
            assert find_document(folder, document.document_id, 9) == document
    with pytest.raises(UserError, match=r"none of its 34 documents has the id 0{24}.*dropped/\*\.jsonl"):
        find_document(folder, "0" * 24, 9)
    for wrong in ("", "0" * 23, "G" * 24):
        with pytest.raises(UserError, match="wanted 24 digits of 0 to 9 and a to f"):
            find_document(folder, wrong, 9)


def test_what_cannot_be_sampled_is_said(corpus, two_sources, data_for, build):
    folder = build(two_sources).folder
    with pytest.raises(UserError, match=r"no source 'text'; did you mean 'texts'\? it has: texts, rows\."):
        sample_documents(folder, "text", "train", 1, 0, 1)
    with pytest.raises(UserError, match=r"no source 'zzz'; it has: texts, rows\."):
        sample_documents(folder, "zzz", "train", 1, 0, 1)
    whole = build(data_for(corpus, root="whole", held_out_fraction=0.0)).folder
    with pytest.raises(UserError, match=r"mine has no document in held_out; it has 24 in train\."):
        sample_documents(whole, "mine", "held_out", 1, 0, 1)
    with pytest.raises(UserError, match="no dataset is here"):
        sample_documents(corpus, "mine", "train", 1, 0, 1)


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
