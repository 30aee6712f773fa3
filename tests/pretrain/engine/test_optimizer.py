"""What changes the weights: the rate at points computed by hand, and who is decayed."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ModelSection, OptimizerSection, ScheduleSection, TrainingSection
from pretrain.engine.optimizer import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from pretrain.model.decoder import Decoder

# 100 steps of 40 tokens: a run of exactly 4000 tokens.
TRAINING = TrainingSection(total_tokens=3990, sequence_length=10, global_batch_samples=4, micro_batch_samples=2)
OPTIMIZER = OptimizerSection(peak_lr=0.5)


def rate(tokens_seen: int, **schedule: Any) -> float:
    return learning_rate(tokens_seen, TRAINING, OPTIMIZER, ScheduleSection(**schedule))


@pytest.mark.parametrize(
    ("tokens_seen", "expected"),
    # 400 up, a plateau, 1000 down to a tenth of the peak
    [(0, 0.0), (100, 0.125), (399, 0.5 * 399 / 400), (400, 0.5), (1700, 0.5), (3000, 0.5), (3500, 0.275), (3900, 0.095), (4000, 0.05)],
)
def test_warmup_stable_decay_by_hand(tokens_seen: int, expected: float) -> None:
    found = rate(tokens_seen, warmup_tokens=400, decay_tokens=1000, final_ratio=0.1)
    assert found == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("tokens_seen", "expected"),
    # 400 up, then half a cosine over 3600: at a sixth, a third, a half, two thirds and the end
    [(0, 0.0), (200, 0.25), (400, 0.5), (1000, 0.25 * (1 + math.sqrt(3) / 2)), (1600, 0.375), (2200, 0.25), (2800, 0.125)],
)
def test_cosine_by_hand(tokens_seen: int, expected: float) -> None:
    assert rate(tokens_seen, kind="cosine", warmup_tokens=400) == pytest.approx(expected, rel=1e-12)


def test_a_cosine_ends_at_its_final_ratio() -> None:
    assert rate(4000, kind="cosine", warmup_tokens=400) == 0.0
    assert rate(4000, kind="cosine", warmup_tokens=400, final_ratio=0.2) == pytest.approx(0.1, rel=1e-15)
    assert rate(2200, kind="cosine", warmup_tokens=400, final_ratio=0.2) == pytest.approx(0.3, rel=1e-15)
    assert rate(5000, kind="cosine", final_ratio=0.2) == pytest.approx(0.1, rel=1e-15), "behind the end it stays there"


def test_the_fall_is_a_fifth_of_the_run_when_nothing_is_said() -> None:
    assert [rate(tokens) for tokens in (0, 3200, 3600, 4000)] == [0.5, 0.5, 0.25, 0.0]


def test_without_warmup_and_fall_the_rate_is_constant() -> None:
    assert {rate(tokens, warmup_tokens=0, decay_tokens=0) for tokens in range(0, 4001, 40)} == {0.5}


def test_no_warmup_begins_at_the_peak() -> None:
    for kind in ("cosine", "warmup_stable_decay"):
        assert rate(0, kind=kind) == 0.5


def test_the_run_is_whole_steps() -> None:
    """total_tokens 3990 is rounded up to 4000: the rate falls to the end of the last step."""
    assert rate(3990) == pytest.approx(0.5 * 10 / 800, rel=1e-12)


RUNS = st.builds(
    TrainingSection,
    total_tokens=st.integers(1, 10**13),
    sequence_length=st.integers(1, 10**5),
    global_batch_samples=st.integers(1, 10**4),
)
SHARES = st.floats(0, 1)


@settings(max_examples=300, deadline=None)
@given(RUNS, st.sampled_from(["cosine", "warmup_stable_decay"]), SHARES, st.none() | SHARES, SHARES, SHARES, st.floats(1e-12, 1e3))
def test_never_negative_never_above_the_peak(
    training: TrainingSection, kind: Any, warmup: float, fall: float | None, final_ratio: float, place: float, peak: float
) -> None:
    total = training.total_steps * training.tokens_per_step
    warmup_tokens = int(total * warmup)
    decay_tokens = None if fall is None or kind == "cosine" else int((total - warmup_tokens) * fall)
    schedule = ScheduleSection(kind=kind, warmup_tokens=warmup_tokens, decay_tokens=decay_tokens, final_ratio=final_ratio)
    optimizer = OptimizerSection(peak_lr=peak)
    tokens = int(total * place)
    here = learning_rate(tokens, training, optimizer, schedule)
    assert 0 <= here <= peak
    assert here == learning_rate(tokens, training, optimizer, schedule)
    after = learning_rate(tokens + 1, training, optimizer, schedule)
    if tokens + 1 < warmup_tokens:
        assert after >= here  # rises all through the warm-up
    elif tokens >= warmup_tokens:
        assert after <= here * (1 + 1e-12)  # and never again
        assert here >= peak * final_ratio * (1 - 1e-12)


def make_model(**changes: Any) -> Decoder:
    section = {"vocabulary_size": 64, "num_layers": 2, "width": 16, "num_heads": 2, "feed_forward_width": 32, "largest_context": 32}
    return Decoder(ModelSection(**(section | changes)))


@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, {"biases": True, "norm": "layernorm", "positions": "learned"}], ids=str)
def test_matrices_are_decayed_vectors_not_each_parameter_once(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in matrices["params"])
    assert all(parameter.dim() < 2 for parameter in vectors["params"])
    grouped = [id(parameter) for group in (matrices, vectors) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_a_tied_head_is_counted_once() -> None:
    def count(model: Decoder) -> int:
        return sum(parameter.numel() for group in parameter_groups(model, 0.1) for parameter in group["params"])

    assert count(make_model()) - count(make_model(tied_head=True)) == 64 * 16


def test_what_is_frozen_and_what_is_empty_is_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    next(model.parameters()).requires_grad_(False)
    (group,) = parameter_groups(model, 0.5)
    assert group["params"] == [model[1].weight]


def test_the_optimizer_is_what_the_run_file_says() -> None:
    section = OptimizerSection(peak_lr=1e-2, beta1=0.8, beta2=0.97, epsilon=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(make_model(), section)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-2, (0.8, 0.97), 1e-6, True)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_decay_shrinks_matrices_and_leaves_vectors(seed: int) -> None:
    """One step without gradient: a matrix loses exactly rate x decay of itself, a vector nothing."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 4)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerSection(peak_lr=0.5, weight_decay=0.25))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.bias, before["bias"])
    assert torch.equal(model.weight, before["weight"] * (1 - 0.5 * 0.25))
