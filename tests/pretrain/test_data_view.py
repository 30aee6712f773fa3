"""What `data show`, `sample`, `diff`, `rules` and `verify` print is what is so; and how they end."""

import json
import random
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.manifest import FORMAT_VERSION, load_manifest
from pretrain import cli
from pretrain.data_view import tell_document
from pretrain.page import Page
from tests.pretrain.verbs import Run


def test_show_prints_what_json_says(run: Run) -> None:
    run("build", "run.yaml")
    found = json.loads(run("show", "run.yaml", "--json").out)
    shown = run("show", "run.yaml").out
    assert found["documents"] == {"read": 14, "kept": 11, "dropped": {"too_short": 2}, "quarantined": {"not_an_object": 1}}
    assert shown.startswith(f"shards, format {FORMAT_VERSION}, manifest {found['sha256'][:16]}\n")
    assert "rules      1. shown_rules:drop_short(words=4) [source " in shown
    for name, share in found["mixture"].items():
        assert re.search(rf"^{name} .* {100 * share:.2f}$", shown, re.MULTILINE)
    train = found["splits"]["train"]
    assert re.search(rf"^train +{train['num_shards']} +{train['num_documents']} .* {train['bytes_per_token']}$", shown, re.MULTILINE)
    assert "too_short              2  dropped      dropped/too_short.jsonl" in shown
    assert "a row with number" in shown and "on what is so␊\n" in shown


def test_show_tells_what_each_packing_does(place: Path, run: Run) -> None:
    """For both lengths that were packed, over the training shards of both sources."""
    run("build", "run.yaml", "data.packed_lengths=[16,1024]")
    shards = load_manifest(place / "shards").shards("train")
    assert {name for shard in shards for name in shard.sources} == {"notes", "rows"}
    num_documents = sum(shard.num_documents for shard in shards)
    report = json.loads((place / "shards" / "report.json").read_text())["packings"]
    by_source = json.loads(run("show", "shards", "--json").out)["sources"]
    shown = run("show", "shards").out.splitlines()
    (head,) = [number for number, line in enumerate(shown) if re.match("length +packing +samples +documents +cut +% cut +% padding$", line)]
    table = shown[head + 1 :]
    for length, rows in (("16", table[:2]), ("1024", table[2:4])):
        records = [shard.packings[length] for shard in shards]
        packed = {
            "num_samples": sum(one.num_packs for one in records),
            "documents_cut": sum(one.documents_cut for one in records),
            "padding_tokens": sum(one.padding_tokens for one in records),
        }
        tokens = [sum(shard.num_tokens for shard in shards if name in shard.sources) for name in by_source]
        cut = sum(one.documents_cut_when_chopped for one in records)
        chopped = {"num_samples": sum(of // int(length) for of in tokens), "documents_cut": cut, "padding_tokens": 0}
        for row, (packing, counts) in zip(rows, (("best_fit", packed), ("chop", chopped)), strict=True):
            one = report[length][packing]
            for key, count in {**counts, "num_documents": num_documents}.items():
                assert one[key] == count == sum(source["packings"][length][packing][key] for source in by_source.values())
            shares = counts["documents_cut"] / num_documents, counts["padding_tokens"] / max(1, counts["num_samples"] * int(length))
            assert (one["share_of_documents_cut"], one["share_of_padding"]) == shares
            numbers = [f"{int(length):,}", packing, *(f"{one[key]:,}" for key in ("num_samples", "num_documents", "documents_cut"))]
            assert row.split() == [*numbers, *(f"{100 * share:.2f}" for share in shares)]
    run("build", "run.yaml", "data.root=unpacked")
    assert "packing" not in run("show", "unpacked").out


def test_a_sample_marks_tokens_and_names_the_document(run: Run) -> None:
    run("build", "run.yaml")
    arguments = ("sample", "shards", "--source", "rows", "--count", "2", "--seed", "3")
    found = json.loads(run(*arguments, "--json").out)
    shown = run(*arguments).out
    assert shown == run(*arguments).out and len(found) == 2
    for document, text in zip(found, shown.split("\n\n"), strict=True):
        lines = text.strip("\n").splitlines()
        assert lines[:5] == [
            f"document  {document['document_id']}, number {document['number']} of {document['shard']} (train)",
            f"source    rows, file a.jsonl, position {document['position']}",
            f"name      {document['name']}",
            'metadata  {"lang": "en"}',
            f"tokens    {document['num_tokens']} for {document['num_bytes']} bytes of text",
        ]
        assert lines[5:] == ["|".join(document["pieces"])] and document["pieces"][-1] == "<|endoftext|>"
        one = ("sample", "shards", "--document", document["document_id"])
        assert run(*one).out == text.strip("\n") + "\n"
        cut = run(*one, "--tokens", 3).out.splitlines()[-1]
        assert cut == "|".join(document["pieces"][:3]) + f"| ... {document['num_tokens'] - 4} more tokens ... |<|endoftext|>"
        named = ("sample", "shards", "--document", document["name"])
        assert run(*named).out == run(*named, "--source", "rows").out == run(*one).out
        for name in (document["document_id"], document["name"]):
            with pytest.raises(cli.UserError, match=f"none of 4 documents of notes has the id or the name '{name}'"):
                run("sample", "shards", "--document", name, "--source", "notes")
    with pytest.raises(cli.UserError, match="it has: notes, rows"):
        run("sample", "shards", "--source", "other")


def test_a_new_line_is_seen_and_made(run: Run) -> None:
    run("build", "run.yaml")
    shown = run("sample", "shards", "--source", "notes", "--count", "1", "--tokens", "1000").out
    assert shown.count("␊\n") == 30 and shown.endswith("<|endoftext|>\n")


def test_in_a_terminal_tokens_are_told_apart_by_their_backgrounds(place: Path, run: Run) -> None:
    from data_pipeline.show import sample_documents

    run("build", "run.yaml")
    document = sample_documents(place / "shards", "rows", "train", 1, 0, 1000)[0]
    screen, said = StringIO(), list[str]()
    tell_document(document, Page(Console(file=screen, force_terminal=True, color_system="256", width=40), said.append))
    backgrounds = re.findall(r"\x1b\[(?:1;37|30);48;5;(\d+)m([^\x1b]*)", screen.getvalue())
    assert [piece for _, piece in backgrounds] == document.pieces
    assert {colour for colour, _ in backgrounds[:-1:2]} == {"152"} and {colour for colour, _ in backgrounds[1:-1:2]} == {"223"}
    assert backgrounds[-1] == ("88", "<|endoftext|>")


def test_diff_ends_as_diff_does(place: Path, run: Run) -> None:
    run("build", "run.yaml")
    run("build", "run.yaml", "data.root=same")
    same = run("diff", "run.yaml", "same")
    assert same.status == 0 and "equal: their manifests are the same byte for byte" in same.out
    (place / "notes" / "0.txt").unlink()
    (place / "notes" / "9.txt").write_text("another note than before\n" * 30)
    run("build", "run.yaml", "data.root=other", "data.seed=5", "data.clean=[]", "data.tokenizer.path=shards/tokenizer.json")
    other = run("diff", "shards", "other")
    assert other.status == 1
    for line in (
        r"seed +1234 +5",
        r"rules      only in A: shown_rules:drop_short\(words=4\) \[source \w{16}\]",
        r"inputs     4 equal, 1 only in A, 1 only in B, 0 changed, 0 of equal size, cut into other parts",
        r"           only in A: notes:0\.txt",
        r"           only in B: notes:9\.txt",
        r"rows kept +7 +9",
        r"too_short +2 +0",
        r"documents  10 in both by id \(0 of them .* 0 in the other split\), 1 only in A, 3 only in B",
    ):
        assert re.search(rf"^{line}$", other.out, re.MULTILINE), (line, other.out)
    as_json = run("diff", "shards", "other", "--json")
    assert as_json.status == 1 and json.loads(as_json.out)["documents"]["only_in_b"] == 3


def test_diff_shows_the_values_of_what_only_one_has(place: Path, run: Run) -> None:
    run("build", "run.yaml")
    text = (place / "run.yaml").read_text()
    (place / "other.yaml").write_text(
        text.replace("url, metadata_fields: [lang]", "lang, settings: {year: 2024}")
        .replace("- {name: notes, path: notes}", "- {name: kept, path: notes, pattern: '*.txt'}")
        .replace("clean:", "deduplicate: {near: {similarity: 0.5, num_permutations: 32, num_bands: 8}}\n  clean:")
    )
    run("build", "other.yaml", "data.root=other")
    shown = run("diff", "shards", "other").out
    for line in (
        r"deduplicate\.exact +- +true",
        r"deduplicate\.near\.similarity +- +0\.5",
        r"sources\.notes\.path +notes +-",
        r"sources\.kept\.path +- +notes",
        r"sources\.kept\.pattern +- +\*\.txt",
        r"sources\.rows\.id_field +url +lang",
        r'sources\.rows\.metadata_fields +\["lang"\] +\[\]',
        r"sources\.rows\.settings\.year +- +2024",
    ):
        assert re.search(rf"^{line}$", shown, re.MULTILINE), (line, shown)
    assert "{" not in shown.partition("inputs ")[0].partition("configuration ")[2].replace("{}", "")


def test_rules_are_listed_with_settings_and_what_they_do(run: Run) -> None:
    rules = json.loads(run("rules", "--json").out)
    shown = run("rules").out
    assert len(rules) > 3 and len([line for line in shown.splitlines() if not line.startswith(" ")]) == len(rules)
    count = {"anyOf": [{"minimum": 0, "type": "integer"}, {"type": "null"}]}
    assert rules["length"]["settings"]["min_characters"] == {"type": count, "default": None}
    assert "default" not in rules["language"]["settings"]["keep"]
    words = " ".join(shown.split())
    for name, rule in rules.items():
        assert rule["summary"].endswith(".") and " ".join(rule["summary"].split()) in words
        start = words.index(f"{name}(")
        signature = words[start : words.index(rule["summary"], start)]
        for key, one in rule["settings"].items():
            assert re.search(rf"[( ]{key}{'=' if 'default' in one else '[,)]'}", signature), (key, signature)


def test_verify_finds_a_flipped_bit_in_every_kind_of_file(place: Path, run: Run, seed: int) -> None:
    run("build", "run.yaml")
    assert "every byte is as it was written" in run("verify", "shards").out
    shard = load_manifest(place / "shards").shards("train")[0]
    for name in ("tokenizer.json", *shard.files):
        path = place / "shards" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = run("verify", "shards")
        assert done.status == 2 and f"{name}: its SHA-256 differs" in done.out, name
        assert "`pretrain data build RUN.yaml --rebuild` keeps what is whole" in done.out
        path.write_bytes(whole)
    manifest = place / "shards" / "manifest.json"
    whole = manifest.read_bytes()
    chosen = random.Random(seed)
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        manifest.write_bytes(flipped)
        done = run("verify", "shards", "--json")
        assert done.status == 2 and len(json.loads(done.out)["problems"]) == 1
    manifest.unlink()
    with pytest.raises(cli.UserError, match="this dataset is unfinished"):
        run("verify", "shards")
