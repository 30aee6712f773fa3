"""Hugging Face out and in: what is written is the same model, at any number of ranks; what is not is refused and not left there."""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from configs.durable import sha256_of_file
from configs.errors import UserError
from configs.loader import dump_config, load_config
from configs.model_section import RopeScalingSection
from configs.schema import RunConfig
from pretrain import cli, hugging_face, proof
from pretrain.checkpoint.blocks import FileRecord
from pretrain.checkpoint.fragments import FragmentIndex
from pretrain.checkpoint.image import Image
from pretrain.checkpoint.verify import Commit, list_commits, read_commit, write_manifest
from pretrain.hugging_face import export_run, import_model
from pretrain.model import exchange
from pretrain.model.decoder import Decoder
from pretrain.model.generate import generate
from pretrain.model.weights import initialize_weights
from pretrain.model.weights_file import IMPORTED, imported_weights
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from tests.pretrain.model.forms import decoder_of, draw_tokens, section_of
from tests.tiny import END_OF_TEXT, tiny_texts, write_tiny_dataset

transformers = pytest.importorskip("transformers", reason="needs transformers, which pretrain[huggingface] brings")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("grouped", {"rope_scaling": RopeScalingSection(kind="llama3", factor=8.0, original_context=16)}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
}
"""Architecture -> a form of forms.py that it expresses, and what is changed of it."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at a disk that lost its power; and each test opens its imports anew."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    imported_weights.cache_clear()


@pytest.fixture(scope="module", name="tokenizer_file")
def _tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_pipeline.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(tiny_texts(60, 7), 300, END_OF_TEXT).save(str(path))
    return path


MakeRun = Callable[..., RunFolder]


@pytest.fixture(name="make_run")
def _make_run(tmp_path: Path, tokenizer_file: Path, seed: int) -> MakeRun:
    """`make_run(form, changes..., num_ranks=2)`: a run folder with one commit, whose parameters are cut anywhere among the ranks."""

    def make(form: str = "llama", num_ranks: int = 2, **changes: Any) -> RunFolder:
        section = section_of(form, **({"vocabulary_size": 320, "initial_deviation": 0.1} | changes))
        settings = {"sequence_length": section.largest_context}
        config = RunConfig(
            model=section,
            training=RunConfig.model_fields["training"].default.model_copy(update=settings),
            data=RunConfig.model_fields["data"].default.model_copy(
                update={"tokenizer": RunConfig().data.tokenizer.model_copy(update={"vocabulary_size": 300})}
            ),
        )
        run = RunFolder(tmp_path / f"run-{form.replace(' ', '-')}")
        run.path.mkdir()
        run.config_file.write_text(dump_config(config))
        shutil.copy(tokenizer_file, run.tokenizer_file)
        weights = {name: parameter.detach() for name, parameter in decoder_of(section, seed).named_parameters()}
        write_commit_of(run, weights, num_ranks, seed)
        return run

    return make


def write_commit_of(run: RunFolder, weights: dict[str, torch.Tensor], num_ranks: int, seed: int) -> None:
    """What the ranks of a run would have written, without an engine."""
    chooser = random.Random(seed)
    folder = run.checkpoints / "step-00000010"
    folder.mkdir(parents=True)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(num_ranks)]
    for name, weight in weights.items():
        flat = weight.reshape(-1)
        cuts = [0, *sorted(chooser.randrange(len(flat) + 1) for _ in range(num_ranks - 1)), len(flat)]
        for rank, (start, end) in enumerate(itertools.pairwise(cuts)):
            if end > start:
                parts[rank][f"weight|{name}|{start}"] = flat[start:end].clone()
    files: dict[str, FileRecord] = {}
    for rank, tensors in enumerate(parts):
        names = {key.split("|")[1] for key in tensors}
        parameters = {name: {"shape": list(weights[name].shape), "scalars": {}} for name in names}
        about = {"parameters": parameters, "buffers": {}, "groups": [], "loss_scale": {}}
        files |= Image(rank, tensors, about).write(folder)
    write_manifest(Commit(folder, TrainState(10, 40, 1280), files, {}, {}, num_ranks, attempt=1, loss=1.0, time=0))


def silent(_text: str) -> None:
    pass


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def model_of(run: RunFolder, dtype: torch.dtype = torch.float32) -> Decoder:
    """The run's newest checkpoint, its weights rounded to `dtype`."""
    model = Decoder(run.load_config().model).eval()
    weights = FragmentIndex(read_commit(list_commits(run.checkpoints)[0])).weights()
    model.load_state_dict({name: weight.to(dtype).float() for name, weight in weights.items()})
    return model


def assert_refused(out: Path, words: list[str], act: Callable[[], object]) -> None:
    """A sentence with these words, and nothing left: neither `out` nor what it was made in."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError) as refused:
        act()
    assert all(word in str(refused.value) for word in words), refused.value
    assert set(out.parent.iterdir()) == before


# Out -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", CASES)
def test_an_export_is_the_same_model(architecture: str, dtype: torch.dtype, make_run: MakeRun, tmp_path: Path, seed: int) -> None:
    """By every means of a user: AutoModel, AutoTokenizer, generate; in shards, in the memory of a single layer."""
    form, changes = CASES[architecture]
    run, out = make_run(form, num_ranks=3, **changes), tmp_path / "exported"
    told: list[str] = []
    found = export_run(run, out, dtype=dtype, say=told.append, shard_bytes=30_000, memory_bytes=20_000)
    assert found.largest_difference < 1e-4 * max(1.0, found.largest_logit)
    assert f"{out}: {architecture}, {found.num_parameters:,} parameters" in told[-1]
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for path in shards for tensor in load_file(path).values()} == {dtype}
    assert {path.name for path in out.iterdir()} - {path.name for path in shards} == {
        *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
    }
    ours, theirs = model_of(run, dtype), loaded(out)
    assert theirs.config.model_type == architecture
    tokens = draw_tokens(ours.section, seed, 3, 60)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=0)
    tokenizer, own = transformers.AutoTokenizer.from_pretrained(out), Tokenizer.from_file(str(run.tokenizer_file))
    text = tiny_texts(1, seed)[0]
    assert tokenizer(text)["input_ids"] == own.encode(text).ids
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 0
    prompt = own.encode(text).ids[:20]
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    assert [token for token in written if token != 0] == list(generate(ours, prompt, max_new_tokens=20, end_of_text=0, temperature=0))


def test_a_run_of_any_stage_is_exported_equally(run_on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Trained by two ranks at ZeRO 1 and 3: each export holds its checkpoint's weights, and the command says where it is."""
    from tests.training import tiny_config

    dataset, runs = tmp_path / "data", tmp_path / "runs"
    write_tiny_dataset(dataset)
    cases = {
        f"zero-{stage}": {"parallel__zero_stage": str(stage), "training__total_tokens": "512", "schedule": "{decay_tokens: 0}"}
        for stage in (1, 3)
    }
    run_on_ranks("tests.training:train_runs", 2, {"dataset": str(dataset), "runs": str(runs), "cases": cases})
    for name in cases:
        run, out = RunFolder(runs / name), tmp_path / f"exported-{name}"
        run.write_description(tiny_config(dataset, runs, run__name=name, **cases[name]), dataset)
        done = CliRunner().invoke(cli.app, ["export", str(run.path), str(out), "--dtype", "fp32"], catch_exceptions=False)
        assert done.exit_code == 0
        assert f"{out}: qwen3" in done.stderr
        ours, theirs = model_of(run), loaded(out)
        tokens = draw_tokens(ours.section, 1, 2, 40)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=0)


def spoil_weight(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].reshape(-1)[-1] += 0.125
    save_file(tensors, path, {"format": "pt"})


def spoil_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def spoil_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][1:]
    (folder / "tokenizer.json").write_text(json.dumps(content))


SPOILED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a weight": (spoil_weight, ["is not what it should be", "0.125"]),
    "the base of the angles": (spoil_json("config.json", rope_theta=9_999.0), ["model.rope_theta is 10000.0, there 9999.0"]),
    "a norm's epsilon": (spoil_json("config.json", rms_norm_eps=1e-6), ["model.norm_epsilon is 1e-05, there 1e-06"]),
    "the class": (spoil_json("config.json", model_type="mistral", sliding_window=3), ["model.sliding_window is None, there 3"]),
    "the tokenizer": (spoil_tokenizer, ["the tokenizers differ on"]),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_altered_behind_the_writer_is_found(what: str, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof looks at what lies on the disk; nothing of a refused export is left."""
    run, (spoil, words) = make_run(), SPOILED[what]
    write = hugging_face.write_shards

    def write_and_spoil(folder: Path, *arguments: Any) -> Any:
        files = write(folder, *arguments)
        spoil(folder)
        return files

    monkeypatch.setattr(hugging_face, "write_shards", write_and_spoil)
    out = tmp_path / "exported"
    assert_refused(out, words, lambda: export_run(run, out, dtype=torch.float32, say=silent))


def test_a_name_that_is_wrong_in_both_directions_is_found_by_the_logits(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up changed for each other: every weight reads back as it was, and the model is another one."""
    changed = {"mlp.gate_proj": "feed_forward.up", "mlp.up_proj": "feed_forward.gate"}
    monkeypatch.setattr(exchange, "_LAYER", exchange._LAYER | changed)
    run, out = make_run(), tmp_path / "exported"
    assert_refused(out, ["the logits differ by up to", "by number of tokens: 1:"], lambda: export_run(run, out, say=silent))


def test_a_continuation_that_ends_elsewhere_is_found(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end of text in generation_config.json that is the first token chosen: logits are equal, what a user reads is not."""
    run, out = make_run(), tmp_path / "exported"
    tokens: list[int] = []
    continued = proof._continue

    def spy(*arguments: Any) -> Any:
        found = continued(*arguments)
        tokens.extend(found[0])
        return found

    monkeypatch.setattr(proof, "_continue", spy)
    export_run(run, out, say=silent)
    write = hugging_face.write_shards

    def write_and_spoil(folder: Path, *arguments: Any) -> Any:
        spoil_json("generation_config.json", eos_token_id=tokens[0])(folder)
        return write(folder, *arguments)

    monkeypatch.setattr(hugging_face, "write_shards", write_and_spoil)
    other = tmp_path / "other"
    assert_refused(other, ["continuation has 8 tokens here, 1 there"], lambda: export_run(run, other, say=silent))


def test_an_unfit_model_and_a_taken_place_are_refused_before_anything_is_read(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    run = make_run("sinusoidal")
    shutil.rmtree(run.checkpoints)
    assert_refused(out, ["gpt2", "model.positions", "sinusoidal"], lambda: export_run(run, out, say=silent))
    run = make_run("llama")
    config = run.load_config()
    objective = config.objective.model_copy(update={"kind": "prefix", "separator": "x"})
    run.config_file.write_text(dump_config(config.model_copy(update={"objective": objective})))
    assert_refused(out, ["objective.kind is prefix"], lambda: export_run(run, out, say=silent))
    run.config_file.write_text(dump_config(config))
    (out / "mine").mkdir(parents=True)
    assert_refused(out, ["is there already and not empty"], lambda: export_run(run, out, say=silent))
    for below_a_file in (run.config_file / "x", run.config_file / "x" / "y"):
        with pytest.raises(UserError, match=r"cannot be made: .*: (Not a directory|File exists); choose another folder"):
            export_run(run, below_a_file, say=silent)
    (out / "mine").rmdir()
    export_run(run, out, say=silent)  # an empty folder is a place


def test_a_tokenizer_that_adds_tokens_of_its_own_adds_none_in_the_export(make_run: MakeRun, tmp_path: Path) -> None:
    """Training never saw them: a text's ids are those that the model was trained with."""
    run, out = make_run(), tmp_path / "exported"
    tokenizer = Tokenizer.from_file(str(run.tokenizer_file))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    tokenizer.save(str(run.tokenizer_file))
    export_run(run, out, say=silent)
    ids = transformers.AutoTokenizer.from_pretrained(out)("1 plus 1 is 2.")["input_ids"]
    assert ids == tokenizer.encode("1 plus 1 is 2.", add_special_tokens=False).ids
    assert ids[0] != 0


# In ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CASES)
def test_an_export_is_imported_and_exported_again_bit_for_bit(architecture: str, make_run: MakeRun, tmp_path: Path) -> None:
    """fp32 out, in, initial weights of another run, out again: the same bytes; and the section computes the same."""
    form, changes = CASES[architecture]
    run, imported = make_run(form, **changes), tmp_path / "imported"
    export_run(run, tmp_path / "first", dtype=torch.float32, say=silent)
    import_model(tmp_path / "first", imported, say=silent, shard_bytes=30_000, memory_bytes=20_000)
    files = json.loads((imported / IMPORTED).read_text())["files"]
    assert {path.name for path in imported.iterdir()} == {*files, IMPORTED}
    assert all(sha256_of_file(imported / name) == known["sha256"] for name, known in files.items())
    assert len(list(imported.glob("*.safetensors"))) > 1

    run_file = tmp_path / "again.yaml"
    run_file.write_text("include: [imported/model.yaml]\ntraining: {sequence_length: 64}\n")
    config = load_config(run_file)
    assert exchange.what_is_computed(config.model) == exchange.what_is_computed(run.load_config().model)
    assert config.model.initial_weights == str(imported)
    assert config.data.tokenizer.path == str(imported / "tokenizer.json")
    assert config.data.tokenizer.end_of_text == END_OF_TEXT
    model = Decoder(config.model)
    initialize_weights(model, config.model, seed=1)
    again = RunFolder(tmp_path / "run-again")
    again.path.mkdir()
    again.config_file.write_text(dump_config(config))
    shutil.copy(imported / "tokenizer.json", again.tokenizer_file)
    write_commit_of(again, dict(model.named_parameters()), 2, 1)
    export_run(again, tmp_path / "second", dtype=torch.float32, say=silent)
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (tmp_path / "first" / "model.safetensors").read_bytes()


@pytest.fixture(name="saved")
def _saved(tmp_path: Path, seed: int) -> Callable[..., tuple[Path, Any]]:
    """`saved(**config)`: a folder that transformers itself wrote, and its model."""

    def save(dtype: torch.dtype = torch.float32, without_head: bool = False, **settings: Any) -> tuple[Path, Any]:
        small = {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
        }
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(**(small | settings))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        folder = tmp_path / "models" / "saved"
        (model.base_model if without_head else model).save_pretrained(folder, max_shard_size="20KB")
        return folder, model

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_transformers_saved_is_imported_in_its_dtype(
    dtype: torch.dtype, saved: Callable[..., tuple[Path, Any]], tmp_path: Path, seed: int
) -> None:
    source, theirs = saved(dtype)
    out = tmp_path / "imported"
    told: list[str] = []
    import_model(source, out, say=told.append)
    assert "no tokenizer.json" in told[0]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    section = exchange.section_of(theirs.config.to_dict()).model_copy(update={"initial_weights": str(out)})
    ours = decoder_of(section, seed)
    tokens = draw_tokens(section, seed, 2, 50)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs.float()(tokens).logits, atol=1e-5, rtol=0)


def test_gpt2_without_its_head_is_imported(saved: Callable[..., tuple[Path, Any]], tmp_path: Path, seed: int) -> None:
    """GPT-2's first files name tensors without `transformer.`, and hold masks besides."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    source, theirs = saved(without_head=True, model_type="gpt2", **sizes)
    path = next(source.glob("*.safetensors"))
    save_file(load_file(path) | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["h.0.attn.bias"] = path.name
    index.write_text(json.dumps(content))
    import_model(source, tmp_path / "imported", say=silent)
    ours = decoder_of(exchange.section_of(theirs.config.to_dict()).model_copy(update={"initial_weights": str(tmp_path / "imported")}), seed)
    tokens = draw_tokens(ours.section, seed, 2, 50)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_what_cannot_be_imported_is_said_and_not_left_there(saved: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    source, theirs = saved()
    out = tmp_path / "imported"

    def refused(words: list[str]) -> None:
        assert_refused(out, words, lambda: import_model(source, out, say=silent))

    config, index = source / "config.json", source / "model.safetensors.index.json"
    original = config.read_text()
    for changes, words in (
        ({"model_type": "mixtral"}, ["model_type: found mixtral, wanted one of llama"]),
        ({"attention_bias": True}, ["mlp_bias: found false, wanted true as attention_bias is"]),
        ({"num_hidden_layers": 3}, ["missing", "model.layers.2", "left over none"]),
        ({"num_hidden_layers": 1}, ["missing none", "left over", "model.layers.1"]),
        ({"intermediate_size": 40}, ["found shape (48, 32), wanted (40, 32)"]),
        ({"num_attention_heads": 5}, ["not a configuration of llama that can be used"]),
    ):
        spoil_json("config.json", **changes)(source)
        refused(words)
        config.write_text(original)

    whole = index.read_text()
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(["found the file name '../elsewhere.safetensors'"])
    for broken in ("[]", '{"weight_map": 3}', "{"):
        index.write_text(broken)
        refused(["cannot be read as the index"])
    index.write_text(whole)
    for broken in ("{}", "[]"):
        config.write_text(broken)
        refused(["config.json has no model_type"])
    config.write_text('{"model_type": ')
    refused(["config.json cannot be read as JSON", "line 1 column"])
    config.unlink()
    refused(["holds no config.json"])
    for nowhere, words in ((source / "none", "is not there"), (index, "is a file")):
        assert_refused(out, [words], lambda nowhere=nowhere: import_model(nowhere, out, say=silent))
    config.write_text(original)
    (source / "tokenizer.json").write_text('{"x": 1}')
    refused(["tokenizer.json cannot be read as a tokenizer"])
    (source / "tokenizer.json").unlink()
    for path in [index, *source.glob("*.safetensors")]:
        path.unlink()
    refused(["holds no model.safetensors and no"])
    torch.save(theirs.state_dict(), source / "pytorch_model.bin")
    refused(["only pytorch_model.bin, which may run any code when it is opened"])


def test_an_import_that_computes_something_else_is_refused(
    saved: Callable[..., tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = saved()
    changed = {"self_attn.q_norm": "attention.query_norm", "mlp.gate_proj": "feed_forward.up", "mlp.up_proj": "feed_forward.gate"}
    monkeypatch.setattr(exchange, "_LAYER", exchange._LAYER | changed)
    out = tmp_path / "imported"
    assert_refused(out, ["the logits differ by up to"], lambda: import_model(source, out, say=silent))


def test_imported_weights_are_verified_and_have_to_fit(saved: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    source, theirs = saved()
    out = tmp_path / "imported"
    import_model(source, out, say=silent)
    section = exchange.section_of(theirs.config.to_dict()).model_copy(update={"initial_weights": str(out)})
    wider = section.model_copy(update={"vocabulary_size": 128})
    with pytest.raises(UserError, match=r"token_table.weight of shape \(97, 32\), the model wants .* \(128, 32\)"):
        decoder_of(wider, 0)
    with pytest.raises(UserError, match=r"no blocks\.2\.attention_norm\.weight"):
        decoder_of(section.model_copy(update={"num_layers": 3}), 0)
    with pytest.raises(UserError, match="holds no imported weights"):
        decoder_of(section.model_copy(update={"initial_weights": str(source)}), 0)
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    imported_weights.cache_clear()
    with pytest.raises(UserError, match="is not the file that was imported"):
        decoder_of(section, 0)


def test_the_commands_answer(saved: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    source, _ = saved()
    done = CliRunner().invoke(cli.app, ["import", str(source), str(tmp_path / "imported")], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"include: [{tmp_path / 'imported' / 'model.yaml'}]" in done.stderr
    with pytest.raises(UserError, match="is there already and not empty"):
        CliRunner().invoke(cli.app, ["import", str(source), str(tmp_path / "imported")], catch_exceptions=False)
