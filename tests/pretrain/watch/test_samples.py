"""Samples: what the model writes at an evaluation is what its checkpoint would write, once for each step; a training does not notice."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from configs.errors import UserError
from configs.schema import RunConfig
from data_pipeline.tokenizer import load_tokenizer, vocabulary_size
from pretrain.data.prompts import PromptForm
from pretrain.engine.parallel import Layout
from pretrain.model.decoder import Decoder
from pretrain.model.generate import generate
from pretrain.model.weights import initialize_weights
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from pretrain.watch.metrics import read_rows
from pretrain.watch.samples import TEMPERATURE, TOP_P, Samples, generator_of
from pretrain.write import load_model, newest_intact_commit
from tests.pretrain.watch.watched_on_ranks import PROMPTS
from tests.tiny import END_OF_TEXT, write_tiny_dataset
from tests.training import tiny_config


class OneRank(NamedTuple):
    """A layout that needs no process group."""

    rank: int = 0

    def sum_over_data_ranks(self, value: float) -> float:
        return float(value)


@pytest.fixture(name="dataset", scope="module")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "data"
    write_tiny_dataset(folder, num_documents=60)
    return folder


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(dataset: Path) -> Tokenizer:
    return load_tokenizer(dataset / "tokenizer.json", END_OF_TEXT)


def config_of(dataset: Path, runs: Path, prompts: Sequence[str] = PROMPTS, tokens: int = 10, **overrides: str) -> RunConfig:
    return tiny_config(dataset, runs, evaluate__prompts=json.dumps(prompts), evaluate__prompt_tokens=str(tokens), **overrides)


def decoder(config: RunConfig, seed: int) -> Decoder:
    model = Decoder(config.model)
    initialize_weights(model, config.model.model_copy(update={"initial_deviation": 0.5}), seed)
    return model.train()


def write(config: RunConfig, folder: Path, model: nn.Module, step: int = 4, start: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that are there behind an evaluation, and what was said."""
    said: list[str] = []
    samples = Samples(config, folder, 3, TrainState(step=start), model, cast("Layout", OneRank()))
    samples.write(TrainState(step=step, tokens_seen=256 * step), lambda: None, said.append)
    return read_rows(folder / "samples.jsonl"), said


class Scripted(nn.Module):
    """Writes what it is told to, whatever it is asked."""

    def __init__(self, tokens: Sequence[int], vocabulary_size: int) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self._tokens, self._vocabulary_size = iter(tokens), vocabulary_size

    def forward(self, tokens_BT: torch.Tensor, **_options: Any) -> torch.Tensor:
        logits_BTV = torch.full((*tokens_BT.shape, self._vocabulary_size), -1e4)
        logits_BTV[..., next(self._tokens)] = 0.0
        return logits_BTV


def test_samples_are_the_weights_alone_and_change_nothing(dataset: Path, tmp_path: Path, seed: int) -> None:
    config = config_of(dataset, tmp_path)
    model = decoder(config, seed)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    rows, said = write(config, tmp_path, model)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert {(row["step"], row["tokens_seen"], row["attempt"]) for row in rows} == {(4, 1024, 3)}
    assert {tuple(row) for row in rows} == {("step", "tokens_seen", "attempt", "prompt", "text")}
    assert len(said) == 3
    torch.manual_seed(seed + 1)
    other = tmp_path / "other"
    other.mkdir()
    later, _ = write(config, other, model, step=8)
    assert [row["text"] for row in later] == [row["text"] for row in rows], "neither the step nor torch's own seed is in it"
    one_by_one = tmp_path / "one"
    one_by_one.mkdir()
    alone, _ = write(config_of(dataset, tmp_path, evaluate__micro_batch_samples="1"), one_by_one, model)
    assert [row["text"] for row in alone] == [row["text"] for row in rows]
    with torch.no_grad():
        model.token_table.weight.copy_(model.token_table.weight.flip(0))
    changed = tmp_path / "changed"
    changed.mkdir()
    assert [row["text"] for row in write(config, changed, model)[0]] != [row["text"] for row in rows]
    with torch.no_grad():
        model.token_table.weight.copy_(model.token_table.weight.flip(0))
    reseeded = tmp_path / "reseeded"
    reseeded.mkdir()
    assert [row["text"] for row in write(config_of(dataset, tmp_path, run__seed="99"), reseeded, model)[0]] != [row["text"] for row in rows]


def test_a_text_ends_at_the_end_of_text_or_when_it_is_long_enough(dataset: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """And it stands in JSON as it is; in the terminal no character of it is obeyed."""
    config = config_of(dataset, tmp_path, prompts=["é\n\u2028"], tokens=12)
    wanted = "ü\x1b[2J\r\n"
    tokens = tokenizer.encode(wanted, add_special_tokens=False).ids
    end = tokenizer.token_to_id(END_OF_TEXT)
    model = Scripted([*tokens, end, *tokens], config.model.vocabulary_size)
    rows, said = write(config, tmp_path, model)
    assert [(row["prompt"], row["text"]) for row in rows] == [("é\n\u2028", wanted)]
    assert said == ["step 4: é␊\\u2028 → ü␛[2J␍␊"]
    many = tokenizer.encode("1 plus 2 is 3. " * 20, add_special_tokens=False).ids
    rows, _ = write(config, tmp_path, Scripted(many, config.model.vocabulary_size), step=8)
    assert rows[-1]["text"] == tokenizer.decode(many[:12])


def test_long_texts_are_cut_in_the_terminal_alone(dataset: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = config_of(dataset, tmp_path, prompts=["x" * 180], tokens=60, model__largest_context="512")
    tokens = [tokenizer.encode(letter, add_special_tokens=False).ids[0] for letter in "abcdefghij" * 6]
    rows, said = write(config, tmp_path, Scripted(tokens, config.model.vocabulary_size))
    assert rows[0]["text"] == "abcdefghij" * 6
    assert said[0] == f"step 4: {'x' * 180} → abcdefghijabcdef…"


def test_rows_behind_the_step_it_goes_on_from_are_cut(dataset: Path, tmp_path: Path, seed: int) -> None:
    """Also where the prompts were taken away meanwhile; a torn line goes too."""
    config = config_of(dataset, tmp_path)
    model = decoder(config, seed)
    for step in (4, 8):
        write(config, tmp_path, model, step, start=step - 1)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    rows, _ = write(config, tmp_path, model, 12, start=8)
    assert [row["step"] for row in rows] == [4, 4, 4, 8, 8, 12, 12, 12]
    rows, _ = write(config, tmp_path, model, 8, start=4)
    assert [row["step"] for row in rows] == [4, 4, 4, 8, 8, 8]
    rows, said = write(config_of(dataset, tmp_path, prompts=[]), tmp_path, model, 8, start=6)
    assert [row["step"] for row in rows] == [4, 4, 4]
    assert said == []
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert write(config_of(dataset, tmp_path, prompts=[]), fresh, model) == ([], [])
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prompt_that_does_not_fit_is_refused_before_training(dataset: Path, tmp_path: Path, rank: int) -> None:
    """On every rank, so that none waits for the others."""
    config = config_of(dataset, tmp_path, prompts=["fits", "3 plus 4 is 7.\n" * 20])
    with pytest.raises(UserError, match=r"evaluate\.prompts: '3 plus .* has \d+ tokens; wanted 1 to 64 \(model\.largest_context\)"):
        Samples(config, tmp_path, 1, TrainState(), Decoder(config.model), cast("Layout", OneRank(rank)))
    broken = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": ("a\ud800",)})})
    with pytest.raises(UserError, match=r"evaluate\.prompts: 'a\\ud800' is not valid UTF-8"):
        Samples(broken, tmp_path, 1, TrainState(), Decoder(config.model), cast("Layout", OneRank(rank)))


@pytest.mark.long
def test_a_watched_training_learns_the_same_bits_and_writes_each_sample_once(
    dataset: Path, tmp_path: Path, tokenizer: Tokenizer, run_on_ranks: Callable[..., list[Any]]
) -> None:
    """Two ranks, stage 3, traced and asked for samples; stopped, and resumed. At the end they are what the checkpoint writes."""
    plain = {"parallel__zero_stage": "3", "precision": "fp32", "evaluate__every_steps": "4"}
    watched = plain | {
        "evaluate__prompts": json.dumps(PROMPTS),
        "evaluate__prompt_tokens": "10",
        "profile": "{steps: [5, 6], ranks: [0, 1]}",
    }
    runs = tmp_path / "runs"
    arguments = {"dataset": str(dataset), "runs": str(runs), "plain": plain, "watched": watched, "stop_at": 5}
    found = run_on_ranks("tests.pretrain.watch.watched_on_ranks:train_watched", 2, arguments)[0]
    assert found["watched"] == found["plain"]
    assert found["stopped"]["outcome"] == "stopped"
    assert found["resumed"]["steps"][0] == found["stopped"]["steps"][1] < 8
    assert (found["resumed"]["losses"], found["resumed"]["hash"]) == (found["plain"]["losses"], found["plain"]["hash"])
    rows = {name: read_rows(runs / name / "samples.jsonl") for name in ("watched", "resumed")}
    for name, of_run in rows.items():
        assert [(row["step"], row["prompt"]) for row in of_run] == [(step, prompt) for step in (4, 8, 10) for prompt in PROMPTS], name
    assert [row | {"attempt": 1} for row in rows["resumed"]] == rows["watched"]
    assert not (runs / "plain" / "samples.jsonl").exists()
    assert not (runs / "plain" / "profile").exists()
    folders = sorted(str(path.relative_to(runs)) for path in runs.glob("*/profile/attempt-*/steps-*"))
    assert folders == ["resumed/profile/attempt-1/steps-5-5", "resumed/profile/attempt-2/steps-6-6", "watched/profile/attempt-1/steps-5-6"]
    for rank in (0, 1):
        told = json.loads((runs / folders[-1] / f"rank-{rank}.json").read_text())
        assert (told["device"], told["steps"]) == ("cpu", [5, 6])
        assert 0 < told["communication"] < told["seconds"]
        assert {"aten::mm", "aten::embedding"} <= {row["name"] for row in told["operations"]}
        assert {"gloo:all_gather", "gloo:all_reduce"} <= {row["name"] for row in told["collectives"]}

    config = config_of(dataset, runs, **plain)
    model = load_model(config, newest_intact_commit(RunFolder(runs / "watched"), lambda _: None))
    assert [continued(model, tokenizer, config, number) for number in range(3)] == [row["text"] for row in rows["watched"][-3:]]


def continued(model: Decoder, tokenizer: Tokenizer, config: RunConfig, number: int) -> str:
    """What a model writes behind a prompt, alone."""
    form = PromptForm(tokenizer, END_OF_TEXT, config.objective)
    tokens = generate(
        model,
        form.encode(PROMPTS[number]).tokens,
        max_new_tokens=10,
        end_of_text=form.end_of_text,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        generator=generator_of(config.run.seed, number),
        num_tokens=vocabulary_size(tokenizer),
    )
    return tokenizer.decode(list(tokens))
