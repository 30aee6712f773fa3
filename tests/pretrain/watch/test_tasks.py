"""Tasks: the same answers as the harness's own model class gives for the same weights, whoever divides them, and nothing fetched."""

import contextlib
import functools
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from configs.errors import UserError
from configs.model_section import ModelSection
from configs.objective_section import ObjectiveSection
from data_pipeline.tokenizer import train_tokenizer, vocabulary_size
from pretrain.data.prompts import PromptForm
from pretrain.evaluate_tasks import evaluate_tasks, open_tasks
from pretrain.model.decoder import Decoder
from pretrain.model.weights import initialize_weights
from tests.pretrain.watch.writing import write_tasks
from tests.tiny import END_OF_TEXT, tiny_texts

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, which pretrain[eval] brings")

CONTEXT, SEPARATOR = 64, "<|sep|>"
# Weights that are far apart, so that no two tokens or choices are equally likely.
SECTION = ModelSection(
    vocabulary_size=320,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    feed_forward_width=48,
    largest_context=CONTEXT,
    initial_deviation=0.15,
)
EXAMPLES = Path(__file__).parents[3] / "configs" / "tasks"


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer() -> Tokenizer:
    tokenizer = train_tokenizer(tiny_texts(100, seed=1), 300, END_OF_TEXT)
    tokenizer.add_tokens([SEPARATOR])
    return tokenizer


def decoder(seed: int, **changes: Any) -> Decoder:
    model = Decoder(SECTION.model_copy(update=changes)).eval()
    initialize_weights(model, model.section, seed)
    return model


def form_of(tokenizer: Tokenizer, kind: str = "next_token") -> PromptForm:
    return PromptForm(tokenizer, END_OF_TEXT, ObjectiveSection(kind=kind, separator=None if kind == "next_token" else SEPARATOR))


def hugging_face(model: Decoder) -> Any:
    """transformers' own Llama with the same weights."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, which pretrain[huggingface] brings")
    section = model.section
    config = transformers.LlamaConfig(
        vocab_size=section.vocabulary_size,
        hidden_size=section.width,
        intermediate_size=section.feed_forward_width,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        num_key_value_heads=section.kv_heads,
        rms_norm_eps=section.norm_epsilon,
        rope_theta=section.rope_theta,
        max_position_embeddings=section.largest_context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    names = {
        "token_table.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
        "blocks.": "model.layers.",
    }
    weights = {
        functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name): weight for name, weight in model.state_dict().items()
    }
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(weights)
    return theirs


def harness_model(model: Decoder, tokenizer: Tokenizer, begins_documents: bool) -> Any:
    """The harness's `hf`; with `begins_documents` its tokenizer puts an end of text before every text."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    copy = Tokenizer.from_str(tokenizer.to_str())
    if begins_documents:
        copy.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    theirs = PreTrainedTokenizerFast(tokenizer_object=copy, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    return HFLM(
        pretrained=hugging_face(model),
        tokenizer=theirs,
        max_length=CONTEXT,
        batch_size=3,
        device="cpu",
        add_bos_token=begins_documents,
    )


@pytest.mark.parametrize("names", [["choices", "letters", "last", "writes"], ["whole"]], ids="-".join)
def test_the_harness_finds_the_same_with_its_own_model(tmp_path: Path, tokenizer: Tokenizer, seed: int, names: list[str]) -> None:
    """Every request's answer, to 1e-4 in its logarithm and text for text; and so every metric, and its standard error."""
    from lm_eval.evaluator import evaluate

    from pretrain.watch.task_files import load_tasks

    # Without spare rows of the table: theirs would write them.
    model, files = decoder(seed, vocabulary_size=vocabulary_size(tokenizer)), write_tasks(tmp_path, names, seed)
    answers: dict[str, list[Any]] = {}

    def note(who: str, task: Any) -> None:
        answers.setdefault(who, []).extend(resp for instance in task.instances for resp in instance.resps)

    ours = open_tasks(files)
    scores = evaluate_tasks(ours, model, model.section, form_of(tokenizer), batch_size=4, with_errors=True)
    theirs = load_tasks(files)
    # Its rolling windows would judge the end of text that begins a document too, if its tokenizer put one there.
    results = evaluate(
        harness_model(model, tokenizer, begins_documents=names != ["whole"]), theirs, bootstrap_iters=1000, log_samples=False
    )
    for name in names:
        note("ours", ours["tasks"][name])
        note("theirs", theirs["tasks"][name])
    assert len(answers["ours"]) == len(answers["theirs"]) > 0
    for mine, other in zip(answers["ours"], answers["theirs"], strict=True):
        if isinstance(mine, tuple):
            assert mine[0] == pytest.approx(other[0], abs=1e-4)
            assert mine[1] == other[1]
        elif isinstance(mine, float):
            assert mine == pytest.approx(other, abs=1e-3)
        else:
            assert mine == other
    assert {score.task for score in scores} == set(names)
    for score in scores:
        found = results["results"][score.task]
        assert score.value == pytest.approx(found[f"{score.metric},none"], rel=1e-5)
        error = found[f"{score.metric}_stderr,none"]
        assert score.standard_error == (None if error == "N/A" else pytest.approx(error, rel=1e-4))
        assert score.num_documents == 11


def on_ranks(size: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Ranks as threads: `gather` waits for all of them, in the same order of calls."""
    barrier = threading.Barrier(size, timeout=60)
    shared: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            shared[rank] = value
            barrier.wait()
            values = list(shared)
            barrier.wait()
            return values

        try:
            results[rank] = work(rank, gather)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["next_token", "prefix"])
def test_ranks_find_together_what_one_finds_alone(
    tmp_path: Path, tokenizer: Tokenizer, seed: int, size: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores on every rank, from equally many forwards, those of judging of equal shapes."""
    from pretrain.watch import tasks as module

    # Both change what all threads of a process share; ranks are processes.
    monkeypatch.setattr(module, "quiet_harness", contextlib.nullcontext)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: contextlib.nullcontext())
    names = ["choices", "whole", "writes"]
    files = write_tasks(tmp_path, names, seed, num_documents=7)
    form = form_of(tokenizer, kind)
    model = decoder(seed)
    alone = evaluate_tasks(open_tasks(files), model, SECTION, form, batch_size=16)
    shapes: list[list[tuple[int, ...] | str]] = [[] for _ in range(size)]
    tasks = [open_tasks(files) for _ in range(size)]

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> list[Any]:
        own = decoder(seed)
        forward = own.forward

        def watched(tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
            shapes[rank].append("writes" if options.get("last_only") else tuple(tokens_BT.shape))
            return forward(tokens_BT, **options)

        own.forward = watched
        return evaluate_tasks(tasks[rank], own, SECTION, form, batch_size=2, rank=rank, size=size, gather=gather)

    found = on_ranks(size, work)
    assert all(shapes[rank] == shapes[0] for rank in range(size))
    for scores in found:
        assert [score.name for score in scores] == [score.name for score in alone]
        assert [score.value for score in scores] == pytest.approx([score.value for score in alone], rel=1e-5)


@pytest.mark.long
def test_engines_of_two_ranks_find_what_a_decoder_finds(
    tmp_path: Path, tokenizer: Tokenizer, seed: int, run_on_ranks: Callable[..., list[Any]]
) -> None:
    """DeepSpeed's engine at stages 0 and 3, where a forward is a collective: the same scores, and training goes on."""
    from tests.training import tiny_config

    files = write_tasks(tmp_path, ["choices", "whole", "writes"], seed, num_documents=6)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = tiny_config("none", tmp_path / "runs", precision="fp32", parallel__zero_stage="0")
    model = Decoder(config.model)
    initialize_weights(model, config.model, config.run.seed)
    alone = evaluate_tasks(open_tasks(files), model, config.model, form_of(tokenizer), batch_size=8, limit=5)
    arguments = {"tokenizer_file": str(tmp_path / "tokenizer.json"), "runs": str(tmp_path / "runs"), "files": list(map(str, files))}
    found = run_on_ranks("tests.pretrain.watch.tasks_on_ranks:ask_engines", 2, arguments | {"stages": ["0", "3"]})
    for stage in ("0", "3"):
        assert found[0][stage] == found[1][stage]
        assert found[0][stage]["first"] == pytest.approx({score.name: score.value for score in alone}, rel=1e-4)
        assert found[0][stage]["behind"] != found[0][stage]["first"]
        assert (found[0][stage]["training"], found[0][stage]["steps"]) == (True, 1)


@pytest.mark.parametrize("kind", ["continuation", "prefix"])
def test_a_model_with_a_separator_reads_the_context_as_its_given_part(tmp_path: Path, tokenizer: Tokenizer, seed: int, kind: str) -> None:
    """A continuation's probability is that behind the separator, the given part seen in both directions where training did so."""
    (file,) = write_tasks(tmp_path, ["last"], seed, num_documents=5)
    model, form = decoder(seed), form_of(tokenizer, kind)
    tasks = open_tasks([file])
    evaluate_tasks(tasks, model, SECTION, form, batch_size=2)
    separator = tokenizer.token_to_id(SEPARATOR)
    instances = tasks["tasks"]["last"].instances
    assert len(instances) == 5
    for instance in instances:
        context, continuation = instance.args
        given = [0, *tokenizer.encode(context).ids, separator]
        judged = tokenizer.encode(continuation).ids
        tokens = [*given, *judged][-CONTEXT - 1 :]
        first = len(tokens) - len(judged)
        prefix_BT = torch.zeros(1, len(tokens) - 1, dtype=torch.bool)
        prefix_BT[:, : first if kind == "prefix" else 0] = True
        with torch.no_grad():
            chances = model(torch.tensor([tokens[:-1]]), prefix_BT=prefix_BT)[0].log_softmax(-1)
        expected = sum(float(chances[place - 1, tokens[place]]) for place in range(first, len(tokens)))
        assert instance.resps[0][0] == pytest.approx(expected, abs=1e-4)


def test_a_run_in_training_is_not_disturbed(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Dropout rests meanwhile; training goes on as before, with the same random numbers; twice finds the same."""
    import numpy as np

    files = write_tasks(tmp_path, ["choices", "writes"], seed, num_documents=4)
    model = decoder(seed, dropout=0.5).train()
    tasks = open_tasks(files)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = evaluate_tasks(tasks, model, model.section, form_of(tokenizer), batch_size=3)
    assert model.training
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (states[0], states[2])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate_tasks(tasks, model, model.section, form_of(tokenizer), batch_size=3) == first
    assert evaluate_tasks(tasks, decoder(seed), SECTION, form_of(tokenizer), batch_size=3) == first
    assert {score.num_documents for score in evaluate_tasks(tasks, model, model.section, form_of(tokenizer), batch_size=3, limit=2)} == {2}
    assert [score.name for score in first] == ["task/choices/acc", "task/choices/acc_norm", "task/writes/exact_match"]


def test_one_token_choices_share_a_row(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    files = write_tasks(tmp_path, ["letters"], seed, num_documents=6)
    model = decoder(seed)
    rows: list[int] = []
    forward = model.forward
    model.forward = lambda tokens_BT, **options: (rows.append(len(tokens_BT)), forward(tokens_BT, **options))[1]
    evaluate_tasks(open_tasks(files), model, SECTION, form_of(tokenizer), batch_size=100)
    assert rows == [6]


def test_drawn_answers_are_the_same_for_any_batch(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    (file,) = write_tasks(tmp_path, ["writes"], seed, num_documents=6)
    file.write_text(file.read_text().replace("max_gen_toks: 12", "max_gen_toks: 12, do_sample: true, temperature: 0.9, top_p: 0.95"))
    written: list[list[str]] = []
    for batch_size in (1, 4):
        tasks = open_tasks([file])
        evaluate_tasks(tasks, decoder(seed), SECTION, form_of(tokenizer), batch_size=batch_size)
        written.append([instance.resps[0] for instance in tasks["tasks"]["writes"].instances])
    assert written[0] == written[1]
    assert len(set(written[0])) > 1
    assert not any("." in text for text in written[0])


def test_a_folder_with_a_group_gives_its_tasks_and_their_mean(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    write_tasks(tmp_path, ["choices", "letters", "writes"], seed, num_documents=4)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [choices, letters]\naggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    (tmp_path / "notes.yaml").write_text("author: nobody\n")
    model = decoder(seed)
    found = {score.name: score.value for score in evaluate_tasks(open_tasks([tmp_path]), model, SECTION, form_of(tokenizer), batch_size=8)}
    mean = (found["task/choices/acc"] + found["task/letters/acc"]) / 2
    assert found["task/both/acc"] == pytest.approx(mean)
    assert set(found) == {"task/both/acc", "task/choices/acc", "task/choices/acc_norm", "task/letters/acc", "task/writes/exact_match"}
    by_file = evaluate_tasks(open_tasks([tmp_path / "both.yaml"]), model, SECTION, form_of(tokenizer), batch_size=8)
    assert {score.name: score.value for score in by_file} == {name: value for name, value in found.items() if "writes" not in name}


def test_the_example_tasks_need_no_network_and_leave_no_cache(
    tmp_path: Path, tokenizer: Tokenizer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    from datasets import config as cache

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(cache, "HF_DATASETS_CACHE", tmp_path / "cache")
    scores = evaluate_tasks(open_tasks([EXAMPLES]), decoder(seed), SECTION, form_of(tokenizer), batch_size=8)
    assert [(score.name, score.num_documents) for score in scores] == [("task/arithmetic/exact_match", 20), ("task/brackets/acc", 20)]
    assert not (tmp_path / "cache").exists()


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    (file,) = write_tasks(tmp_path, ["writes"], seed, num_documents=2)
    text = file.read_text()
    file.write_text(text.replace("max_gen_toks: 12", "max_gen_toks: 64"))
    with pytest.raises(UserError, match="asks for 64 new tokens, the model's context is 64; lower generation_kwargs.max_gen_toks"):
        evaluate_tasks(open_tasks([file]), decoder(seed), SECTION, form_of(tokenizer), batch_size=2)
    file.write_text(text.replace("max_gen_toks: 12", "max_gen_toks: 12, num_beams: 4"))
    with pytest.raises(UserError, match="generation_kwargs have num_beams"):
        evaluate_tasks(open_tasks([file]), decoder(seed), SECTION, form_of(tokenizer), batch_size=2)


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pretrain\[eval\]'"):
        open_tasks([EXAMPLES])
