"""What is shown of a dataset is what is in it, and what differs between two is found exactly."""

import json
import re

import pytest

from configs.data_section import SourceSection
from configs.errors import UserError
from data_pipeline.documents import identify_document
from data_pipeline.manifest import load_manifest
from data_pipeline.shards import Shard, read_spans
from data_pipeline.show import find_document, sample_documents, show_dataset, split_pieces
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer

END = "<|endoftext|>"
pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


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
    assert [rule["rule"] for rule in summary["rules"]] == ["tests.data_pipeline.rules:drop_short"]
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
            for source in (None, document.source):
                assert find_document(folder, document.document_id, source, 9) == document
            other = "rows" if document.source == "texts" else "texts"
            with pytest.raises(UserError, match=rf"none of \d+ documents of {other} has the id or the name '{document.document_id}'"):
                find_document(folder, document.document_id, other, 9)
    for wrong in ("0" * 24, "", "short", "http://x/1"):  # the last was dropped
        with pytest.raises(UserError, match=rf"none of 34 documents has the id or the name '{wrong}'.*dropped/\*\.jsonl"):
            find_document(folder, wrong, None, 9)
    with pytest.raises(UserError, match=r"no source 'row'; did you mean 'rows'"):
        find_document(folder, "http://y/1", "row", 9)


def test_a_document_is_found_by_its_name_where_no_id_is_so(tmp_path, data_for, build):
    """Names are the user's: two sources may share one, a source may use one twice, and one may look like an id, or be one."""
    identity = identify_document("one", "a.jsonl", 0)
    named = {"one": ["first", "shared", "f" * 24, identity, "twice", "twice"], "two": ["shared", *["many"] * 30]}
    for source, names in named.items():
        (tmp_path / source).mkdir()
        lines = [json.dumps({"text": f"{source} {number}", "id": name}) for number, name in enumerate(names)]
        (tmp_path / source / "a.jsonl").write_text("\n".join(lines))
    sources = tuple(SourceSection(name=source, path=str(tmp_path / source), id_field="id") for source in named)
    folder = build(data_for(tmp_path, sources=sources)).folder

    def text(wanted: str, source: str | None = None) -> str:
        return find_document(folder, wanted, source, 100).text.removesuffix(END)

    assert text("first") == text("first", "one") == text(identity) == "one 0"
    assert text("f" * 24) == "one 2"
    assert (text("shared", "one"), text("shared", "two")) == ("one 1", "two 0")
    for wanted, source, count in (("shared", None, 2), ("twice", None, 2), ("twice", "one", 2), ("many", "two", 30)):
        with pytest.raises(UserError, match=rf"{count} documents have the name '{wanted}'; give the id of one:") as caught:
            find_document(folder, wanted, source, 100)
        _, *lines = str(caught.value).splitlines()
        assert len(lines) == min(count, 11) and (count < 11 or lines.pop() == "  ... and 20 more")
        for line in lines:
            shown, place = line.strip().split("  ")
            document = find_document(folder, shown, source, 100)
            assert document.name == wanted
            assert place == f"source {document.source}, file {document.file}, position {document.position}"


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
