"""Positions: exact tables, rotations that keep distances, and contexts that are stretched as published."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from configs.model_section import RopeScalingSection
from pretrain.model.positions import rotary_frequencies, rotary_tables, rotate, rows_at, sinusoidal_table
from tests.pretrain.model.forms import decoder_of, draw_tokens, section_of
from tests.pretrain.model.formulas import rotate_by_pairs

CPU = torch.device("cpu")


def test_rotated_scores_depend_on_distance_only(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    cosine, sine = rotary_tables(8192, 16, 10_000.0, None, CPU)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotate(query.reshape(1, 1, 1, 16), cosine[[query_position]], sine[[query_position]])
        turned_key = rotate(key.reshape(1, 1, 1, 16), cosine[[key_position]], sine[[key_position]])
        return float((turned_query.double() * turned_key.double()).sum())

    for distance in (0, 1, 50):
        scores = [score(start + distance, start) for start in (0, 3, 1000, 8000)]
        assert max(scores) - min(scores) < 1e-5, (distance, scores)
    assert score(0, 0) == pytest.approx(float(query @ key), abs=1e-5)
    assert abs(score(50, 0) - score(0, 0)) > 1e-6


def test_rotary_tables_are_exact_at_the_far_end() -> None:
    cosine, sine = rotary_tables(131_072, 128, 500_000.0, None, CPU)
    assert cosine.dtype == sine.dtype == torch.float32
    assert cosine.shape == sine.shape == (131_072, 64)
    for position, pair in ((131_071, 0), (131_071, 1), (99_999, 63), (257, 5)):
        angle = position * 500_000.0 ** (-pair / 64)
        assert float(cosine[position, pair]) == pytest.approx(math.cos(angle), abs=1e-7)
        assert float(sine[position, pair]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_rotation_keeps_lengths_and_turns_halves(seed: int) -> None:
    x = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(seed))
    cosine, sine = rotary_tables(9, 8, 100.0, None, CPU)
    turned = rotate(x, cosine, sine)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cosine, sine)[:, None]
    torch.testing.assert_close(turned, torch.cat([as_complex.real, as_complex.imag], -1))
    assert rotate(x.bfloat16(), cosine, sine).dtype == torch.bfloat16


@pytest.mark.parametrize("own_positions", [False, True])
def test_gradients_of_a_rotation_are_those_of_the_matrices(seed: int, own_positions: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 50, (2, 5), generator=generator) if own_positions else slice(7, 12)
    tables = [rows_at(positions, table) for table in rotary_tables(50, 6, 100.0, None, CPU)]
    x = torch.randn(2, 5, 3, 6, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate_by_pairs(x, *tables), x)
    weights = torch.randn(x.shape, generator=generator).double()
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        given = x.detach().to(dtype).requires_grad_()
        found, expected = rotate(given, *tables), rotate_by_pairs(given.double(), *tables)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)
        one, other = (torch.autograd.grad((turned * weights).sum(), given)[0] for turned in (found, expected))
        torch.testing.assert_close(one, other, rtol=tolerance, atol=4 * tolerance)


def test_rows_are_those_of_the_positions(seed: int) -> None:
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    positions = torch.tensor([[0, 8, 8], [3, 0, 8]])
    assert torch.equal(rows_at(slice(2, 5), table), table[2:5])
    assert torch.equal(rows_at(positions, table), table[positions])
    rows_at(positions.int(), table).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [2, 0, 0, 1, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("form", ["llama", "sinusoidal"])
def test_tables_stay_exact_when_the_model_is_cast(seed: int, form: str) -> None:
    model = decoder_of(section_of(form), seed).bfloat16()
    model(draw_tokens(model.section, seed, 1, 40))
    tables = (*rotary_tables(64, 8, 10_000.0, None, CPU), sinusoidal_table(64, 32, CPU))
    assert {table.dtype for table in tables} == {torch.float32}
    assert float(tables[0][63, 0]) == pytest.approx(math.cos(63), abs=1e-7)
    assert float(tables[2][63, 1]) == pytest.approx(math.cos(63), abs=1e-7)
    assert float(tables[2][63, 2]) == pytest.approx(math.sin(63 * 10_000 ** (-2 / 32)), abs=1e-7)
    assert not list(model.buffers())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["llama", "sinusoidal"])
def test_tables_first_made_while_evaluating_serve_training(seed: int, form: str) -> None:
    rotary_tables.cache_clear()
    sinusoidal_table.cache_clear()
    model = decoder_of(section_of(form), seed)
    tokens = draw_tokens(model.section, seed, 1, 8)
    with torch.inference_mode():
        model(tokens)
    model(tokens, tokens).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_odd_width_of_sinusoids() -> None:
    assert sinusoidal_table(4, 7, CPU).shape == (4, 7)


# Stretched rotations -----------------------------------------------------------------------------------

STRETCHED: list[dict[str, Any]] = [
    {"kind": "linear", "factor": 1.0, "original_context": 512},
    {"kind": "linear", "factor": 4.0, "original_context": 512},
    {"kind": "llama3", "factor": 8.0, "original_context": 8192},
    {"kind": "llama3", "factor": 32.0, "original_context": 8192},
    {"kind": "llama3", "factor": 3.5, "original_context": 1000, "low_frequency_factor": 2.0, "high_frequency_factor": 9.0},
    {"kind": "yarn", "factor": 4.0, "original_context": 32768},
    {"kind": "yarn", "factor": 16.0, "original_context": 4096, "beta_fast": 24.0, "beta_slow": 2.0},
    {"kind": "yarn", "factor": 40.0, "original_context": 4096, "attention_factor": 1.25},
    {"kind": "yarn", "factor": 1.0, "original_context": 2048},
]
SHAPES = [(64, 10_000.0), (128, 500_000.0), (96, 1_000_000.0), (8, 10_000.0)]


def published_frequencies(scaling: dict[str, Any], head_width: int, theta: float) -> tuple[list[float], float]:
    """Pair by pair, by wavelength, as the papers have it."""
    kind, factor, context = scaling["kind"], scaling["factor"], scaling["original_context"]
    found: list[float] = []
    for pair in range(head_width // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_width)
        frequency = 2 * math.pi / wavelength
        if kind == "linear":
            found.append(frequency / factor)
        elif kind == "llama3":
            low, high = scaling.get("low_frequency_factor", 1.0), scaling.get("high_frequency_factor", 4.0)
            if wavelength < context / high:
                found.append(frequency)
            elif wavelength > context / low:
                found.append(frequency / factor)
            else:
                smooth = (context / wavelength - low) / (high - low)
                found.append((1 - smooth) * frequency / factor + smooth * frequency)
        else:
            # The pair, as a real number, whose wave fits so many times into the context.
            fast, slow = (
                math.log(context / (2 * math.pi * turns)) / math.log(theta) * head_width / 2
                for turns in (scaling.get("beta_fast", 32.0), scaling.get("beta_slow", 1.0))
            )
            first, last = max(math.floor(fast), 0), min(math.ceil(slow), head_width - 1)
            ramp = min(max((pair - first) / (last - first), 0.0), 1.0)
            found.append(frequency / factor * ramp + frequency * (1 - ramp))
    magnitude = scaling.get("attention_factor", 0.1 * math.log(factor) + 1) if kind == "yarn" else 1.0
    return found, magnitude


@pytest.mark.parametrize(("head_width", "theta"), SHAPES)
@pytest.mark.parametrize("scaling", STRETCHED, ids=str)
def test_stretched_frequencies_are_the_published_ones(scaling: dict[str, Any], head_width: int, theta: float) -> None:
    """Against the papers, written out."""
    found, magnitude = rotary_frequencies(head_width, theta, RopeScalingSection(**scaling))
    expected, expected_magnitude = published_frequencies(scaling, head_width, theta)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert magnitude == pytest.approx(expected_magnitude, rel=1e-12)


@pytest.mark.parametrize(("head_width", "theta"), SHAPES)
@pytest.mark.parametrize("scaling", STRETCHED, ids=str)
def test_stretched_frequencies_are_those_of_transformers(scaling: dict[str, Any], head_width: int, theta: float) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers, which pretrain[huggingface] brings")
    names = {"low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor"}
    parameters = {names.get(key, key): value for key, value in scaling.items() if key not in ("kind", "original_context")}
    parameters |= {"rope_type": scaling["kind"], "rope_theta": theta}
    if scaling["kind"] != "linear":
        parameters["original_max_position_embeddings"] = scaling["original_context"]
    if scaling["kind"] == "llama3":
        parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | parameters
    context = int(scaling["original_context"] * scaling["factor"]) + 1
    config = transformers.LlamaConfig(head_dim=head_width, max_position_embeddings=context, rope_parameters=parameters)
    theirs, their_magnitude = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["kind"]](config, CPU)
    found, magnitude = rotary_frequencies(head_width, theta, RopeScalingSection(**scaling))
    np.testing.assert_allclose(found, theirs.double().numpy(), rtol=2e-6)
    assert magnitude == pytest.approx(float(their_magnitude), rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(kind: Any) -> None:
    scaling = RopeScalingSection(kind=kind, factor=1.0, original_context=32)
    for stretched, plain in zip(rotary_tables(64, 16, 10_000.0, scaling, CPU), rotary_tables(64, 16, 10_000.0, None, CPU), strict=True):
        assert (stretched - plain).abs().max() <= (0 if kind == "linear" else 1e-6)


def test_stretched_tables_hold_the_frequencies_and_the_magnitude() -> None:
    scaling = RopeScalingSection(**STRETCHED[7])
    frequencies, magnitude = rotary_frequencies(64, 10_000.0, scaling)
    cosine, sine = rotary_tables(5000, 64, 10_000.0, scaling, CPU)
    assert magnitude == 1.25
    for position, pair in itertools.product((0, 1, 4999), (0, 13, 31)):
        assert float(cosine[position, pair]) == pytest.approx(1.25 * math.cos(position * frequencies[pair]), abs=2e-7)
        assert float(sine[position, pair]) == pytest.approx(1.25 * math.sin(position * frequencies[pair]), abs=2e-7)


def test_frequencies_lie_between_the_plain_and_the_stretched_ones() -> None:
    """No kind turns a pair faster than before, or slower than by its factor; the fastest keep their pace in llama3 and yarn."""
    for scaling, (head_width, theta) in itertools.product(STRETCHED, SHAPES):
        plain, _ = rotary_frequencies(head_width, theta, None)
        found, _ = rotary_frequencies(head_width, theta, RopeScalingSection(**scaling))
        assert (found <= plain * (1 + 1e-12)).all()
        assert (found >= plain / scaling["factor"] * (1 - 1e-12)).all()
        assert (found[0] == plain[0]) == (scaling["kind"] != "linear" or scaling["factor"] == 1)


def test_the_decoder_turns_by_the_stretched_tables(seed: int) -> None:
    """Positions divided by 4 are angles divided by 4: every fourth place of the stretched model stands where the plain one has it."""
    plain = decoder_of(section_of("grouped", initial_deviation=0.2), seed)
    scaling = {"kind": "linear", "factor": 4.0, "original_context": 16}
    stretched = decoder_of(section_of("grouped", initial_deviation=0.2, rope_scaling=scaling), seed)
    tokens, positions = draw_tokens(plain.section, seed, 2, 10), torch.arange(10).expand(2, -1)
    torch.testing.assert_close(stretched(tokens, positions_BT=4 * positions), plain(tokens), rtol=1e-4, atol=1e-5)
    assert (stretched(tokens) - plain(tokens)).abs().max() > 1e-3
