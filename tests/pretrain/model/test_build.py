"""A run file's model: ours, ours with a layer or loss of the user's own, or one that is the user's altogether."""

import hashlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.functions import code_of_the_user
from configs.objective_section import ObjectiveSection
from configs.schema import RunConfig
from pretrain.model.attention import KeyValueCache
from pretrain.model.build import build_model
from pretrain.model.decoder import Block, Decoder
from pretrain.model.loss import IGNORE, summed_cross_entropy
from pretrain.model.weights import initialize_weights
from tests.pretrain.model.forms import draw_documents, draw_tokens, positions_inside, section_of

PARTS = '''
import torch
from torch import nn

from pretrain.model.decoder import Attention, SwiGLU, make_norm
from pretrain.model.loss import IGNORE, summed_cross_entropy


class Parallel(nn.Module):
    """Attention and feed-forward side by side (Wang & Komatsuzaki 2021), with a scale of its own."""

    def __init__(self, section, attend):
        super().__init__()
        self.norm = make_norm(section, section.width)
        self.attention = Attention(section, attend)
        self.feed_forward = SwiGLU(section)
        self.scale = nn.Parameter(torch.tensor(float("nan")))
        self.factor = section.settings["factor"]

    def forward(self, x_BTD, rotation, visible=None, cache=None, start=0):
        normed_BTD = self.norm(x_BTD)
        added_BTD = self.attention(normed_BTD, rotation, visible, cache, start) + self.feed_forward(normed_BTD)
        return x_BTD + self.factor * self.scale * added_BTD


class Bigram(nn.Module):
    """The smallest language model: what follows a token depends on it alone."""

    def __init__(self, section):
        super().__init__()
        self.section = section
        self.table = nn.Embedding(section.vocabulary_size, section.vocabulary_size)

    def forward(self, tokens_BT, labels_BT=None, *, documents_BT=None, positions_BT=None, prefix_BT=None, cache=None, last_only=False):
        logits_BTV = self.table(tokens_BT[:, -1:] if last_only and labels_BT is None else tokens_BT)
        if labels_BT is None:
            return logits_BTV
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def squared(hidden_CD, weight_VD, labels_C, *, softcap=None):
    """Twice the cross-entropy, and the squares of the hidden states."""
    return 2 * summed_cross_entropy(hidden_CD, weight_VD, labels_C, softcap=softcap) + hidden_CD.float().square().sum()


number = 7
'''
numbers = itertools.count()


@pytest.fixture(name="module")
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder; each test's has another name, as a process imports a name once."""
    name = f"parts_of_the_user_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # what is added to it here is gone afterwards
    return name


def begun(model: Decoder, seed: int) -> Decoder:
    initialize_weights(model, section_of(initial_deviation=0.1), seed)
    return model


def code_of(**sections: dict[str, Any]) -> dict[str, str]:
    return code_of_the_user(RunConfig.model_validate(sections))


def test_without_anything_of_ones_own_it_is_the_decoder_with_cross_entropy(seed: int) -> None:
    model = begun(build_model(section_of("qwen3"), ObjectiveSection()), seed)
    assert type(model) is Decoder
    assert {type(block) for block in model.blocks} == {Block}
    plain = begun(Decoder(section_of("qwen3")), seed)
    tokens = draw_tokens(plain.section, seed, 2, 9)
    losses = [one(tokens, tokens) for one in (model, plain)]
    assert torch.equal(*losses)
    for one, other in zip(
        *(torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, plain), strict=True)), strict=True
    ):
        assert torch.equal(one, other)
    assert code_of() == {}


def test_z_loss_is_for_training_alone(seed: int) -> None:
    model = begun(build_model(section_of("capped"), ObjectiveSection(z_loss=0.1)), seed)
    plain = begun(build_model(section_of("capped"), ObjectiveSection()), seed)
    tokens = draw_tokens(plain.section, seed, 2, 9)
    log_z = plain(tokens).double().logsumexp(-1)
    assert model(tokens, tokens).item() == pytest.approx(plain(tokens, tokens).item() + 0.1 * log_z.square().sum().item(), rel=1e-5)
    assert torch.equal(model.eval()(tokens, tokens), plain.eval()(tokens, tokens))


def test_a_block_of_ones_own_stands_in_the_decoder(seed: int, module: str) -> None:
    """It is made with the section and the attention, and learns, packs and generates like ours."""
    section = section_of("grouped", block=f"{module}:Parallel", settings={"factor": 0.5}, num_layers=3)
    model = begun(build_model(section, ObjectiveSection()), seed)
    assert [type(block).__name__ for block in model.blocks] == ["Parallel"] * 3
    assert model.blocks[2].get_parameter("scale") == 1
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    tokens, documents = draw_tokens(section, seed, 2, 20), draw_documents(seed, 2, 20)
    whole = model(tokens)
    cache = KeyValueCache(3, 20)
    with torch.no_grad():
        parts = [model(tokens[:, start:end], cache=cache) for start, end in ((0, 11), (11, 12), (12, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    packed = model(tokens, documents_BT=documents, positions_BT=positions_inside(documents))
    last = documents[0] == documents[0].max()
    torch.testing.assert_close(packed[0, last], model(tokens[0, None, last])[0], rtol=1e-5, atol=1e-5)
    model(tokens, tokens).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("scale").zero_()
        assert torch.equal(model(tokens), model.head("logits", model.final_norm(model.token_table("look_up", tokens))))  # type: ignore[misc]


def test_a_loss_of_ones_own_is_what_training_minimises(seed: int, module: str) -> None:
    model = begun(build_model(section_of("capped"), ObjectiveSection(loss=f"{module}:squared")), seed)
    plain = begun(build_model(section_of("capped"), ObjectiveSection()), seed)
    tokens = draw_tokens(plain.section, seed, 2, 9)
    normed: list[torch.Tensor] = []
    plain.final_norm.register_forward_hook(lambda _module, _inputs, x: normed.append(x))
    expected = 2 * plain(tokens, tokens) + normed[0].square().sum()
    torch.testing.assert_close(model(tokens, tokens), expected)
    assert torch.equal(model.eval()(tokens, tokens), plain.eval()(tokens, tokens))


def test_a_model_of_ones_own_is_called_like_the_decoder(seed: int, module: str) -> None:
    section = section_of(implementation=f"{module}:Bigram")
    model = begun(build_model(section, ObjectiveSection()), seed)
    assert type(model).__name__ == "Bigram"
    tokens, documents = draw_tokens(section, seed, 2, 9), draw_documents(seed, 2, 9)
    labels = tokens.masked_fill(documents == 0, IGNORE)
    logits = model(tokens, documents_BT=documents, positions_BT=documents, prefix_BT=documents == 0)
    loss = model(tokens, labels, documents_BT=documents, positions_BT=documents, prefix_BT=documents == 0)
    torch.testing.assert_close(loss, summed_cross_entropy(logits.flatten(0, 1), torch.eye(section.vocabulary_size), labels.flatten()))
    assert torch.equal(model(tokens, last_only=True), logits[:, -1:])
    first = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert torch.equal(begun(model, seed).get_parameter("table.weight"), first["table.weight"])


WRONG: list[tuple[str, str]] = [
    ("no_such_module_of_the_user:Model", "the module 'no_such_module_of_the_user' cannot be imported (ModuleNotFoundError"),
    (
        "{module}:Modle",
        "{module} has no function 'Modle'; it has: Attention, Bigram, Parallel, SwiGLU, make_norm, squared, summed_cross_entropy.",
    ),
    ("{module}:number", "{module} has no function 'number'"),
    ("{module}_broken:Model", "the module '{module}_broken' cannot be imported (ZeroDivisionError"),
    ("itertools:count", "itertools has no source file, so its content cannot be recorded"),
]
BUILDS: dict[str, Callable[[str], object]] = {
    "model": lambda path: build_model(section_of(implementation=path), ObjectiveSection()),
    "block": lambda path: build_model(section_of(block=path), ObjectiveSection()),
    "loss": lambda path: build_model(section_of(), ObjectiveSection(loss=path)),
    "code of a model": lambda path: code_of(model={"implementation": path}),
    "code of a block": lambda path: code_of(model={"block": path}),
    "code of a loss": lambda path: code_of(objective={"loss": path}),
    "code of an objective": lambda path: code_of(objective={"kind": path}),
    "code of an optimizer": lambda path: code_of(optimizer={"kind": path}),
}


@pytest.mark.parametrize("what", BUILDS)
@pytest.mark.parametrize(("path", "words"), WRONG, ids=lambda one: one.partition(":")[0] if ":" in one else "")
def test_a_path_that_leads_nowhere_is_the_users_mistake(module: str, what: str, path: str, words: str) -> None:
    Path(f"{module}_broken.py").write_text("1 / 0")
    with pytest.raises(UserError) as refusal:
        BUILDS[what](path.format(module=module))
    assert str(refusal.value).startswith(f"{path.format(module=module)}: {words.format(module=module)}")


@pytest.mark.parametrize(("key", "section"), [("block", "section, attend"), ("implementation", "section")])
def test_what_the_users_class_raises_is_said_with_its_place(tmp_path: Path, module: str, key: str, section: str) -> None:
    source = Path(f"{module}_raising.py")
    source.write_text("class Few:\n    def __init__(self):\n        pass\n\n\nclass Raising:\n    def __init__(self, *_):\n        1 / 0\n")
    with pytest.raises(UserError, match=rf"model.{key}: {module}_raising:Raising\({section}\) raised ZeroDivisionError: .* \(line 8 of"):
        build_model(section_of(**{key: f"{module}_raising:Raising"}), ObjectiveSection())
    with pytest.raises(UserError, match=r"raised TypeError: .*takes 1 positional argument but \d were given"):
        build_model(section_of(**{key: f"{module}_raising:Few"}), ObjectiveSection())


def test_the_users_code_is_known_by_its_source(module: str) -> None:
    """One hash for each path; it follows the file, not what a process has imported of it."""
    Path(f"{module}_other.py").write_text(PARTS)
    sections: dict[str, Any] = {
        "model": {"block": f"{module}:Parallel"},
        "objective": {"kind": f"{module}_other:squared", "loss": f"{module}:squared"},
        "optimizer": {"kind": f"{module}:number"},
    }
    digest = hashlib.sha256(PARTS.encode()).hexdigest()
    with pytest.raises(UserError, match="has no function 'number'"):
        code_of(**sections)
    del sections["optimizer"]
    assert code_of(**sections) == {f"{module}:Parallel": digest, f"{module}:squared": digest, f"{module}_other:squared": digest}
    Path(f"{module}.py").write_text(PARTS + "# another remark\n")
    changed = hashlib.sha256((PARTS + "# another remark\n").encode()).hexdigest()
    assert code_of(**sections) == {f"{module}:Parallel": changed, f"{module}:squared": changed, f"{module}_other:squared": digest}
    assert code_of(model={"implementation": f"{module}:Bigram"}, optimizer={"kind": f"{module}_other:squared"}) == {
        f"{module}:Bigram": changed, f"{module}_other:squared": digest,
    }  # fmt: skip
