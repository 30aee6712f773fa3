"""Texts from a trained model: one, or a file of prompts; what is wrong with a prompt is said before anything is written."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from configs.errors import UserError
from configs.loader import load_config
from data_pipeline.tokenizer import train_tokenizer, vocabulary_size
from pretrain import cli, evaluate_tasks, write
from pretrain.checkpoint.verify import Commit
from pretrain.data.prompts import PromptForm
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from pretrain.prompt_file import read_prompts, write_rows
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from pretrain.write import Choice, SaidProgress, TrainedModel, seeded_generator, write_text, write_texts
from tests.pretrain.inspecting import make_run
from tests.pretrain.verbs import call
from tests.tiny import END_OF_TEXT, tiny_texts

SEPARATOR = "<|sep|>"
RUN_FILE = """
model: {vocabulary_size: 320, num_layers: 2, width: 32, num_heads: 4, feed_forward_width: 48, largest_context: 32, initial_deviation: 0.2}
training: {sequence_length: 32}
data: {tokenizer: {vocabulary_size: 320}}
"""
CHOICE = Choice(max_new_tokens=12, temperature=0.9, top_k=None, top_p=0.95, seed=3)
GREEDY = Choice(max_new_tokens=12, temperature=0.0, top_k=None, top_p=None, seed=0)
PROMPTS = ["12 plus 3 is", "", "4 plus", "one, two, three", "7"]


def make_trained(folder: Path, seed: int, *overrides: str) -> TrainedModel:
    """A model that nobody trained, as if a checkpoint had held it."""
    (folder / "run.yaml").write_text(RUN_FILE)
    config = load_config(folder / "run.yaml", list(overrides))
    tokenizer = train_tokenizer(tiny_texts(60, seed=1), 300, END_OF_TEXT)
    tokenizer.add_tokens([SEPARATOR])
    model = Decoder(config.model).eval()
    initialize_weights(model, config.model, seed)
    with torch.no_grad():
        cast("torch.nn.Module", model.head).weight[0] = 0  # no text ends by itself, greedily
    commit = cast("Commit", type("Commit", (), {"state": TrainState(5, 20, 640), "folder": folder / "step-00000005"}))
    return TrainedModel(config, commit, model, PromptForm(tokenizer, END_OF_TEXT, config.objective))


@pytest.fixture(name="trained")
def _trained(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    """The same, found wherever the newest checkpoint of a run is asked for."""
    trained = make_trained(tmp_path, seed)
    for module in (write, evaluate_tasks):
        monkeypatch.setattr(module, "load_newest", lambda run, say: trained)
    return trained


def rows_of(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


def test_a_row_does_not_depend_on_the_batch(trained: TrainedModel) -> None:
    """Drawn texts are equal for every batch size, and the first is what `--prompt` writes."""
    found = [list(write_texts(trained, rows_of(*PROMPTS), CHOICE, batch_size)) for batch_size in (1, 2, 3, 100)]
    assert found[0] == found[1] == found[2] == found[3]
    assert [row["prompt"] for row in found[0]] == PROMPTS
    alone = "".join(write_text(RunFolder(Path("nowhere")), PROMPTS[0], say=print, **vars(CHOICE)))
    assert alone == PROMPTS[0] + found[0][0]["continuation"]
    assert len({row["continuation"] for row in write_texts(trained, rows_of(*["4 plus"] * 6), CHOICE, 6)}) > 1  # each draws for itself


def test_rows_say_how_they_ended_and_keep_what_they_had(trained: TrainedModel) -> None:
    rows = [{"id": "a", "prompt": "4 plus", "label": [1]}, {"prompt": " ".join(["12 plus"] * 9)}]
    first, second = write_texts(trained, rows, GREEDY, 2)
    assert (first["id"], first["label"], first["tokens"], first["ended"]) == ("a", [1], 12, "max_tokens")
    length = len(trained.form.encode(rows[1]["prompt"]).tokens)
    assert 20 < length <= 32
    assert (second["tokens"], second["ended"]) == (33 - length, "context")
    # The token that the model writes first is now what ends a text.
    with torch.no_grad():
        logits_V = trained.model(torch.tensor([trained.form.encode("4 plus").tokens]))[0, -1, : vocabulary_size(trained.form.tokenizer)]
    form = PromptForm(trained.form.tokenizer, END_OF_TEXT, trained.config.objective)
    form.encode = trained.form.encode
    form.end_of_text = int(logits_V.argmax())
    (ended,) = write_texts(replace(trained, form=form), rows_of("4 plus"), GREEDY, 1)
    assert (ended["continuation"], ended["tokens"], ended["ended"]) == ("", 0, "end_of_text")


def test_each_row_is_told_as_soon_as_it_and_those_before_it_are_finished(trained: TrainedModel) -> None:
    finished = write_texts(trained, rows_of(*PROMPTS), GREEDY, 2)
    forwards: list[int] = []
    forward = trained.model.forward
    trained.model.forward = lambda *arguments, **options: (forwards.append(1), forward(*arguments, **options))[1]
    next(finished), next(finished)
    assert len(forwards) == 12
    next(finished)
    assert len(forwards) == 24


@pytest.mark.parametrize("kind", ["continuation", "prefix"])
def test_a_prompt_ends_with_the_separator_where_training_had_one(tmp_path: Path, seed: int, kind: str) -> None:
    """Greedy, against a decoder that reads all again for each token, the given part in both directions for a prefix."""
    trained = make_trained(tmp_path, seed, f"objective.kind={kind}", f"objective.separator={SEPARATOR}")
    tokenizer = trained.form.tokenizer
    rows = rows_of("4 plus 5", f"12{SEPARATOR}", f"3 plus 4{SEPARATOR}is", "")
    for row, found in zip(rows, write_texts(trained, rows, GREEDY, 4), strict=True):
        given, _, begun = row["prompt"].partition(SEPARATOR)
        num_prefix = 2 + len(tokenizer.encode(given).ids)
        tokens = [0, *tokenizer.encode(given).ids, tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(begun).ids]
        length, nearest = len(tokens), 1.0
        while len(tokens) < length + 12:
            prefix_BT = torch.arange(len(tokens))[None] < (num_prefix if kind == "prefix" else 0)
            with torch.no_grad():
                likeliest = trained.model(torch.tensor([tokens]), prefix_BT=prefix_BT)[0, -1, : vocabulary_size(tokenizer)].topk(2)
            nearest = min(nearest, float(likeliest.values[0] - likeliest.values[1]))
            tokens.append(int(likeliest.indices[0]))
            if tokens[-1] == 0:
                tokens.pop()
                break
        if nearest > 1e-5:
            assert found["continuation"] == tokenizer.decode(tokens[length:])


def test_too_long_a_prompt_is_refused_before_anything_is_written(trained: TrainedModel) -> None:
    rows = rows_of("4 plus", "12 plus 30 is " * 20)
    with pytest.raises(UserError, match=r"prompt 2 of 2 has \d+ tokens; wanted 1 to 32 \(model.largest_context\)"):
        write_texts(trained, rows, GREEDY, 1)
    with pytest.raises(UserError, match="the prompt is not valid UTF-8"):
        next(write_text(RunFolder(Path("nowhere")), "caf\udce9", say=print, **vars(GREEDY)))


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes("\ufeffone\r\n\n  two \u2028 words\nthree".encode())
    assert read_prompts(text) == rows_of("one", "  two \u2028 words", "three")
    rows.write_text('{"prompt": "one\\ntwo", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(rows) == [{"prompt": "one\ntwo", "id": 3}, {"prompt": ""}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no prompt; wanted one a line"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"one\ncaf\xe9\n", "a.txt: line 2 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt"\n', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"text": "one"}', 'a.jsonl: line 1 has no prompt; wanted an object like {"prompt": "Once"}'),
        ("a.jsonl", b'{"prompt": 3}', "line 1 has no prompt"),
        ("a.jsonl", b'\n["one"]', "line 2 has no prompt"),
        ("none.txt", None, "none.txt cannot be read: No such file"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_an_output_is_whole_or_called_partial(tmp_path: Path) -> None:
    def rows(broken: bool) -> Any:
        yield {"continuation": "é"}
        if broken:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(rows(True), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    write_rows(rows(False), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == '{"continuation": "é"}\n'


def test_progress_is_said_after_two_seconds_and_then_every_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    tell = SaidProgress(said.append)
    for done in range(1, 31):
        now = 100.0 + done
        tell(1000 * done, 30000, "prompts")
    assert said == ["2,000 of 30,000 prompts", "12,000 of 30,000 prompts", "22,000 of 30,000 prompts"]


def test_draws_of_a_prompt_follow_from_seed_and_number() -> None:
    draws = {(seed, number): torch.rand(4, generator=seeded_generator(seed, number)).tolist() for seed in (0, 1) for number in (0, 1, 2)}
    assert len({tuple(draw) for draw in draws.values()}) == 6
    assert torch.rand(4, generator=seeded_generator(1, 2)).tolist() == draws[1, 2]


# --- the verbs ---------------------------------------------------------------------------------------------


def test_generate_writes_lines_to_standard_output_or_a_file(trained: TrainedModel, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("4 plus\n12 plus 3 is\n7\n")
    options = ("generate", tmp_path, "--prompts", prompts, "--max-tokens", 5)
    shown = [json.loads(line) for line in call(*options, "--batch-size", 2).out.splitlines()]
    assert [row["prompt"] for row in shown] == ["4 plus", "12 plus 3 is", "7"]
    assert call(*options, "--output", tmp_path / "out.jsonl").out == ""
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == shown
    single = call("generate", tmp_path, "--prompt", "4 plus", "--max-tokens", 5).out
    assert single == f"4 plus{shown[0]['continuation']}\n"
    with pytest.raises(UserError, match="--prompt and --prompts were both given"):
        call(*options, "--prompt", "a")
    with pytest.raises(UserError, match="--output is for --prompts FILE"):
        call("generate", tmp_path, "--output", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="--temperature is inf; wanted 0"):
        call(*options, "--temperature", "inf")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("prompts.txt", "prompts.txt is there already; give another --output"),
        (".", "is a folder; give a file in it"),
        ("none/out.jsonl", "none: no such folder"),
    ],
)
def test_an_output_that_would_be_lost_or_cannot_be_is_refused_at_once(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, words: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("4 plus\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(write, "load_newest", lambda run, say: pytest.fail("a model was loaded"))
    for verb in (["generate", tmp_path, "--prompts", prompts], ["evaluate", tmp_path, "--tasks", prompts]):
        with pytest.raises(UserError, match=words):
            call(*verb, "--output", tmp_path / output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_who_interrupts_a_long_list_is_told_where_the_finished_texts_are(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows_and_a_signal(*_: object) -> Any:
        yield {"continuation": "one"}
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "write_texts", rows_and_a_signal)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("4 plus\n7\n")
    monkeypatch.setattr("sys.argv", ["pretrain", *map(str, ("generate", tmp_path, "--prompts", prompts, "--output", output))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert f"the texts that were finished are in {output}.partial" in said
    assert "interrupted; the same command begins again" in said
    assert (tmp_path / "out.jsonl.partial").read_text() == '{"continuation": "one"}\n'


def test_code_of_ones_own_that_has_changed_is_said_to_every_reader(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs" / "mine", seed)
    said: list[str] = []
    write.newest_intact_commit(run, said.append)
    assert not said
    monkeypatch.setattr(write, "code_of_the_user", lambda config: {"my_model:Block": "0" * 64})
    write.newest_intact_commit(run, said.append)
    assert said == ["WARNING: the source of my_model:Block is not what it was when step-00000010 was saved"]


def test_a_reader_that_has_seen_enough_is_no_defect(tmp_path: Path) -> None:
    """`pretrain ... | true`."""
    model = Path(__file__).parents[2] / "configs" / "models" / "llama-3-8b.yaml"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pretrain.cli", "inspect", str(model)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr


def test_evaluate_prints_a_table_or_json(trained: TrainedModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, which pretrain[eval] brings")
    (tmp_path / "sums.jsonl").write_text('{"q": "1 plus 1 is", "a": 0}\n{"q": "2 plus 1 is", "a": 1}\n{"q": "2 plus 2 is", "a": 1}\n')
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: [" 2", " 3"]\ndoc_to_target: a\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    options = ("evaluate", tmp_path, "--tasks", tmp_path / "sums.yaml")
    header, row = call(*options).out.splitlines()
    assert header.split() == ["task", "metric", "value", "standard", "error", "documents"]
    assert row.split()[:2] == ["sums", "acc"] and row.split()[-1] == "3"
    found = json.loads(call(*options, "--json", "--limit", 2, "--output", tmp_path / "scores.json").out)
    assert found == json.loads((tmp_path / "scores.json").read_text())
    assert (found["step"], found["tokens_seen"], len(found["scores"])) == (5, 640, 1)
    score = found["scores"][0]
    assert (score["task"], score["metric"], score["num_documents"]) == ("sums", "acc", 2)
    assert score["value"] in (0.0, 0.5, 1.0)
    with pytest.raises(UserError, match="no such folder"):
        call(*options, "--output", tmp_path / "none" / "scores.json")
