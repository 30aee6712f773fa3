"""The survivor that an example names is the document that it resembles, wherever that lies, and it is in the dataset."""

import json
import random

from configs.data_section import DeduplicationSection, NearDuplicatesSection, RuleSection, SourceSection
from data_pipeline.manifest import SPLITS
from data_pipeline.shards import read_spans

TWICE = DeduplicationSection(near=NearDuplicatesSection(num_permutations=32, num_bands=8))


def test_survivors_are_named_across_units_and_sources(tmp_path, data_for, build, seed):
    chosen = random.Random(seed)
    words = [f"word{number}" for number in range(3000)]
    texts = [chosen.choices(words, k=400) for _ in range(40)]
    originals: dict[tuple[str, str, int], tuple[str, str, int]] = {}
    for source, name in (("first", "a.jsonl"), ("second", "b.jsonl")):
        lines, position = [], 0
        for number, text in enumerate(texts):
            here = source, name, position
            originals[here] = here if source == "first" else list(originals)[number]
            lines.append(json.dumps({"text": " ".join([*text[:200], source, *text[201:]])}) + "\n")
            position += len(lines[-1])
        if source == "second":  # and some that resemble nothing
            lines += [json.dumps({"text": " ".join(chosen.choices(words, k=400))}) + "\n" for _ in range(10)]
        (tmp_path / source).mkdir()
        (tmp_path / source / name).write_text("".join(lines))
    sources = tuple(SourceSection(name=source, path=str(tmp_path / source)) for source in ("first", "second"))
    result = build(data_for(tmp_path, sources=sources, deduplicate=TWICE))
    assert result.num_units > 4 and result.manifest.documents.dropped == {"near_duplicate": 40}
    examples = [json.loads(line) for line in (result.folder / "dropped" / "near_duplicate.jsonl").read_text().splitlines()]
    assert len(examples) == 40
    shards = [result.folder / shard.name for split in SPLITS for shard in result.manifest.shards(split)]
    rows = [row for shard in shards for row in read_spans(shard).to_pylist()]
    stored = {row["document_id"]: (row["source"], row["file"], row["position"]) for row in rows}
    for example in examples:
        survivor = example["survivor"]
        found = originals[example["source"], example["file"], example["position"]]
        assert (survivor["source"], survivor["file"], survivor["position"]) == found
        assert stored[survivor["document_id"]] == found


def test_a_rule_may_have_the_same_reason(corpus, data_for, build, tmp_path, monkeypatch):
    """What it drops was never compared with anything."""
    rule = 'def judge(document):\n    return "near_duplicate" if document.file.endswith("-05.txt") else document\n'
    (tmp_path / "like_near.py").write_text(rule)
    monkeypatch.syspath_prepend(tmp_path)
    (corpus / "zz-near.txt").write_bytes((corpus / "odd" / "text-03.txt").read_bytes() + b" one")
    for deduplicate in (None, TWICE):
        clean = (RuleSection(rule="like_near:judge"),)
        result = build(data_for(corpus, root=f"dataset-{deduplicate is None}", clean=clean, deduplicate=deduplicate))
        examples = [json.loads(line) for line in (result.folder / "dropped" / "near_duplicate.jsonl").read_text().splitlines()]
        survivors = {example["file"]: example.get("survivor", {}).get("file") for example in examples}
        assert survivors == {"odd/text-05.txt": None, **({"zz-near.txt": "odd/text-03.txt"} if deduplicate else {})}
