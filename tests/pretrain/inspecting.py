"""For tests of the verb `inspect`: a way to run it, and a run folder with a model."""

import functools
from pathlib import Path
from typing import Any

import pytest

from configs.loader import dump_config
from configs.schema import RunConfig
from data_pipeline.tokenizer import train_tokenizer
from pretrain.checkpoint.image import Image
from pretrain.checkpoint.verify import Commit, write_manifest
from pretrain.run.folder import RunFolder
from pretrain.state import TrainState
from tests.pretrain.model.forms import decoder_of, section_of
from tests.pretrain.verbs import Run, call
from tests.tiny import END_OF_TEXT, tiny_texts

Inspect = Run


def inspect_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """What runs the verb in a folder of its own; an error of ours is raised."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    return functools.partial(call, "inspect")


@functools.cache
def _train_tokenizer() -> str:
    return train_tokenizer(tiny_texts(60, 7), 300, END_OF_TEXT).to_str()


def make_run(folder: Path, seed: int, form: str = "grouped", objective: Any = None, **changes: Any) -> RunFolder:
    """A run folder with one commit of a model whose weights are drawn, and a tokenizer of 300 entries."""
    section = section_of(form, **({"vocabulary_size": 320, "initial_deviation": 0.3, "largest_context": 96} | changes))
    given: dict[str, Any] = {"data": {"tokenizer": {"vocabulary_size": 300}}, "training": {"sequence_length": 32}}
    config = RunConfig(**given, run={"name": folder.name}, model=section, objective=objective or {})  # type: ignore[arg-type]
    run = RunFolder(folder)
    step = run.checkpoints / "step-00000010"
    step.mkdir(parents=True)
    run.config_file.write_text(dump_config(config))
    run.tokenizer_file.write_text(_train_tokenizer())
    weights = {name: parameter.detach() for name, parameter in decoder_of(section, seed).named_parameters()}
    parameters = {name: {"shape": list(weight.shape), "scalars": {}} for name, weight in weights.items()}
    about: dict[str, Any] = {"parameters": parameters, "buffers": {}, "groups": [], "loss_scale": {}}
    files = Image(0, {f"weight|{name}|0": weight.reshape(-1) for name, weight in weights.items()}, about).write(step)
    write_manifest(Commit(step, TrainState(10, 40, 1280), files, {}, {}, world_size=1, attempt=1, loss=1.0, time=0))
    return run
