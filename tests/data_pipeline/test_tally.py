"""Counts add up; examples are a fair sample that does not depend on the order."""

import json
import random

from data_pipeline.documents import Document, Dropped, Rejected
from data_pipeline.tally import EXAMPLES, Tally


def drop_all(folder, numbers) -> list[dict]:
    folder.mkdir()
    tally = Tally(folder)
    for number in numbers:
        tally.drop(Dropped(Document("web", "a.jsonl", number, f"text {number} " * 100), "few" if number < 3 else "many"))
    tally.kept = 5
    counts = tally.close()
    assert (counts.read, counts.kept, counts.dropped) == (5 + len(numbers), 5, {"few": 3, "many": len(numbers) - 3})
    assert counts.adds_up
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_examples_are_the_lowest_ids_in_any_order(tmp_path, seed):
    numbers = list(range(1000))
    first = drop_all(tmp_path / "first", numbers)
    random.Random(seed).shuffle(numbers)
    assert drop_all(tmp_path / "second", numbers) == first
    assert [example["reason"] for example in first] == ["few"] * 3 + ["many"] * EXAMPLES
    ids = sorted(Document("web", "a.jsonl", number, "").document_id for number in range(3, 1000))
    assert [example["document_id"] for example in first[3:]] == ids[:EXAMPLES]
    assert all(len(example["text"]) == 500 for example in first)


def test_what_cannot_be_read_is_written_down_whole(tmp_path):
    tally = Tally(tmp_path)
    tally.reject(Rejected("web", "a", 3, 7, "bad_utf8", "detail", "ff", line=2))
    counts = tally.close()
    assert (counts.read, counts.kept, counts.dropped, counts.quarantined) == (1, 0, {}, {"bad_utf8": 1})
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["line"] == 2
    assert not (tmp_path / "dropped.jsonl").exists()


def test_nothing_left_out_leaves_no_file(tmp_path):
    assert Tally(tmp_path).close().read == 0
    assert list(tmp_path.iterdir()) == []
