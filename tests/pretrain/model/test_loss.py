"""The chunked loss against F.cross_entropy and against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.model.loss import IGNORE, summed_cross_entropy

C, D, V = 50, 24, 101


def draw(seed: int, masked: float = 0.3, deviation: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_CD = torch.randn(C, D, generator=generator) * deviation
    weight_VD = torch.randn(V, D, generator=generator)
    labels_C = torch.randint(0, V, (C,), generator=generator)
    labels_C[torch.rand(C, generator=generator) < masked] = IGNORE
    return hidden_CD, weight_VD, labels_C


def with_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def plain(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden_CD @ weight_VD.T).to(torch.promote_types(hidden_CD.dtype, torch.float32)), labels_C, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 7, C - 1, C, 1000])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 10.0])
def test_agrees_with_float64(seed: int, chunk_tokens: int, deviation: float) -> None:
    hidden, weight, labels = draw(seed, deviation=deviation)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    found = with_gradients(summed_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens), hidden, weight)
    standard = with_gradients(plain(hidden, weight, labels), hidden, weight)
    exact = with_gradients(plain(*exact_inputs, labels), *exact_inputs)
    for ours, theirs, truth in zip(found, standard, exact, strict=True):
        assert ours.dtype == torch.float32
        error, their_error = (ours - truth).abs().max(), (theirs - truth).abs().max()
        # As good as PyTorch's own: fp32 rounding of the logits, relative to the largest number in sight.
        assert error <= 4 * their_error + 1e-6 * truth.abs().max().clamp_min(1.0), (error, their_error)


def test_counts_only_valid_targets(seed: int) -> None:
    hidden, weight, labels = draw(seed, masked=0.5)
    valid = labels != IGNORE
    expected = summed_cross_entropy(hidden[valid], weight, labels[valid])
    torch.testing.assert_close(summed_cross_entropy(hidden, weight, labels, chunk_tokens=8), expected)
    hidden = hidden.requires_grad_()
    summed_cross_entropy(hidden, weight, labels, chunk_tokens=8).backward()
    assert hidden.grad is not None
    assert hidden.grad[~valid].eq(0).all()
    assert hidden.grad[valid].ne(0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_valid_target_gives_zero_and_zero_gradients(seed: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = draw(seed)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    for values in with_gradients(summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), chunk_tokens=8), hidden, weight):
        assert values.eq(0).all()


def test_bf16_inputs_give_an_fp32_loss_and_bf16_gradients(seed: int) -> None:
    hidden, weight, labels = draw(seed, deviation=0.3)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss, hidden_gradient, weight_gradient = with_gradients(summed_cross_entropy(hidden, weight, labels, chunk_tokens=8), hidden, weight)
    exact_loss, exact_hidden, exact_weight = with_gradients(plain(*exact_inputs, labels), *exact_inputs)
    assert (loss.dtype, hidden_gradient.dtype, weight_gradient.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert loss.double() == pytest.approx(exact_loss.item(), rel=5e-3)
    for found, exact in ((hidden_gradient, exact_hidden), (weight_gradient, exact_weight)):
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_the_factor_of_backward_reaches_the_gradients(seed: int) -> None:
    hidden, weight, labels = draw(seed)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    once = with_gradients(summed_cross_entropy(hidden, weight, labels), hidden, weight)[1:]
    scaled = with_gradients(summed_cross_entropy(hidden, weight, labels) * 0.25, hidden, weight)[1:]
    for one, other in zip(once, scaled, strict=True):
        assert torch.equal(one * 0.25, other)


def test_same_loss_with_and_without_gradients_and_frozen_inputs(seed: int) -> None:
    hidden, weight, labels = draw(seed)
    silent = summed_cross_entropy(hidden, weight, labels)
    assert not silent.requires_grad
    hidden = hidden.requires_grad_()
    one = summed_cross_entropy(hidden, weight, labels)
    assert one.detach() == silent
    one.backward()
    assert weight.grad is None
    with torch.no_grad():
        assert summed_cross_entropy(hidden, weight, labels) == silent


def test_int32_labels_and_an_equal_distribution(seed: int) -> None:
    _, weight, labels = draw(seed, masked=0.0)
    assert summed_cross_entropy(torch.zeros(C, D), weight, labels.int()).item() == pytest.approx(C * math.log(V), rel=1e-6)


def test_a_second_gradient_is_refused_not_wrong(seed: int) -> None:
    hidden, weight, labels = draw(seed)
    hidden = hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(summed_cross_entropy(hidden, weight, labels) * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_does_not_fit_is_refused(seed: int) -> None:
    hidden, weight, labels = draw(seed)
    with pytest.raises(ValueError, match="do not fit"):
        summed_cross_entropy(hidden, weight, labels[:-1])
    with pytest.raises(ValueError, match="do not fit"):
        summed_cross_entropy(hidden[:, :-1], weight, labels)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        summed_cross_entropy(hidden, weight, labels, chunk_tokens=0)
    labels[3] = V
    with pytest.raises((RuntimeError, IndexError)):
        summed_cross_entropy(hidden, weight, labels)
