"""`pretrain inspect`: the table of any run file or run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.inspect_view import load_described
from pretrain.model.operations import tabulate_model
from tests.pretrain.inspecting import Inspect, inspect_in
from tests.pretrain.model.forms import FORMS, section_of

ROOT = Path(__file__).parent.parent.parent
MODELS = sorted((ROOT / "configs" / "models").glob("*.yaml"))


@pytest.fixture(name="inspect")
def _inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    return inspect_in(tmp_path, monkeypatch)


@pytest.mark.parametrize("path", [*MODELS, ROOT / "configs" / "runs" / "demo.yaml"], ids=lambda path: path.stem)
def test_every_packaged_file_is_told(path: Path, inspect: Inspect) -> None:
    """Also those of models, with which other defaults do not go; the numbers of --json are those of the table, and are printed."""
    found = json.loads(inspect(path, "--json").out)["model"]
    config, _ = load_described(path, [])
    length = config.training.sequence_length
    assert length == min(config.model.largest_context, 256 if path.stem == "demo" and "runs" in path.parts else 2048)
    table = tabulate_model(config.model, config.training.micro_batch_samples, length, 2)
    assert found["parameters"] == table.parameters
    assert f"{table.parameters:,}" in inspect(path).out
    if "models" in path.parts:
        assert f"{table.parameters:,} parameters" in path.read_text()  # as its comment says
    for row, operation in zip(found["operations"], table.operations, strict=True):
        assert {key: row[key] for key in asdict(operation)} == json.loads(json.dumps(asdict(operation)))
        assert row["gives_shape"] == list(table.shape(operation.gives))


@pytest.mark.parametrize("form", FORMS)
def test_the_table_of_every_form_is_told(form: str, inspect: Inspect, tmp_path: Path) -> None:
    section = section_of(form, vocabulary_size=320)
    given = {key: value for key, value in section.model_dump(mode="json").items() if value is not None}
    (tmp_path / "run.yaml").write_text(json.dumps({"model": given}))
    out = inspect("run.yaml", "training.micro_batch_samples=3", "training.global_batch_samples=3").out
    assert "3 samples of 64 tokens" in out
    for name in ("token embedding", "queries", "masked softmax", "residual sum", "loss"):
        assert name in out
    assert ("soft cap" in out) == (form == "capped")
    assert ("query rotation" in out) == (section.positions == "rope")
    assert ("query norm" in out) == (section.qk_norm is not None)
    assert ("what is 5 places back or more" in out) == (form == "mistral")
    assert ("position_table" in out) == (section.positions == "learned")
    assert ("gelu" in out) == (section.feed_forward == "gelu")
    assert "3 x 4 x 64 x 64" in out


def test_the_table_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pretrain.cli import app\napp(['inspect', sys.argv[1]], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(MODELS[0])], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


def test_a_mistake_is_the_files_own(inspect: Inspect, tmp_path: Path) -> None:
    """What is made to fit is only what the file does not say; its own mistakes are told as they are."""
    (tmp_path / "wrong.yaml").write_text("model: {largest_context: 64}\ntraining: {sequence_length: 65}\n")
    with pytest.raises(UserError, match="sequence_length 65 is longer"):
        inspect("wrong.yaml")
    (tmp_path / "right.yaml").write_text("model: {largest_context: 64}\n")
    assert "training.sequence_length=64" in inspect("right.yaml").err
    with pytest.raises(UserError, match="sequence_length 65 is longer"):
        inspect("right.yaml", "training.sequence_length=65")
    with pytest.raises(UserError, match="no such file"):
        inspect("none.yaml")
    with pytest.raises(UserError, match="go with --text"):
        inspect("right.yaml", "--heads", "1")


def test_a_model_of_ones_own_is_listed_by_its_modules(inspect: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_layers.py").write_text("from pretrain.model.decoder import Block\n\n\nclass Mine(Block):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = "{block: 'own_layers:Mine', num_layers: 3, width: 32, num_heads: 2, vocabulary_size: 300, largest_context: 16}"
    (tmp_path / "own.yaml").write_text(f"model: {model}\n")
    out = inspect("own.yaml").out
    assert "own_layers:Mine is code of your own" in out
    assert "blocks.N.attention.query" in out
    found = json.loads(inspect("own.yaml", "--json").out)["model"]
    config, _ = load_described(tmp_path / "own.yaml", ["model.block=null"])
    table = tabulate_model(config.model, 8, 16, 2)
    assert found["parameters"] == table.parameters
    assert found["forward_flops"] > table.forward_flops  # of attention, the whole square


def test_help_has_an_example(inspect: Inspect) -> None:
    assert "Example: pretrain inspect" in inspect("--help").out
