"""The picture of where heads read: which are drawn, and what stands in it."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.attention_picture import _hide, _labels
from tests.pretrain.inspecting import Inspect, inspect_in, make_run


@pytest.fixture(name="inspect")
def _inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    return inspect_in(tmp_path, monkeypatch)


@pytest.mark.parametrize("form", ["mistral", "gpt2", "capped"])
def test_layers_heads_and_kinds_of_pictures(form: str, inspect: Inspect, tmp_path: Path, seed: int) -> None:
    make_run(tmp_path / "runs" / "mine", seed, form, num_layers=11)
    chosen = json.loads(inspect("mine", "--text", "1 plus", "--json", "--layers", "2-3, 10", "--heads", "1").out)["text"]
    assert [(one["layer"], one["head"]) for one in chosen["attention"]] == [(2, 1), (3, 1), (10, 1)]
    many = json.loads(inspect("mine", "--text", "1 plus", "--json").out)["text"]
    assert many["layers"] == [0, 1, 3, 4, 6, 7, 9, 10]
    done = inspect("mine", "--text", "1 plus", "--picture", "maps.svg", "--layers", "0")
    assert "maps.svg: 1 of 11 layers, 4 of 4 heads (--layers and --heads choose others)" in done.err
    assert b"<svg" in (tmp_path / "maps.svg").read_bytes()


def test_labels_are_letters_that_the_font_has() -> None:
    assert _labels([" is", "\n", "$x$", "\u202e", "漢", "é", "\\xe6", "a" * 40]) == [
        *("␣is", "\\n", "$x$", "\\u202e", "\\u6f22", "é", "\\xe6"),
        "a" * 13 + "…",
    ]


def test_what_no_place_can_read_is_hidden() -> None:
    ones = torch.ones(4, 4).numpy()
    hidden = torch.tensor(_hide(ones, 2, 0)).isnan().tolist()
    assert hidden == [[column > row or row - column >= 2 for column in range(4)] for row in range(4)]
    hidden = torch.tensor(_hide(ones, None, 3)).isnan().tolist()
    assert hidden == [[column > row and column == 3 for column in range(4)] for row in range(4)]
