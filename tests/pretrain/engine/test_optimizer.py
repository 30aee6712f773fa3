"""What changes the weights: the rate at points computed by hand, and who is decayed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.model_section import ModelSection
from configs.schema import BatchSection, OptimizerSection, ScheduleSection, TrainingSection
from pretrain.engine.optimizer import build_optimizer, check_groups, parameter_groups, rate_share, set_learning_rate
from pretrain.model.decoder import Decoder

# 100 steps of 40 tokens: a run of exactly 4000 tokens.
TRAINING = TrainingSection(total_tokens=3990, sequence_length=10, global_batch_samples=4, micro_batch_samples=2)
OPTIMIZER = OptimizerSection(peak_lr=0.5)


def rate(tokens_seen: int, **schedule: Any) -> float:
    return OPTIMIZER.peak_lr * rate_share(tokens_seen, TRAINING, ScheduleSection(**schedule))


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


def test_a_ramp_changes_the_run_s_end_and_nothing_else() -> None:
    """Steps of 1, 2 and 4 samples of 10 tokens: 30 + 100 + 97 x 40 tokens. The rate goes by tokens, whatever the steps."""
    ramp = tuple(BatchSection(until_tokens=until, global_batch_samples=size) for until, size in ((30, 1), (120, 2)))
    ramped = TRAINING.model_copy(update={"batch_ramp": ramp})
    assert (ramped.total_steps, ramped.steps.total_tokens) == (3 + 5 + 97, 4010)
    schedule = ScheduleSection(warmup_tokens=400, decay_tokens=1000)
    assert [rate_share(tokens, ramped, schedule) for tokens in (0, 100, 400, 3010, 3510, 4010)] == [0, 0.25, 1, 1, 0.5, 0]


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
    tokens = int(total * place)
    here = peak * rate_share(tokens, training, schedule)
    assert 0 <= here <= peak
    assert here == peak * rate_share(tokens, training, schedule)
    after = peak * rate_share(tokens + 1, training, schedule)
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
    matrices, vectors = parameter_groups(model, OptimizerSection())
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() >= 2 for parameter in matrices["params"])
    assert all(parameter.dim() < 2 for parameter in vectors["params"])
    grouped = [id(parameter) for group in (matrices, vectors) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_a_tied_head_is_counted_once() -> None:
    def count(model: Decoder) -> int:
        return sum(parameter.numel() for group in parameter_groups(model, OptimizerSection()) for parameter in group["params"])

    assert count(make_model()) - count(make_model(tied_head=True)) == 64 * 16


def test_what_is_frozen_and_what_is_empty_is_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    next(model.parameters()).requires_grad_(False)
    (group,) = parameter_groups(model, OptimizerSection())
    assert group["params"] == [model[1].weight]


def test_the_optimizer_is_what_the_run_file_says() -> None:
    section = OptimizerSection(peak_lr=1e-2, beta1=0.8, beta2=0.97, epsilon=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(make_model(), section)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-2, (0.8, 0.97), 1e-6, True)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125e-2, 0.125e-2]


def test_muon_has_the_matrices_of_the_layers_and_its_own_rate() -> None:
    section = OptimizerSection(kind="muon", peak_lr=1e-2, muon_peak_lr=0.5, weight_decay=0.3)
    model = make_model(biases=True)
    optimizer = build_optimizer(model, section)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups}
    assert grouped["matrices"] == {"token_table.weight", "head.weight"}
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in grouped["hidden matrices"])
    assert sum(map(len, grouped.values())) == len(names)
    assert [(group["use_muon"], group["weight_decay"]) for group in optimizer.param_groups] == [(True, 0.3), (False, 0.3), (False, 0.0)]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5e-2, 0.5e-2]


def test_groups_that_were_changed_are_found() -> None:
    for kind in ("adamw", "muon"):
        section = OptimizerSection(kind=kind)
        for index, key in ((0, "weight_decay"), (1, "peak_lr"), (1, "weight_decay")):
            optimizer = build_optimizer(make_model(), section)
            check_groups(optimizer, section)
            optimizer.param_groups[index][key] += 0.1
            with pytest.raises(RuntimeError, match="with other settings than it was given"):
                check_groups(optimizer, section)


@pytest.mark.parametrize(
    ("kind", "group", "key", "wrong"),
    [
        *((kind, 1, key, wrong) for kind in ("adamw", "muon") for key, wrong in (("lr", 1e-4), ("eps", 1e-9), ("betas", (0.9, 0.951)))),
        ("adamw", 0, "betas", (0.89, 0.95)),
        ("muon", 0, "momentum", 0.9),
        ("muon", 0, "lr", 0.0),
        ("muon", 2, "betas", (0.9, 0.9)),
    ],
)
def test_every_value_of_every_group_is_read_back(kind: Any, group: int, key: str, wrong: Any) -> None:
    """At the rate of the place in the run, not only at the peak."""
    section = OptimizerSection(kind=kind, beta2=0.95)
    optimizer = build_optimizer(make_model(), section)
    set_learning_rate(optimizer, 0.25)
    check_groups(optimizer, section, share=0.25)
    right = optimizer.param_groups[group][key]
    optimizer.param_groups[group][key] = wrong
    name = optimizer.param_groups[group]["name"]
    with pytest.raises(RuntimeError, match=f"the group '{name}' with other settings than it was given: {key} .* instead of "):
        check_groups(optimizer, section, share=0.25)
    optimizer.param_groups[group][key] = list(right) if isinstance(right, tuple) else right
    check_groups(optimizer, section, share=0.25)


def test_an_optimizer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_optimizer.py").write_text(
        "import torch\n\n\ndef plain(groups, section):\n    return torch.optim.SGD(groups, momentum=section.settings['momentum'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    section = OptimizerSection(kind="my_optimizer:plain", peak_lr=0.1, settings={"momentum": 0.5})
    optimizer = build_optimizer(make_model(), section)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0.1, 0.5)] * 2


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
