"""Task files: what cannot be read, or would need a network, is refused by the file that says it."""

from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.evaluate_tasks import open_tasks
from tests.pretrain.watch.writing import write_tasks

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, which pretrain[eval] brings")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("dataset_path: json", "dataset_path: allenai/arc"),
            "dataset_path 'allenai/arc' would have to be fetched; wanted one of json, csv",
        ),
        (("letters.jsonl", "nothing.jsonl"), r"letters.yaml: no such data file .*nothing.jsonl"),
        (("letters.jsonl", "https://somewhere/letters.jsonl"), "data file https://somewhere/letters.jsonl would have to be fetched"),
        (("dataset_kwargs", "dataset_words"), "lm-eval cannot load it|data_files is missing"),
        (("metric: acc,", "metric: meteor,"), "metric 'meteor' is not one of lm-eval's own"),
        (("metric: acc,", "metric: acc, hf_evaluate: true,"), "metric 'acc' is not one of lm-eval's own"),
        (("test_split: test", "test_split: train"), "letters.yaml: .*there is no split 'train'; its data_files are of test"),
        (("doc_to_text", "doc_to_txt"), "found the key 'doc_to_txt', which no task has; the nearest is 'doc_to_text'"),
        (("{{question}}", "{{quest}}"), "a template names a field that its data do not have: 'quest' is undefined"),
        (("dataset_path: json", "description: none"), "letters.yaml: dataset_path is missing; wanted one of json"),
        (("task: letters", "name: letters"), "a task file has `task: NAME`, found dataset_path"),
        (("task: letters", "task: [letters"), "letters.yaml: lm-eval cannot load it: "),
        (("answer", "!function nowhere.read"), "lm-eval cannot load it: .*nowhere"),
    ],
)
def test_a_task_that_cannot_be_is_refused_by_its_file(tmp_path: Path, seed: int, change: tuple[str, str], message: str) -> None:
    (file,) = write_tasks(tmp_path, ["letters"], seed, num_documents=2)
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change))
    with pytest.raises(UserError, match=message):
        open_tasks([file])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", "one of its data files has no rows"),
        (b'{"question": "a", "answer": 1}\n{"quest', "lm-eval cannot load it: .*JSON"),
        (b'{"question": "caf\xe9", "answer": 1}\n', "lm-eval cannot load it: .*(utf-8|UTF-8|UTF8)"),
        (b'{"question": "a", "answer": 1}\n{"quest": "b", "answer": 1}\n', "document 2 of its data has no 'question'"),
        (b'{"question": "a", "answer": 1}\n{"question": "b"}\n', "document 2 of its data has no 'answer'"),
    ],
)
def test_data_that_cannot_be_are_refused_by_the_task(tmp_path: Path, seed: int, rows: bytes, message: str) -> None:
    (file,) = write_tasks(tmp_path, ["letters"], seed, num_documents=2)
    (tmp_path / "letters.jsonl").write_bytes(rows)
    with pytest.raises(UserError, match=message):
        open_tasks([file])


def test_the_harness_says_nothing_of_its_own(tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even while it resamples for the error of a perplexity."""
    from lm_eval.api.metrics import bootstrap_stderr, perplexity

    from pretrain.watch.task_files import quiet_harness

    write_tasks(tmp_path, ["last"], seed, num_documents=2)
    open_tasks([tmp_path])
    with quiet_harness():
        assert bootstrap_stderr(perplexity, [-1.0, -2.0], 2000) > 0
    assert capfd.readouterr() == ("", "")


def test_files_that_are_not_there_and_names_given_twice(tmp_path: Path, seed: int) -> None:
    (file,) = write_tasks(tmp_path, ["letters"], seed, num_documents=2)
    with pytest.raises(UserError, match="lettres.yaml: no such task file; beside it: letters.yaml"):
        open_tasks([tmp_path / "lettres.yaml"])
    with pytest.raises(UserError, match="both hold a task 'letters'"):
        open_tasks([file, tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no task files"):
        open_tasks([tmp_path / "empty"])
