"""The table of a model says what flows: shapes, parameters, FLOPs and kept bytes are compared with a real model, for every form of it."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.model_section import ModelSection
from pretrain.model import decoder as decoder_module
from pretrain.model.attention import causal_attention
from pretrain.model.decoder import Decoder
from pretrain.model.inspection import attention_weights
from pretrain.model.operations import ModelTable, Operation, tabulate_model
from pretrain.model.weights import initialize_weights, parameter_count
from tests.pretrain.model.forms import FORMS, decoder_of, draw_tokens, section_of

B, T = 2, 16
FUSED = [form for form in FORMS if form != "capped"]
"""On a CPU a soft cap is computed step by step, and much more is kept."""


def table_of(section: ModelSection, **options: Any) -> ModelTable:
    return tabulate_model(section, B, T, 4, **options)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_of_the_model(form: str) -> None:
    section = section_of(form)
    table = table_of(section)
    assert table.parameters == parameter_count(section)
    for name, module in Decoder(section).named_modules():
        rows = [row for row in table.operations if row.module == name.replace("blocks.0.", "blocks.N.") and row.parameters]
        if "blocks.1." not in name and (own := sum(parameter.numel() for parameter in module.parameters(recurse=False))):
            assert [row.parameters for row in rows] == [own], name


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_those_that_flow(form: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters and leaves each module, the rotation, and attention; rows without a module must fit the rows around them."""
    flowed: dict[str, list[tuple[Any, ...]]] = {}

    def write(name: str, given: Any, result: torch.Tensor) -> None:
        flowed.setdefault(name, []).append((tuple(tuple(x.shape) for x in given if isinstance(x, torch.Tensor)), tuple(result.shape)))

    def attend(query_BTNH: torch.Tensor, key_BSKH: torch.Tensor, value_BSKH: torch.Tensor, **options: Any) -> torch.Tensor:
        result = causal_attention(query_BTNH, key_BSKH, value_BSKH, **options)
        weights = attention_weights(query_BTNH, key_BSKH, visible=options["visible"], softcap=options["softcap"])
        write("scores", (query_BTNH, key_BSKH), weights)
        write("weighted values", (weights, value_BSKH), result)
        return result

    def rotate(x: torch.Tensor, *angles: torch.Tensor) -> torch.Tensor:
        result = plain(x, *angles)
        write("rotation", (x,), result)
        return result

    plain = decoder_module.rotate
    monkeypatch.setattr(decoder_module, "rotate", rotate)
    section = section_of(form)
    model = Decoder(section, attend)
    initialize_weights(model, section, seed)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, given, result, name=name: write(name, given, result))
    model.eval()(draw_tokens(section, seed, B, T))

    table = table_of(section)
    rows = {row.name: row for row in table.operations}

    def shapes(row: Operation) -> tuple[Any, ...]:
        return tuple(map(table.shape, row.takes)), table.shape(row.gives)

    for row in table.operations:
        if row.name == "head":
            assert flowed[row.module][-1] == shapes(row)  # a tied table is called twice, the second time as head
        elif row.name == "positions":
            assert table.shape(row.gives) == flowed["blocks.0"][0][0][0]
            if row.module:
                assert flowed[row.module] == [((), table.shape(row.takes[1]))]  # it is given a slice
        elif row.module:
            assert flowed[row.module.replace(".N.", ".0.")][0] == shapes(row), row.name
    assert flowed["scores"][0] == shapes(rows["scores"])
    assert flowed["weighted values"][0] == shapes(rows["weighted values"])
    assert len(flowed["scores"]) == table.times(rows["scores"]) == section.num_layers
    if section.positions == "rope":
        assert flowed["rotation"][:2] == [shapes(rows["query rotation"]), shapes(rows["key rotation"])]
    assert flowed["blocks.0"][0] == ((table.shape("B T D"), *flowed["blocks.0"][0][0][1:]), shapes(rows["residual sum"])[1])
    assert shapes(rows["activation"])[1] == flowed["blocks.0.feed_forward.down"][0][0][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [T, 5, 1])
def test_flops_are_those_that_pytorch_counts(form: str, tokens: int, seed: int) -> None:
    """Of matrix products exactly; of attention PyTorch counts the whole square, we what is seen of it."""
    section = section_of(form)
    table = tabulate_model(section, B, tokens, 4)
    model = decoder_of(section, seed).eval().requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(draw_tokens(section, seed, B, tokens))
    attention = [row for row in table.operations if row.name in ("scores", "weighted values")]
    products = sum(row.flops * table.times(row) for row in table.operations if row not in attention)
    square = 4 * B * section.num_heads * section.features_per_head * tokens**2 * section.num_layers
    assert counter.get_total_flops() == products + square
    window = min(section.sliding_window or tokens, tokens)
    share = (window * tokens - window**2 / 2) / tokens**2
    assert sum(row.flops for row in attention) * section.num_layers == square * share
    assert products == 2 * B * tokens * table.matrix_parameters
    training = table.training_flops_per_token()
    assert training["palm"] * B * tokens == 3 * (products + square)
    assert training["causal"] * B * tokens == 3 * (products + square * share)


def test_the_formulas_give_what_was_published_for_llama_3_8b() -> None:
    """57.9 and 51.5 GFLOPs a token at 8192 tokens; parameters as in its model card's configuration."""
    section = ModelSection(
        vocabulary_size=128256, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, feed_forward_width=14336, largest_context=8192
    )
    table = tabulate_model(section, 1, 8192, 2)
    assert (table.parameters, table.matrix_parameters) == (8_030_261_248, 7_504_658_432)
    assert {name: round(value / 1e9, 1) for name, value in table.training_flops_per_token().items()} == {"palm": 57.9, "causal": 51.5}


@pytest.mark.parametrize("form", FUSED)
def test_kept_bytes_are_those_that_autograd_saves(form: str, seed: int) -> None:
    """Each tensor once, exactly, but for what the fused kernels of a GPU do not need: RMSNorm's normalised input on a CPU."""
    section = section_of(form, largest_context=T)
    model = decoder_of(section, seed).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.is_floating_point():
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    normalised = []
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda _module, given, _result: normalised.append(given[0].numel() * 4))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(draw_tokens(section, seed, B, T), draw_tokens(section, seed + 1, B, T))
    # Tables of angles and masks are the same for all layers, and no part of a micro-batch.
    tables = [x for x in saved.values() if x.dim() == 3 and x.shape[1:] == (1, section.features_per_head // 2)]
    masks = [x for x in saved.values() if x.dim() == 4 and x.shape[-2:] == (T, T)]
    measured = sum(x.untyped_storage().nbytes() for x in saved.values())
    measured -= sum(x.untyped_storage().nbytes() for x in (*tables, *masks)) + sum(normalised)
    assert measured == table_of(section).kept_bytes


def test_recomputation_keeps_less() -> None:
    section = section_of("qwen3", num_layers=3)
    whole, selective, full = (table_of(section, recompute=how) for how in (None, "selective", "full"))
    assert full.kept_bytes < selective.kept_bytes < whole.kept_bytes
    in_layers = sum(row.kept_bytes * full.times(row) for row in full.operations if row.in_layer)
    assert in_layers == 3 * B * T * section.width * 4
    assert any("computes each layer once more" in note for note in full.notes)
    kept = {row.name for row in selective.operations if row.in_layer and row.kept_bytes}
    assert kept == {"queries", "keys", "values", "weighted values", "mix heads", "gate", "up", "down", "residual sum"}


def test_dropout_is_a_row_where_there_is_some() -> None:
    rows = [row for row in table_of(section_of(dropout=0.1)).operations if row.name == "dropout"]
    assert [row.in_layer for row in rows] == [False, True, True]
    assert all("10 %" in row.does for row in rows)


def test_half_precision_halves_all_but_statistics() -> None:
    four, two = (tabulate_model(section_of("gpt2"), B, T, size) for size in (4, 2))
    for one, other in zip(four.operations, two.operations, strict=True):
        assert one.name == "loss" or one.output_bytes == (None if other.output_bytes is None else 2 * other.output_bytes)
    statistics = section_of("gpt2").num_layers * (2 * 2 * B * T + B * 4 * T) * 4 + 2 * B * T * 4
    assert four.kept_bytes - statistics == 2 * (two.kept_bytes - statistics)


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys\nfrom configs.model_section import ModelSection\nfrom pretrain.model.operations import tabulate_model\n"
        "tabulate_model(ModelSection(), 1, 8, 2)\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="largest_context is 64"):
        tabulate_model(section_of(), 1, 65, 2)
