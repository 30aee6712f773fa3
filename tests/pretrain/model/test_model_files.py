"""The packaged model files: each can be included, and has exactly the published number of parameters."""

from pathlib import Path

import pytest

import configs
from configs.loader import load_config
from pretrain.model.decoder import parameter_count

FOLDER = Path(configs.__file__).parent / "models"
COUNTS = {
    "demo": 6_147_392,
    "gpt2-124m": 124_439_808,
    "llama-160m": 162_417_408,
    "llama-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
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
