"""The packaged model files: each can be included, and has exactly the published number of parameters."""

from pathlib import Path

import pytest

import configs
from configs.loader import load_config
from pretrain.model.exchange import choose_architecture
from pretrain.model.weights import parameter_count

FOLDER = Path(configs.__file__).parent / "models"
COUNTS = {
    "demo": 6_147_392,
    "gpt2-124m": 124_439_808,
    "llama-160m": 162_417_408,
    "llama-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def test_every_file_is_counted() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    # A model file alone is no run: what it does not say must be made to fit its context and vocabulary.
    section = load_config(path, ["training.sequence_length=64", "data.tokenizer.vocabulary_size=300"]).model
    assert parameter_count(section) == COUNTS[name]
    assert f"{COUNTS[name]:,} parameters" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_file_can_be_exported(name: str) -> None:
    """Each is a form that transformers knows, and by its own name."""
    section = load_config(FOLDER / f"{name}.yaml", ["training.sequence_length=64", "data.tokenizer.vocabulary_size=300"]).model
    known = {"demo": "qwen3", "tinyllama-1.1b": "llama", "olmo-2-1b": "olmo2", "olmo-2-7b": "olmo2"}
    assert choose_architecture(section) == known.get(name, name.partition("-")[0])
