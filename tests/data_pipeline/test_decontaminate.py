"""A shared run of words is found in whatever dress, nothing else is, and an accident of hashing drops nothing."""

import gzip
import json
import random

import numpy as np
import pytest
import zstandard

from configs.errors import UserError
from data_pipeline import decontaminate as module
from data_pipeline.decontaminate import decontaminate, find_overlap, load_evaluations, split_plain_words
from data_pipeline.documents import Document

QUESTION = "Which of the two trains that leave the station at noon is the first to arrive in town?"  # 18 words
SHORT = "Nine men went to mow, went to mow"  # 8 words


def document_of(text: str) -> Document:
    return Document("web", "file", 0, text)


def shown_overlap(text: str, path: str, fields: tuple[str, ...] = ("text",)) -> str | None:
    return find_overlap(text, load_evaluations((path,), fields, ngram_words=13, shortest_words=8), minimum_overlap=1)


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    rows = [{"text": QUESTION, "choices": ["yes", SHORT]}, {"text": "Too short.", "number": 3}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (QUESTION, True),
        (f"before {QUESTION} behind", True),
        (QUESTION.upper().replace(" ", "\n-- "), True),
        (" ".join(QUESTION.split()[:13]), True),
        (" ".join(QUESTION.split()[:12]), False),
        (" ".join(QUESTION.split()[-13:]), True),
        (QUESTION.replace("leave", "left"), False),  # runs of 6 and of 11 words are left
        (QUESTION.replace("two", "three"), True),  # one of 14 is
        ("Too short.", False),
        (SHORT, False),  # it stands in another field
        ("", False),
    ],
)
def test_runs(evaluation, text, is_found):
    assert decontaminate(document_of(text), paths=(evaluation,)) == ("contaminated" if is_found else document_of(text))
    assert (shown_overlap(text, evaluation) is not None) == is_found


def test_overlap_is_shown(evaluation):
    assert shown_overlap(f"He asked: {QUESTION}", evaluation) == "which of the two trains that leave the station at noon is the"


def test_short_texts_are_looked_for_as_a_whole(evaluation):
    settings = {"paths": (evaluation,), "fields": ("text", "choices")}
    assert decontaminate(document_of(f"so: {SHORT.upper()}, then"), **settings) == "contaminated"
    assert shown_overlap(f"so {SHORT} then", evaluation, settings["fields"]) == "nine men went to mow went to mow"
    assert isinstance(decontaminate(document_of("nine men went to mow went to"), **settings), Document)
    assert isinstance(decontaminate(document_of(SHORT), **settings, shortest_words=9), Document)
    assert isinstance(decontaminate(document_of("yes, it is"), **settings), Document)


def test_minimum_overlap_counts_places(evaluation):
    text = " ".join(QUESTION.split()[:15])  # three runs of 13
    assert decontaminate(document_of(text), paths=(evaluation,), minimum_overlap=3) == "contaminated"
    assert isinstance(decontaminate(document_of(text), paths=(evaluation,), minimum_overlap=4), Document)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "txt", "txt.gz"])
def test_kinds_of_files(tmp_path, suffix):
    content = (QUESTION if "txt" in suffix else json.dumps({"text": QUESTION})).encode()
    path = tmp_path / f"evaluation.{suffix}"
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    if suffix.endswith(".zst"):
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    assert decontaminate(document_of(QUESTION), paths=(str(path),)) == "contaminated"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.jsonl", b"{", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.zst", b"no zstd", "cannot be read"),
        ("a.txt", b"\xff", "cannot be read"),
        ("a.jsonl", b'{"question": "x"}', "no text of at least 8 words in the fields text"),
        ("a.csv", b"x", "not a kind"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=found):
        decontaminate(document_of("x"), paths=(str(tmp_path / name),))


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        decontaminate(document_of("x"), paths=(str(tmp_path / "absent.jsonl"),))


def test_equal_hashes_drop_nothing(evaluation, monkeypatch):
    """If all runs had the same hash, the words alone would decide."""

    def all_alike(numbers, longest):
        for num_words in range(1, min(longest, len(numbers)) + 1):
            yield num_words, np.zeros(len(numbers) - num_words + 1, dtype=np.uint64)

    monkeypatch.setattr(module, "_hash_runs", all_alike)
    module.load_evaluations.cache_clear()
    try:
        other = "which of the two trains that leave the station at noon was the first to be seen"
        assert shown_overlap(other, evaluation) is None
        assert decontaminate(document_of(QUESTION), paths=(evaluation,)) == "contaminated"
    finally:
        module.load_evaluations.cache_clear()


def test_like_a_plain_search(tmp_path, seed):
    """Few words, so that runs are shared often: the same documents as by comparing every run with every other."""
    chosen = random.Random(seed)
    words = ["a", "b", "é"]
    texts = [" ".join(chosen.choices(words, k=chosen.randint(2, 9))) for _ in range(12)]
    path = tmp_path / "evaluation.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    wanted = set()
    for text in map(str.split, texts):
        n = min(len(text), 5)
        if n >= 4:
            wanted |= {tuple(text[start : start + n]) for start in range(len(text) - n + 1)}
    outcomes = set()
    for _ in range(300):
        text = chosen.choices([*words, "x"], k=chosen.randint(0, 14))
        is_shared = any(tuple(text[start : start + n]) in wanted for n in (4, 5) for start in range(len(text) - n + 1))
        outcome = decontaminate(document_of(" ".join(text)), paths=(str(path),), ngram_words=5, shortest_words=4)
        assert (outcome == "contaminated") == is_shared, text
        outcomes.add(is_shared)
    assert outcomes == {True, False}


def test_plain_words_are_the_same_in_ascii():
    every = "".join(map(chr, range(128))) * 2
    assert split_plain_words(every) == split_plain_words(every + " é")[:-1]
    assert split_plain_words("It's_OK: Ünïcode 42") == ["it", "s", "ok", "ünïcode", "42"]
