"""`pretrain inspect --text`: what a trained model does with a text, as numbers and as a table."""

import json
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.loader import load_config
from data_pipeline.tokenizer import load_tokenizer
from tests.pretrain.inspecting import Inspect, inspect_in, make_run
from tests.pretrain.model.forms import decoder_of
from tests.tiny import END_OF_TEXT

DEMO = Path(__file__).parent.parent.parent / "configs" / "models" / "demo.yaml"
TEXT = "3 plus 4\nis ␛ 漢"


@pytest.fixture(name="inspect")
def _inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    return inspect_in(tmp_path, monkeypatch)


def test_a_text_is_judged_and_drawn(inspect: Inspect, tmp_path: Path, seed: int) -> None:
    run = make_run(tmp_path / "runs" / "mine", seed)
    done = inspect("mine", "--text", TEXT, "--top", 3)
    assert "step-00000010: 1,280 tokens seen" in done.out
    assert "<|endoftext|>|3|" in done.out.replace("␣", "")
    assert "the picture is inspect-mine.png: 2 of 2 layers, 4 of 4 heads" in done.err
    assert (tmp_path / "inspect-mine.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "inspect-mine.png").unlink()

    found = json.loads(inspect("runs/mine", "--text", TEXT, "--top", 3, "--json").out)
    assert not (tmp_path / "inspect-mine.png").exists()
    assert found["model"]["parameters"] > 0
    text = found["text"]
    tokenizer = load_tokenizer(run.tokenizer_file, END_OF_TEXT)
    tokens = [0, *tokenizer.encode(TEXT).ids]
    assert [one["token"] for one in text["places"]] == tokens
    with torch.no_grad():
        logits_TV = decoder_of(load_config(run.config_file).model, seed).eval()(torch.tensor([tokens]))[0]
    for one, following, logits_V in zip(text["places"], [*tokens[1:], None], logits_TV, strict=True):
        assert one["next_token"] == following
        assert [guess["token"] for guess in one["likeliest"]] == logits_V[:300].topk(3).indices.tolist()
        assert one["right"] == (None if following is None else int(logits_V.argmax()) == following)
    assert text["num_judged"] == len(tokens) - 1
    assert [(one["layer"], one["head"]) for one in text["attention"]] == [(layer, head) for layer in range(2) for head in range(4)]
    for one in text["attention"]:
        weights_TT = torch.tensor(one["weights"])
        assert weights_TT.shape == (len(tokens), len(tokens))
        assert weights_TT.triu(1).abs().max() == 0
        torch.testing.assert_close(weights_TT.sum(1), torch.ones(len(tokens)), atol=1e-4, rtol=0)


def test_of_a_long_text_the_beginning_is_drawn(inspect: Inspect, tmp_path: Path, seed: int) -> None:
    make_run(tmp_path / "runs" / "mine", seed, num_layers=1)
    text = "é" * 40  # two tokens each
    done = inspect("mine", "--text", text, "--heads", "0")
    assert "tokens the first 64" in done.err
    assert len(json.loads(inspect("mine", "--text", text, "--json").out)["text"]["attention"][0]["weights"]) == 64
    with pytest.raises(UserError, match=r"wanted 1 to 96 \(model.largest_context\)"):
        inspect("mine", "--text", text * 3)


def test_a_prefix_sees_itself_in_both_directions(inspect: Inspect, tmp_path: Path, seed: int) -> None:
    make_run(tmp_path / "runs" / "mine", seed, objective={"kind": "prefix", "separator": "."})
    text = json.loads(inspect("mine", "--text", "3 plus 4. is 7", "--json").out)["text"]
    assert text["num_prefix"] == [one["piece"] for one in text["places"]].index(".") + 1
    later_TT = torch.tensor(text["attention"][0]["weights"]).triu(1)
    assert (later_TT[: text["num_prefix"] - 1, : text["num_prefix"]].sum(1) > 0).all()
    assert not later_TT[:, text["num_prefix"] :].any()
    judged = text["places"][text["num_prefix"] - 1 : -1]  # inside the prefix nothing was learnt
    assert text["num_judged"] == len(judged)
    assert text["mean_loss"] == pytest.approx(sum(one["loss"] for one in judged) / len(judged))
    assert "are a prefix, which was not learnt from" in inspect("mine", "--text", "3 plus 4. is 7").out


def test_mistakes_with_a_text_are_sentences(inspect: Inspect, tmp_path: Path, seed: int) -> None:
    run = make_run(tmp_path / "runs" / "mine", seed, num_layers=17)
    for arguments, words in {
        ("--layers", "17"): "has the layers 0 to 16, found 17",
        ("--layers", "0-16"): "choose 68 maps; a picture holds 64",
        ("--heads", "x"): "found 'x'; wanted numbers",
        ("--heads", "3-1"): "chooses none",
        ("--picture", "a.txt"): "ends with .png, .pdf or .svg",
        ("--picture", "none/a.png"): "there is no folder none",
        ("model.num_layers=1",): r"another model \(model.num_layers differ",
    }.items():
        with pytest.raises(UserError, match=words):
            inspect("mine", "--text", "1", *arguments)
    with pytest.raises(UserError, match="holds no run"):
        inspect(DEMO, "--text", "1")
    (run.checkpoints / "step-00000010" / "rank_00000.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint that verifies"):
        inspect("mine", "--text", "1")
