"""What a trace names is what the model is fed: forward against the batches themselves, back against forward, and how it refuses."""

import hashlib
import json
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.schema import BatchSection, RunConfig
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here
from data_pipeline.manifest import load_manifest
from data_pipeline.shards import Shard, read_spans
from data_pipeline.tokenizer import load_tokenizer
from pretrain import cli
from pretrain import trace as tracing
from pretrain.checkpoint.verify import FORMAT, commit_name, newest_readable_commit, read_commit
from pretrain.data.batches import Batches
from pretrain.data.corpus import Corpus, open_corpus
from pretrain.data.order import DataOrder, Skipped
from pretrain.data.samples import IGNORED_LABEL
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from pretrain.trace import Part, Sample, Trace

T, GLOBAL, STEPS = 32, 6, 110
PLANTED = "a heron by. "
WORDS = ("alpha", "beta", "gamma", "delta", "über", "naïve", "日本", "epsilon", "zeta")
SKIPPED = ((17 * GLOBAL, 19 * GLOBAL), (60 * GLOBAL, 61 * GLOBAL))
Documents = dict[str, np.ndarray]


def describe_run(place: Path) -> str:
    return f"""
data:
  root: {place}/shards
  sources:
  - {{name: web, path: "{place}/web.jsonl", id_field: url}}
  - {{name: code, path: "{place}/code.jsonl", id_field: url}}
  - {{name: notes, path: "{place}/notes"}}
  - {{name: tiny, path: "{place}/tiny.jsonl"}}
  tokenizer: {{vocabulary_size: 300}}
  held_out_fraction: 0.1
  work_unit_bytes: 6_000
  shard_tokens: 900
  packed_lengths: [{T}]
model: {{vocabulary_size: 320, largest_context: {T}}}
training: {{sequence_length: {T}, global_batch_samples: {GLOBAL}, micro_batch_samples: 3, total_tokens: {STEPS * GLOBAL * T}}}
schedule: {{decay_tokens: 0}}
mixture:
  stages:
  - weights: {{web: 1, code: 3}}
  - {{from_tokens: {40 * GLOBAL * T}, weights: {{web: 5, notes: 1}}, sequence_length: 8}}
"""


def write_rows(path: Path, texts: list[str]) -> None:
    rows = [{"text": text, "url": f"https://{path.stem}/{number}"} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on real shards of four sources: two with names, one of a file per document, one with less text than a sample."""
    place = tmp_path_factory.mktemp("trace")
    drawn = random.Random(5)

    def text() -> str:
        return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(1, 60)))

    web = [text() for _ in range(90)]
    web[40] = PLANTED * 16
    write_rows(place / "web.jsonl", web)
    rare = ["".join(chr(drawn.randrange(0x1F300, 0x1F600)) for _ in range(20)) for _ in range(5)]  # four tokens each
    write_rows(place / "code.jsonl", [*(text() for _ in range(80)), *rare])
    write_rows(place / "tiny.jsonl", ["one"])
    (place / "notes").mkdir()
    for number in range(10):
        (place / "notes" / f"{number}.txt").write_text(text())
    (place / "run.yaml").write_text(describe_run(place))
    config = load_config(place / "run.yaml", ["run.root=unset"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        build_dataset(config.data, lambda progress: None, open_here)
    return config


def start_run(base: RunConfig, place: Path, step: int | None = None, skipped: Skipped = (), **training: Any) -> RunFolder:
    """A run folder as training leaves it, with a commit of a step."""
    config = base.model_copy(
        update={
            "run": base.run.model_copy(update={"root": str(place), "name": "mine"}),
            "training": base.training.model_copy(update=training),
        }
    )
    run = RunFolder.of(config)
    run.path.mkdir()
    run.config_file.write_text(dump_config(config))
    if step is not None:
        commit(run, step, skipped)
    return run


def commit(run: RunFolder, step: int, skipped: Skipped) -> None:
    """A commit of a step, without weights."""
    corpus, order = open_run(run, skipped)
    seen = run.load_config().training.steps.samples_before(step)
    state = TrainState(step, seen, seen * T, 0, skipped)
    identity = order.identity(state.samples_seen) | {"tokenizer": corpus.tokenizer_sha256}
    content = {
        "format": FORMAT,
        "state": state.to_json(),
        "attempt": 1,
        "world_size": 1,
        "identity": identity,
        "code": {},
        "layout": {},
        "loss": "0x1p+0",
        "time": 0,
        "files": {},
    }
    write_sealed(run, step, content)
    assert read_commit(run.checkpoints / commit_name(step)).state == state


def write_sealed(run: RunFolder, step: int, content: dict[str, Any]) -> None:
    folder = run.checkpoints / commit_name(step)
    folder.mkdir(parents=True)
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(content | {"manifest_sha256": seal}))


def open_run(run: RunFolder, skipped: Skipped = ()) -> tuple[Corpus, DataOrder]:
    config = run.load_config()
    corpus = open_corpus(config)
    return corpus, DataOrder(corpus.sources, config.mixture, config.training, config.run.seed, skipped)


def read_documents(config: RunConfig) -> Documents:
    """The tokens of every document to learn from, by id."""
    folder, documents = Path(config.data.folder()), Documents()
    for record in load_manifest(folder).shards("train"):
        shard = Shard(folder / record.name)
        ids = read_spans(folder / record.name)["document_id"].to_pylist()
        documents |= {document_id: np.array(shard.document(number)) for number, document_id in enumerate(ids)}
    return documents


def targets(sample: Sample, documents: Documents) -> np.ndarray:
    parts = [documents[part.document_id][part.first_token : part.first_token + part.num_tokens] for part in sample.documents]
    for part in sample.documents:
        assert part.document_tokens == documents[part.document_id].size
    return np.concatenate(parts)


def feed(run: RunFolder, skipped: Skipped, num_steps: int) -> list[np.ndarray]:
    """The labels that training is fed, step by step, a row for each sample."""
    training = run.load_config().training
    corpus, order = open_run(run, skipped)
    batches = Batches(corpus, order, training, 0, 1, torch.device("cpu"))
    labels = [torch.cat([batch.labels_BT.reshape(-1, T) for batch in batches.next_step()]).numpy() for _ in range(num_steps)]
    batches.close()
    return labels


# --- forward ------------------------------------------------------------------------------------------------


def test_the_documents_of_a_step_are_the_tokens_that_it_is_fed(base: RunConfig, tmp_path: Path) -> None:
    """Every step of a run of two stages and some epochs that skips samples: equal arrays, row by row."""
    run = start_run(base, tmp_path, 70, SKIPPED)
    trace, documents = Trace(run), read_documents(base)
    samples = trace.steps(1, STEPS)
    assert [(one.step, one.row) for one in samples] == [(step, row) for step in range(1, STEPS + 1) for row in range(GLOBAL)]
    assert max(one.epoch for one in samples) > 1 and {one.source for one in samples} == {"web", "code", "notes"}
    assert {one.sequence_length for one in samples} == {T, 8}
    assert any(len({part.file for part in one.documents}) > 1 for one in samples), "no sample crosses two files"
    for step, labels in enumerate(feed(run, SKIPPED, STEPS), 1):
        rows = samples[(step - 1) * GLOBAL : step * GLOBAL]
        assert np.array_equal(np.stack([targets(one, documents) for one in rows]), labels), step
        assert step % 13 or trace.steps(step, step) == rows


def test_a_ramp_is_traced_in_both_directions(base: RunConfig, tmp_path: Path) -> None:
    """Steps of 3, 6 and 9 samples: each row is what is fed, a document's sightings are the same, and the newest commit is in the ramp."""
    ramp = tuple(BatchSection(until_tokens=until * T, global_batch_samples=size) for until, size in ((30, 3), (152, 6)))
    run = start_run(base, tmp_path, 20, batch_ramp=ramp, global_batch_samples=9)
    sizes = [3] * 10 + [6] * 21 + [9] * 56
    trace, documents = Trace(run), read_documents(base)
    assert (sum(sizes), trace.training.total_steps) == (30 + 126 + 504, len(sizes)) == (STEPS * GLOBAL, 87)
    samples = trace.steps(1, len(sizes))
    assert [one.sample for one in samples] == list(range(sum(sizes))) and trace.end == sum(sizes)
    assert [(one.step, one.row) for one in samples] == [(step, row) for step, size in enumerate(sizes, 1) for row in range(size)]
    begin = 0
    for step, labels in enumerate(feed(run, (), len(sizes)), 1):
        rows = samples[begin : begin + sizes[step - 1]]
        assert np.array_equal(np.stack([targets(one, documents) for one in rows]), labels), step
        assert step % 13 or trace.steps(step, step) == rows
        assert {one.sequence_length for one in rows} == {8 if begin >= 40 * GLOBAL else T}, "a stage begins with a step"
        begin += len(rows)
    assert_back_is_forward(trace, samples, documents)
    for one in (one for document_id in documents for one in trace.document(document_id).sightings):
        assert one.state == ("seen" if one.sample < 30 + 10 * 6 else "to come")
    found = json.loads(ask(run, "--step", 11, "--json"))
    assert [one["sample"] for one in found["samples"]] == list(range(30, 36))
    assert [section["global_batch_samples"] for section in found["batch_ramp"]] == [3, 6]
    assert ask(run, "--step", 11).startswith(f"{run.path}: 87 steps of 3 to 9 samples; its newest commit is of step 20\n")
    with pytest.raises(UserError, match="has the steps 1 to 87"):
        trace.steps(88, 88)


def test_a_part_says_whether_its_document_is_cut(base: RunConfig, tmp_path: Path) -> None:
    """By the sample's ends, or inside by the ends of a stage's shorter sequences."""
    whole, cut_inside = 0, 0
    for sample in Trace(start_run(base, tmp_path)).steps(30, 60):
        at = 0
        for part in sample.documents:
            is_whole = (part.first_token, part.num_tokens) == (0, part.document_tokens)
            sequences = {(at + place) // sample.sequence_length for place in range(part.num_tokens)}
            assert part.is_cut == (not is_whole or len(sequences) > 1)
            whole, cut_inside = whole + (not part.is_cut), cut_inside + (is_whole and part.is_cut)
            at += part.num_tokens
        assert at == T
    assert whole and cut_inside


def test_packed_samples_are_traced_in_both_directions(base: RunConfig, tmp_path: Path) -> None:
    """Behind the documents of a sample is only padding, and nothing is left over at a source's end."""
    run = start_run(base, tmp_path, 70, SKIPPED, packing="best_fit")
    trace, documents = Trace(run), read_documents(base)
    samples = trace.steps(1, STEPS)
    assert max(one.epoch for one in samples) > 1
    for sample, labels in zip(samples, np.concatenate(feed(run, SKIPPED, STEPS)), strict=True):
        found = targets(sample, documents)
        assert np.array_equal(found, labels[: found.size]) and (labels[found.size :] == IGNORED_LABEL).all()
    assert_back_is_forward(trace, samples, documents)
    assert not any(trace.document(one).left_over_tokens for one in documents)


# --- back ---------------------------------------------------------------------------------------------------


def assert_back_is_forward(trace: Trace, samples: list[Sample], documents: Documents) -> None:
    """Each document is sighted exactly where the run's samples hold it."""
    sighted: dict[str, list[Any]] = defaultdict(list)
    for one in samples:
        for part in one.documents:
            sighted[part.document_id].append((one.sample, one.step, one.row, one.epoch, part.first_token, part.num_tokens))
    for document_id, tokens in documents.items():
        found = trace.document(document_id)
        assert found.num_tokens == tokens.size
        seen = [one for one in found.sightings if one.state != "skipped"]
        assert [(one.sample, one.step, one.row, one.epoch, one.first_token, one.num_tokens) for one in seen] == sighted[document_id]
        if any(one.epoch for one in found.sightings):  # so the first epoch is complete
            assert tokens.size == found.left_over_tokens + sum(one.num_tokens for one in found.sightings if one.epoch == 0)


def test_back_is_forward_for_every_document(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path, 70, SKIPPED)
    trace, documents = Trace(run), read_documents(base)
    assert_back_is_forward(trace, trace.steps(1, STEPS), documents)
    found = {document_id: trace.document(document_id) for document_id in documents}
    left_over = {source: sum(one.left_over_tokens for one in found.values() if one.source == source) for source in ("web", "tiny")}
    tokens = {source: sum(one.num_tokens for one in found.values() if one.source == source) for source in ("web", "tiny")}
    assert left_over == {"web": tokens["web"] % T, "tiny": tokens["tiny"]}
    assert tokens["tiny"] < T and not any(one.sightings for one in found.values() if one.source == "tiny")
    states = {one.state: one for document in found.values() for one in document.sightings}
    assert set(states) == {"seen", "to come", "skipped"}
    for document in found.values():
        for one in document.sightings:
            skipped = any(first <= one.sample < end for first, end in SKIPPED)
            assert one.state == ("skipped" if skipped else "seen" if (one.step or 0) <= 70 else "to come")
            assert (one.step is None) == (one.row is None) == skipped


def test_a_skipped_sample_is_shown_and_no_step_has_it(base: RunConfig, tmp_path: Path) -> None:
    trace = Trace(start_run(base, tmp_path, 70, SKIPPED))
    first, end = SKIPPED[0]
    skipped = trace.sample(first + 1)
    assert (skipped.step, skipped.row) == (None, None) and skipped.documents
    assert trace.sample(end).step == first // GLOBAL + 1
    assert trace.sample(trace.end - 1).step == STEPS and trace.end == STEPS * GLOBAL + sum(end - first for first, end in SKIPPED)


# --- the command --------------------------------------------------------------------------------------------


def ask(run: RunFolder, *arguments: object) -> str:
    done = CliRunner().invoke(cli.app, ["data", "trace", str(run.path), *map(str, arguments)], prog_name="pretrain")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_a_planted_sentence_is_found_and_in_the_batch_of_its_step(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path, 20)
    found = json.loads(ask(run, "--document", "https://web/40", "--json"))
    document, sightings = found["document"], found["document"]["sightings"]
    assert (document["source"], document["file"], document["name"]) == ("web", "web.jsonl", "https://web/40")
    assert found["samples_seen"] == 20 * GLOBAL
    assert document["document_id"] in ask(run, "--document", document["document_id"])
    tokenizer = load_tokenizer(Path(base.data.folder()) / "tokenizer.json", "<|endoftext|>")
    assert 2 * len(tokenizer.encode(PLANTED).ids) < T
    labels = feed(run, (), STEPS)
    full = [one for one in sightings if one["num_tokens"] == T]
    assert full and full[0]["epoch"] == 0 < full[-1]["epoch"]
    for one in full:
        assert PLANTED in tokenizer.decode(labels[one["step"] - 1][one["row"]].tolist())
        (row,) = [row for row in json.loads(ask(run, "--step", one["step"], "--json"))["samples"] if row["row"] == one["row"]]
        assert (row["sample"], row["documents"][0]["document_id"]) == (one["sample"], document["document_id"])
        text = ask(run, "--sample", one["sample"], "--text", 1000)
        assert PLANTED in text and f"sample {one['sample']}  step {one['step']}, row {one['row']}, epoch {one['epoch']}, source web" in text


def test_text_is_what_the_tokens_stand_for_and_no_longer_than_asked(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path)
    trace, documents = Trace(run), read_documents(base)
    tokenizer = load_tokenizer(Path(base.data.folder()) / "tokenizer.json", "<|endoftext|>")
    whole = trace.steps(5, 9, None, 10_000)
    for sample in whole:
        for part in sample.documents:
            assert part.text is not None
            ids = documents[part.document_id][part.first_token : part.first_token + part.num_tokens].tolist()
            assert part.text == tokenizer.decode(ids, skip_special_tokens=False).removesuffix("<|endoftext|>")
    for num_characters in (1, 7):
        short = [part.text for sample in trace.steps(5, 9, None, num_characters) for part in sample.documents]
        assert short == [(part.text or "")[:num_characters] for sample in whole for part in sample.documents]
    assert {part.text for sample in trace.steps(5, 9) for part in sample.documents} == {None}


def test_text_and_json_say_the_same(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path, 20)
    arguments = ("--from-step", 44, "--to-step", 46, "--source", "web", "--text", 15)
    found, shown = json.loads(ask(run, *arguments, "--json")), ask(run, *arguments)
    assert found["samples"] == [json.loads(json.dumps(asdict(one))) for one in Trace(run).steps(44, 46, "web", 15)]
    assert shown.startswith(f"{run.path}: {STEPS} steps of {GLOBAL} samples; its newest commit is of step 20\n")
    assert [line for line in shown.splitlines() if line.startswith("sample")] == [
        f"sample {one['sample']}  step {one['step']}, row {one['row']}, epoch {one['epoch']}, source web, sequences of 8"
        for one in found["samples"]
    ]
    for part in [part for one in found["samples"] for part in one["documents"]]:
        behind = f", after its first {part['first_token']}" if part["first_token"] else ""
        cut = " (cut)" if part["is_cut"] else ""
        line = f"  {part['document_id']}  {part['num_tokens']} of {part['document_tokens']} tokens{behind}{cut}; file web.jsonl, position "
        assert line + f"{part['position']}, name {part['name']}\n" in shown
        assert not part["text"] or f"\n      {part['text']}\n" in shown
    assert "      " not in ask(run, *arguments[:-1], 0)


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str], base: RunConfig, tmp_path: Path) -> None:
    from pretrain.page import open_page

    trace = Trace(start_run(base, tmp_path))
    part = Part("0" * 24, "na\x1bme", "fi\nle", 3, 0, 5, 5, False, "one\ntwo\x1b[31m")
    tracing.tell_samples(trace, [Sample(0, 1, 0, 0, "web", T, [part])], open_page())
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "file fi␊le, position 3, name na␛me" in shown and "one␊two␛[31m" in shown


def test_only_the_shards_of_the_answer_are_read_and_each_once(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read: list[str] = []

    def open_shard(prefix: Path) -> Shard:
        opened.append(prefix.name)
        return Shard(prefix)

    plain = tracing.read_columns
    monkeypatch.setattr(tracing, "Shard", open_shard)
    monkeypatch.setattr(tracing, "read_columns", lambda prefix, columns: read.append(prefix.name) or plain(prefix, columns))
    trace = Trace(start_run(base, tmp_path))
    assert (opened, read) == ([], [])
    (sample,) = [one for one in trace.steps(1, 1) if one.row == 0]
    opened.clear()
    read.clear()
    trace.sample(sample.sample)
    assert opened == read and len(opened) <= 2
    opened.clear()
    read.clear()
    trace.steps(1, STEPS)
    num_shards = len([one for one in load_manifest(Path(base.data.folder())).shards("train") if "tiny" not in one.sources])
    assert sorted(opened) == sorted(read) and len(opened) == num_shards > 6


def test_neither_torch_nor_ray_is_loaded(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path, 20, SKIPPED)
    code = """
import sys
from typer.testing import CliRunner
from pretrain.cli import app
for arguments in (["trace", sys.argv[1], "--step", "3"], ["trace", sys.argv[1], "--document", "https://web/40"], ["mixture", sys.argv[2]]):
    done = CliRunner().invoke(app, ["data", *arguments])
    assert done.exit_code == 0, done
print(sorted({"torch", "ray", "deepspeed", "wandb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(run.path), str(run.config_file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# --- refusals -----------------------------------------------------------------------------------------------


def held_out_name(base: RunConfig) -> str:
    folder = Path(base.data.folder())
    shards = [shard for shard in load_manifest(folder).shards("held_out") if "web" in shard.sources]
    return read_spans(folder / shards[0].name)["name"][0].as_py()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), r"found no question; wanted exactly one of --step, --from-step with --to-step, --sample, --document\."),
        (("--step", 1, "--sample", 2), "found --step and --sample; wanted exactly one"),
        (("--from-step", 3), "found --from-step alone; wanted --from-step with --to-step"),
        (("--to-step", 3), "found --to-step alone; wanted --from-step with --to-step"),
        (("--step", 0), f"has the steps 1 to {STEPS}, the first update being 1; asked for step 0"),
        (("--step", STEPS + 1), f"asked for step {STEPS + 1}"),
        (("--from-step", 5, "--to-step", 4), "asked for steps 5 to 4"),
        (("--sample", STEPS * GLOBAL), f"has the samples 0 to {STEPS * GLOBAL - 1}, asked for {STEPS * GLOBAL}"),
        (("--sample", -1), "asked for -1"),
        (("--step", 1, "--source", "wob"), "no source 'wob' to learn from; did you mean 'web'"),
        (("--document", "https://web/4x"), "no document has the id or the name 'https://web/4x'; the nearest: https://web/4"),
        (("--document", "nothing like it"), "Names are what the field of data.sources id_field holds"),
        (("--document", "https://web/40", "--source", "code"), "no document of code has the id or the name"),
    ],
    ids=str,
)
def test_a_question_without_an_answer_is_refused(base: RunConfig, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ask(start_run(base, tmp_path), *arguments)


def test_a_held_out_document_was_never_trained_on(base: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held out, never trained on"):
        ask(start_run(base, tmp_path), "--document", held_out_name(base))


def test_an_id_that_is_cut_finds_the_nearest_and_namesakes_are_listed(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(start_run(base, tmp_path))
    known = trace.document("https://code/3").document_id
    with pytest.raises(UserError, match=f"the nearest: {known}"):
        trace.document(known[:10])
    plain = tracing.read_columns

    def with_one_name(prefix: Path, columns: list[str]) -> Any:
        import pyarrow

        for ids, names in plain(prefix, columns):
            yield ids, pyarrow.array(["the same"] * len(names))

    monkeypatch.setattr(tracing, "read_columns", with_one_name)
    with pytest.raises(UserError, match=r"\d+ documents have the name 'the same'; give the id of one:(\n  [0-9a-f]{24}){10}$"):
        trace.document("the same")


def test_a_folder_without_a_run_and_a_dataset_that_is_gone_are_named(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path)
    with pytest.raises(UserError, match=r"holds no run \(no run.yaml\). Runs beside it: mine"):
        ask(RunFolder(tmp_path / "other"), "--step", 1)
    moved = str(tmp_path / "moved")
    run.config_file.write_text(run.config_file.read_text().replace(base.data.folder(), moved))
    with pytest.raises(UserError, match=f"^{moved}: no such folder, and .*mine/run.yaml learns from the dataset there"):
        ask(run, "--step", 1)


def test_a_run_that_has_seen_other_samples_is_not_traced(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path, 20)
    run.config_file.write_text(run.config_file.read_text().replace("seed: 1234", "seed: 1235"))
    with pytest.raises(UserError, match="mixture differ from what its commit of step 20 holds"):
        Trace(run)


def test_the_newest_commit_that_is_whole_counts(base: RunConfig, tmp_path: Path) -> None:
    run = start_run(base, tmp_path, 20, SKIPPED)
    commit(run, 10, ())
    newer = run.checkpoints / commit_name(30)
    changed = (run.checkpoints / commit_name(20) / "MANIFEST.json").read_text().replace('"step": 20', '"step": 30')
    for content in (None, "", "{}", "[]", changed):
        newer.mkdir(exist_ok=True)
        if content is not None:
            (newer / "MANIFEST.json").write_text(content)
        progress = newest_readable_commit(run.checkpoints)
        assert progress is not None and (progress.state.step, progress.state.skipped_samples) == (20, SKIPPED)
    assert newest_readable_commit(tmp_path / "nowhere") is None


def test_a_commit_of_an_older_version_is_not_traced(base: RunConfig, tmp_path: Path) -> None:
    """Its order of samples was another."""
    run = start_run(base, tmp_path)
    write_sealed(run, 10, {"format": 1, "state": {"step": 10, "samples_seen": 60, "tokens_seen": 1920, "skipped_steps": 0}, "identity": {}})
    with pytest.raises(UserError, match=rf"step-00000010/MANIFEST.json: written in format 1, this version reads {FORMAT}"):
        Trace(run)
