"""The chunked loss against F.cross_entropy, against float64, and against finite differences."""

import functools
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pretrain.model.loss as loss_module
from pretrain.model.loss import IGNORE, plan_memory, summed_cross_entropy

ROOT = Path(__file__).parents[3]
C, D, V = 50, 24, 101


def draw(seed: int, masked: float = 0.3, deviation: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_CD = torch.randn(C, D, generator=generator) * deviation
    weight_VD = torch.randn(V, D, generator=generator)
    labels_C = torch.randint(0, V, (C,), generator=generator)
    labels_C[torch.rand(C, generator=generator) < masked] = IGNORE
    return hidden_CD, weight_VD, labels_C


MEMORY = [loss_module.MEMORY_BYTES, 1]
"""Enough to add the weight's gradient up in fp32; so little that it is formed in slices of 64 rows."""


def with_gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def plain(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden_CD @ weight_VD.T).to(torch.promote_types(hidden_CD.dtype, torch.float32)), labels_C, reduction="sum")


TERMS: list[dict[str, float]] = [{}, {"softcap": 3.0}, {"z_weight": 0.01}, {"softcap": 3.0, "z_weight": 0.01}]


def formula(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, softcap: float = math.inf, z_weight: float = 0.0
) -> torch.Tensor:
    """Sum over valid targets of log Z - l_label + z (log Z)^2, with l = c tanh(h w / c), target by target; float64 if the inputs are."""
    terms: list[torch.Tensor] = []
    for hidden_D, label in zip(hidden_CD, labels_C.tolist(), strict=True):
        if label != IGNORE:
            logits_V = weight_VD @ hidden_D
            logits_V = softcap * (logits_V / softcap).tanh() if softcap < math.inf else logits_V
            log_z = logits_V.exp().sum().log()
            terms.append(log_z - logits_V[label] + z_weight * log_z**2)
    return torch.stack(terms).sum()


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_formula_is_its_own_finite_difference(seed: int, terms: dict[str, float]) -> None:
    """What the next test compares with: gradients of the written-out formula are its slopes, measured in float64."""
    hidden, weight, labels = (tensor[:6] for tensor in draw(seed, deviation=0.5))
    labels[1:4] = torch.tensor([0, IGNORE, 5])
    inputs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: formula(h, w, labels.clamp(max=5), **terms), inputs)


@pytest.mark.parametrize("memory_bytes", MEMORY)
@pytest.mark.parametrize("chunk_tokens", [1, 7, C - 1, C, C + 1, 1000])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_every_term_agrees_with_the_formula(seed: int, memory_bytes: int, terms: dict[str, float], chunk_tokens: int) -> None:
    hidden, weight, labels = draw(seed)
    exact_inputs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = with_gradients(formula(*exact_inputs, labels, **terms), *exact_inputs)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    found = with_gradients(summed_cross_entropy(*inputs, labels, **terms, chunk_tokens=chunk_tokens, memory_bytes=memory_bytes), *inputs)
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6 * float(truth.abs().max()))
    # Double inputs have double gradients (the sums stay fp32), and none of it depends on whether gradients are wanted.
    portions = {"chunk_tokens": chunk_tokens, "memory_bytes": memory_bytes}
    found = with_gradients(summed_cross_entropy(*exact_inputs, labels, **terms, **portions), *exact_inputs)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float64, torch.float64]
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6 * float(truth.abs().max()))
    with torch.no_grad():
        assert summed_cross_entropy(*exact_inputs, labels, **terms, **portions) == found[0]


def test_terms_that_are_off_change_nothing_and_a_wide_cap_almost_nothing(seed: int) -> None:
    inputs = draw(seed)
    plain_loss = summed_cross_entropy(*inputs)
    assert torch.equal(summed_cross_entropy(*inputs, softcap=None, z_weight=0.0), plain_loss)
    torch.testing.assert_close(summed_cross_entropy(*inputs, softcap=1e5), plain_loss)
    assert summed_cross_entropy(*inputs, z_weight=1e-4) > plain_loss


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_logits_far_out_of_range_give_finite_losses_and_gradients(seed: int, terms: dict[str, float]) -> None:
    hidden, weight, labels = draw(seed, deviation=1e4)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert all(values.isfinite().all() for values in with_gradients(summed_cross_entropy(*inputs, labels, **terms), *inputs))


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("memory_bytes", MEMORY)
def test_the_loss_of_bf16_weights_is_that_of_their_exact_logits(seed: int, memory_bytes: int, terms: dict[str, float]) -> None:
    """Only the projection is rounded. Softmax and sums in bf16 would say 9.94 where 9.78 is true."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (400, 1000))
    labels = torch.randint(0, 1000, (400,), generator=generator)
    weight = (weight * 0.3).requires_grad_()
    exact_inputs = hidden.double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = with_gradients(formula(*exact_inputs, labels, **terms), *exact_inputs)
    hidden = hidden.requires_grad_()
    loss = summed_cross_entropy(hidden, weight, labels, **terms, chunk_tokens=64, memory_bytes=memory_bytes)
    found = with_gradients(loss, hidden, weight)
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-3)
    for ours, truth in zip(found[1:], exact[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        # A number in bf16 is off by 2^-9 of itself: a logit of 8 by a 64th, and a probability by as much of itself.
        assert (ours - truth).norm() < 2**-7 * truth.norm()


def test_many_chunks_cost_no_digits_of_the_weights_gradient(seed: int) -> None:
    """It is added up in fp32 and rounded once: added up in bf16, 400 chunks would be off by several hundredths."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = ((torch.randn(rows, 64, generator=generator) + 1).bfloat16() for rows in (400, 50))
    labels = torch.randint(0, 50, (400,), generator=generator)
    weight = (weight * 0.05).requires_grad_()
    once, often = (with_gradients(summed_cross_entropy(hidden, weight, labels, chunk_tokens=size), weight)[1] for size in (400, 1))
    assert (often - once).norm() < 2**-8 * once.norm()


@pytest.mark.parametrize("memory_bytes", MEMORY)
@pytest.mark.parametrize("chunk_tokens", [1, 7, C - 1, C, 1000])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 10.0])
def test_agrees_with_float64(seed: int, memory_bytes: int, chunk_tokens: int, deviation: float) -> None:
    hidden, weight, labels = draw(seed, deviation=deviation)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = summed_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens, memory_bytes=memory_bytes)
    found = with_gradients(loss, hidden, weight)
    standard = with_gradients(plain(hidden, weight, labels), hidden, weight)
    exact = with_gradients(plain(*exact_inputs, labels), *exact_inputs)
    for ours, theirs, truth in zip(found, standard, exact, strict=True):
        assert ours.dtype == torch.float32
        error, their_error = (ours - truth).abs().max(), (theirs - truth).abs().max()
        # As good as PyTorch's own: fp32 rounding of the logits, relative to the largest number in sight. Logits that are projected
        # twice, in other portions, are rounded in two ways.
        times = 4 if memory_bytes > 1 else 64
        assert error <= times * (their_error + 2.5e-7 * truth.abs().max().clamp_min(1.0)), (error, their_error)


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3]], ids=str)
@pytest.mark.parametrize("memory_bytes", MEMORY)
def test_compiled_it_is_the_same_in_one_graph_for_each_size_of_chunk(
    seed: int, memory_bytes: int, terms: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that compiles nothing, so that no compiler is needed; 7 does not divide the 50 tokens, 10 does."""
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = functools.cache(partial(torch.compile, dynamic=False, fullgraph=True, backend=backend))
    monkeypatch.setattr(loss_module, "_compiled", compiled)
    num_slices = 0 if memory_bytes > 1 else 2  # of 64 rows and of the rest
    for chunk_tokens, num_graphs in ((7, 2), (10, 3)):
        portions = {"chunk_tokens": chunk_tokens, "memory_bytes": memory_bytes}
        for draw_number in range(2):
            hidden, weight, labels = draw(seed + draw_number)
            inputs = hidden.requires_grad_(), weight.requires_grad_()
            found, eager = (
                with_gradients(summed_cross_entropy(*inputs, labels, **terms, **portions, compiled=on), *inputs) for on in (True, False)
            )
            for one, other in zip(found, eager, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
        assert len(graphs) == num_graphs + num_slices


@pytest.mark.parametrize("num_tokens", [1, 100, 8192, 32_768, 10**6])
@pytest.mark.parametrize(("vocabulary_size", "width"), [(50_257, 768), (128_256, 2048), (128_256, 16_384), (256, 8)])
def test_portions_keep_within_the_memory(num_tokens: int, vocabulary_size: int, width: int) -> None:
    for memory_bytes in (10**8, loss_module.MEMORY_BYTES, 10**10):
        for bytes_per_logit in (12, 16, 24):
            plan = plan_memory(num_tokens, width, vocabulary_size, bytes_per_logit, memory_bytes)
            sum_bytes = 4 * vocabulary_size * width if plan.slice_rows is None else 0
            assert plan.chunk_tokens == 64 or sum_bytes + plan.chunk_tokens * vocabulary_size * bytes_per_logit <= memory_bytes
            assert plan.slice_rows in (None, 64) or plan.slice_rows * num_tokens * bytes_per_logit <= memory_bytes
            assert (plan.slice_rows is None) == (4 * vocabulary_size * width <= memory_bytes // 2)


MEASURE = """
import sys, torch
from pathlib import Path
from pretrain.model.loss import summed_cross_entropy
torch.set_num_threads(1)
num_tokens, vocabulary_size, width, memory_bytes = map(int, sys.argv[1:])
hidden, weight = (torch.zeros(rows, width, dtype=torch.bfloat16, requires_grad=True) for rows in (num_tokens, vocabulary_size))
labels = torch.zeros(num_tokens, dtype=torch.int32)
summed_cross_entropy(hidden[:64], weight[:64], labels[:64]).backward()  # libraries are loaded
kilobytes = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
before = kilobytes("VmRSS")
summed_cross_entropy(hidden, weight, labels, memory_bytes=memory_bytes).backward()
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.parametrize("memory_bytes", [10**8, 3 * 10**8])
def test_the_memory_that_is_taken(memory_bytes: int) -> None:
    """As the kernel counts it; gradients and their scaled copies are a few MB here. Full logits in fp32 would be 1.05 GB, thrice."""
    sizes = [8192, 32_000, 16, memory_bytes]
    command = [sys.executable, "-c", MEASURE, *map(str, sizes)]
    # Each array is mapped for itself, so that it is gone when it is freed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    assert 0.1 * memory_bytes < taken < memory_bytes + 40_000_000


def test_large_logits_cost_no_digits_of_the_probabilities(seed: int) -> None:
    """Logits of 200 and a little, exact in fp32: log Z is not, and what is subtracted from it would be off by 1e-5 of itself."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-3000, 3000, (V,), generator=generator) / 1024
    weight = torch.stack([torch.full((V,), 200.0), steps], dim=1).requires_grad_()
    hidden, labels = torch.ones(C, 2, requires_grad=True), torch.randint(0, V, (C,), generator=generator)
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = with_gradients(plain(*exact_inputs, labels), *exact_inputs)
    found = with_gradients(summed_cross_entropy(hidden, weight, labels), hidden, weight)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-6, atol=2e-6)
    assert found[1][:, 0].abs().max() < 1e-4  # 200 times the sum of all probabilities, less 1


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
