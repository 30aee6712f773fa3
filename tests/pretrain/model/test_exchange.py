"""Our model in Hugging Face's terms and back: configurations, names, shapes, and weights in shards."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.model_section import ModelSection, RopeScalingSection
from pretrain.model import weights_file
from pretrain.model.exchange import (
    FORMS,
    choose_architecture,
    config_of,
    correspondences,
    parameter_shapes,
    reading_theirs,
    section_of,
    their_shape,
    what_is_computed,
)
from pretrain.model.weights_file import NamedTensor, Shards, ranges, write_shards
from tests.pretrain.model import forms

transformers = pytest.importorskip("transformers", reason="needs transformers, which pretrain[huggingface] brings")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "grouped": ("llama", {"norm_epsilon": 1e-6, "rope_theta": 500_000.0, "tied_head": True, "dropout": 0.1}),
    "one key head": ("llama", {"biases": True}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {"sliding_window": 7}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
}
SCALINGS = (
    None,
    RopeScalingSection(kind="linear", factor=4.0, original_context=99),
    RopeScalingSection(kind="llama3", factor=8.0, original_context=16),
    RopeScalingSection(kind="yarn", factor=4.0, original_context=16),
    RopeScalingSection(kind="yarn", factor=2.5, original_context=20, beta_fast=20.0, beta_slow=2.0, attention_factor=1.25),
)


def read_by_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind if scaling else "plain")
def test_a_configuration_comes_back_as_it_went(form: str, scaling: RopeScalingSection | None, tmp_path: Path) -> None:
    """Both through transformers, which fills in its defaults, and as it is written, which is what transformers 4 makes of it."""
    name, changes = CASES[form]
    section = forms.section_of(form, **changes, rope_scaling=scaling if name != "gpt2" else None)
    assert choose_architecture(section) == name
    written = config_of(section, 5, torch.bfloat16)
    read = read_by_transformers(written, tmp_path)
    assert (read["eos_token_id"], read["bos_token_id"]) == (5, 5)
    assert str(read["dtype"]).removeprefix("torch.") == "bfloat16"
    for config in (read, written):
        assert what_is_computed(section_of(config)) == what_is_computed(section)


@pytest.mark.parametrize("form", CASES)
def test_every_tensor_of_theirs_has_its_name_and_shape(form: str, tmp_path: Path) -> None:
    section = forms.section_of(form, **CASES[form][1])
    name, shapes = choose_architecture(section), parameter_shapes(section)
    config = transformers.AutoConfig.for_model(**config_of(section, 0, torch.float32))
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {key: tuple(parameter.shape) for key, parameter in reference.named_parameters()}
    found = correspondences(section, name)
    assert {one.theirs: their_shape(one, shapes) for one in found} == wanted
    assert sorted(key for one in found for key in one.ours) == sorted(shapes)


@pytest.mark.parametrize("form", CASES)
def test_a_range_of_ours_is_read_from_theirs(form: str, seed: int) -> None:
    section, chooser = forms.section_of(form, **CASES[form][1]), random.Random(seed)
    name, shapes = choose_architecture(section), parameter_shapes(section)
    model = forms.decoder_of(section, seed)
    ours = {key: torch.arange(parameter.numel()).float() + 1000 * index for index, (key, parameter) in enumerate(model.named_parameters())}
    theirs: dict[str, torch.Tensor] = {}
    for one in correspondences(section, name):
        whole = torch.cat([ours[key].view(shapes[key]) for key in one.ours])
        theirs[one.theirs] = whole.T.contiguous() if one.transposed else whole
    read = reading_theirs(section, name, lambda key, first, end: theirs[key][first:end])
    for key, values in ours.items():
        for _ in range(3):
            start = chooser.randrange(len(values))
            count = chooser.randrange(len(values) - start) + 1
            assert torch.equal(read(key, start, count), values[start : start + count])
        assert torch.equal(read(key, 0, len(values)), values)


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("sinusoidal", {}, ["gpt2", 'model.positions is "sinusoidal", wanted "learned"', "model.biases is false, wanted true"]),
        ("no positions", {}, ["llama", 'model.positions is "none", wanted "rope"']),
        ("capped", {}, ["model.attention_softcap is 0.5, wanted null", "model.logit_softcap is 0.7"]),
        ("llama", {"block": "mine:Block"}, ['model.block is "mine:Block", wanted null']),
        ("llama", {"implementation": "mine:Model"}, ['model.implementation is "mine:Model", wanted null']),
        ("gpt2", {"num_kv_heads": 2}, ["gpt2", "model.num_kv_heads is 2, wanted 4"]),
        ("gpt2", {"biases": False}, ["gpt2", "model.biases is false, wanted true"]),
        ("gpt2", {"head_width": 10}, ["gpt2", "model.head_width is 10"]),
        ("olmo2", {"sliding_window": 9}, ["olmo2", "model.sliding_window is 9, wanted null"]),
        ("qwen3", {"biases": True}, ["llama", 'model.qk_norm is "head", wanted null']),
        ("mistral", {"biases": True}, ["llama", "model.sliding_window is 5, wanted null"]),
    ],
)
def test_what_no_architecture_expresses_is_refused_by_its_keys(form: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        choose_architecture(forms.section_of(form, **changes))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("llama", {"model_type": "gpt_neox"}, ["model_type: found gpt_neox, wanted one of llama, mistral"]),
        ("llama", {"hidden_act": "gelu"}, ['hidden_act: found "gelu", wanted "silu" or "swish"']),
        ("llama", {"attention_bias": True}, ["mlp_bias: found false, wanted true as attention_bias is"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias: found true, wanted false"]),
        ("olmo2", {"attention_bias": True}, ["attention_bias: found true, wanted false"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ['rope_scaling.rope_type: found "dynamic"']),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, ["rope_scaling.mscale: found 0.7"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["rope_scaling.truncate: found false"]),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor: found 0.5"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ("gpt2", {"activation_function": "relu"}, ['activation_function: found "relu"']),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx: found true, wanted false"]),
    ],
)
def test_what_our_decoder_does_not_compute_is_refused_by_its_key(form: str, changes: dict[str, Any], words: list[str]) -> None:
    config = config_of(forms.section_of(form), 0, torch.float32)
    with pytest.raises(UserError) as refused:
        section_of(config | changes)
    assert all(word in str(refused.value) for word in words), refused.value


def test_the_defaults_of_an_architecture_are_filled_in(tmp_path: Path) -> None:
    """A config.json that says nothing but its type is what transformers makes of it."""
    for name in FORMS:
        section = section_of(read_by_transformers({"model_type": name}, tmp_path))
        assert choose_architecture(section) == name
        config = transformers.AutoConfig.for_model(name)
        with torch.device("meta"):
            reference = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(torch.Size(shape).numel() for shape in parameter_shapes(section).values()) == reference.num_parameters()


# Shards --------------------------------------------------------------------------------------------------------


def tensors_of(values: dict[str, torch.Tensor]) -> list[NamedTensor]:
    return [
        NamedTensor(
            name,
            tuple(value.shape),
            value.dtype,
            lambda value=value: (value.reshape(-1)[start : start + count] for start, count in ranges(value.numel())),
        )
        for name, value in values.items()
    ]


def test_shards_are_bounded_and_hold_every_bit(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "PIECE_ELEMENTS", 7)
    generator, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    values = {
        f"a.{index}": torch.randn(chooser.randrange(1, 9), chooser.randrange(1, 9), generator=generator).to(dtype)
        for index, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16] * 5)
    } | {"big": torch.randn(40, 10, generator=generator), "vector": torch.randn(11, generator=generator)}
    files = write_shards(tmp_path, "model", tensors_of(values), shard_bytes=400)
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert all(weights_file.described(tmp_path / name) == known for name, known in files.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.numel() * value.itemsize for value in values.values())
    loaded = {name: load_file(tmp_path / name) for name in sorted(set(index["weight_map"].values()))}
    assert {name: file for file, tensors in loaded.items() for name in tensors} == index["weight_map"]
    sizes = {file: sum(value.numel() * value.itemsize for value in tensors.values()) for file, tensors in loaded.items()}
    assert all(size <= 400 for file, size in sizes.items() if file != index["weight_map"]["big"])
    assert set(loaded[index["weight_map"]["big"]]) == {"big"}
    shards = Shards([tmp_path / file for file in loaded])
    for name, value in values.items():
        there = loaded[index["weight_map"][name]][name]
        assert there.dtype == value.dtype
        assert torch.equal(there, value)
        start = chooser.randrange(value.numel())
        assert torch.equal(shards.read(name, start, value.numel() - start), value.reshape(-1)[start:])


def test_a_tensor_that_is_cut_short_is_a_defect(tmp_path: Path) -> None:
    short = NamedTensor("a", (3, 2), torch.float32, lambda: iter([torch.zeros(5)]))
    with pytest.raises(ValueError, match="bytes were written"):
        write_shards(tmp_path, "model", [short])


def test_what_is_no_safetensors_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors in here")
    for path in (tmp_path / "model.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            Shards([path])


def test_what_is_computed_leaves_out_only_what_training_looks_at() -> None:
    plain = ModelSection()
    of_training = {"initial_weights": "x", "initial_deviation": 0.1, "depth_scaled_initialization": False, "dropout": 0.2}
    assert what_is_computed(ModelSection(**of_training)) == what_is_computed(plain)
    for change in ({"norm_epsilon": 1e-6}, {"rope_theta": 2.0}, {"sliding_window": 3}, {"largest_context": 16}, {"num_kv_heads": 3}):
        assert what_is_computed(ModelSection(**change)) != what_is_computed(plain)
