"""The summed next-token cross-entropy, without the logits of all tokens at once.

In: hidden states, the head's weight, targets. Out: one fp32 number, the sum over valid targets; the
training loop divides it by the number of valid targets of the whole step, which no single rank knows.

Why not F.cross_entropy: a micro-batch of 8 x 8192 tokens and a vocabulary of 128256 has 34 GB of fp32
logits, and as much again of their gradients. Here a chunk of tokens at a time is projected, its loss
added up and its gradient formed at once (d loss / d logits = softmax - one-hot needs nothing from
later), so nothing is computed twice and only one chunk of logits exists (Liger kernels, Hsu et al. 2024).
The weight's gradient is added up in fp32 (products in bf16 round each chunk's share first); where that
copy of it would not fit into the memory that is allowed, it is formed rows of the vocabulary at a time
behind the loss, from logits that are projected a second time: a third more work for the head, but each
sum is still fp32 and rounded once.

Shapes: C tokens (the whole batch, flattened), c tokens of one chunk, D model, V vocabulary, v rows of one slice of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

IGNORE = -100
"""The label of a position that is not learnt from (PyTorch's own convention)."""

MEMORY_BYTES = 500_000_000
"""What the loss takes at most beside its inputs and their gradients, if nothing else is said."""
LARGEST_CHUNK_TOKENS = 4096
SMALLEST_CHUNK_TOKENS = 64


class SummedLoss(Protocol):
    """What a decoder minimises: a sum over valid targets, from hidden states, the head's weight and targets."""

    def __call__(
        self, hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, *, softcap: float | None = None
    ) -> torch.Tensor:
        """Return a scalar in fp32; labels of -100 count for nothing; `softcap` is the model's, see `summed_cross_entropy`."""
        ...


def summed_cross_entropy(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_C: torch.Tensor,
    *,
    softcap: float | None = None,
    z_weight: float = 0.0,
    memory_bytes: int = MEMORY_BYTES,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """Sum over valid targets of log Z - l_label, with logits l_v = h . w_v and Z = sum_v exp(l_v), in nats.

    softcap: logits l become c tanh(l / c) first (Gemma 2, 2024).
    z_weight: that times (log Z)^2 is added for each valid target, which keeps logits from drifting (PaLM, Chowdhery et al. 2022,
        section 5).
    memory_bytes: what it may take beside its inputs and their gradients; `plan_memory` says what for.
    chunk_tokens: tokens projected at once; None: as many as the memory allows.
    compiled: whether what lies between the products is compiled (torch.compile).

    The projection runs in the dtype of `hidden_CD` (bf16 rounds each logit once); softmax, logarithm and
    all sums are fp32, and so is the weight's gradient while chunks are added up (in bf16 the share of each
    chunk is rounded once). Labels equal to -100 count for nothing: with no valid target the loss is 0 and
    so are the gradients.

    The gradients are formed with the loss, and can be taken once, not twice.

    Returns: scalar fp32. Raises ValueError for shapes that do not fit or a `chunk_tokens` below 1; a label
    outside the vocabulary other than -100 raises on the CPU and is a device-side assertion on CUDA.
    """
    if hidden_CD.shape[:1] != labels_C.shape or hidden_CD.shape[1:] != weight_VD.shape[1:]:
        raise ValueError(
            f"hidden states {tuple(hidden_CD.shape)}, weight {tuple(weight_VD.shape)} and labels {tuple(labels_C.shape)} "
            "do not fit; wanted (C, D), (V, D) and (C,)"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    # A logit and its gradient, and what is computed in fp32 between them (less, where it is compiled).
    bytes_per_logit = 2 * hidden_CD.element_size() + (8 if softcap is None else 16)
    planned = plan_memory(len(labels_C), hidden_CD.shape[1], len(weight_VD), bytes_per_logit, memory_bytes)
    terms = Terms(softcap, z_weight, chunk_tokens or planned.chunk_tokens, planned.slice_rows, compiled)
    if torch.is_grad_enabled() and (hidden_CD.requires_grad or weight_VD.requires_grad):
        return _SummedCrossEntropy.apply(hidden_CD, weight_VD, labels_C, terms)
    return _loss_and_gradients(hidden_CD, weight_VD, labels_C, terms, False, False)[0]


class MemoryPlan(NamedTuple):
    """Portions in which a loss is computed."""

    chunk_tokens: int
    """Tokens projected at once."""
    slice_rows: int | None
    """Rows of the weight whose gradient is formed at once, behind the loss; None: all, added up in fp32 chunk by chunk."""


def plan_memory(num_tokens: int, width: int, vocabulary_size: int, bytes_per_logit: int, memory_bytes: int) -> MemoryPlan:
    """Portions that keep within `memory_bytes`, if that can be done with chunks of 64 tokens and slices of 64 rows.

    The fp32 sum of the weight's gradient may take half of the memory.
    """
    sum_bytes = 4 * vocabulary_size * width
    has_sum = sum_bytes <= memory_bytes // 2
    logits = (memory_bytes - (sum_bytes if has_sum else 0)) // bytes_per_logit
    chunk_tokens = min(LARGEST_CHUNK_TOKENS, max(SMALLEST_CHUNK_TOKENS, _power_of_two(logits // vocabulary_size)))
    return MemoryPlan(chunk_tokens, None if has_sum else max(64, _power_of_two(logits // max(1, num_tokens))))


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`; 0 for 0."""
    return 1 << (number.bit_length() - 1) if number else 0


class Terms(NamedTuple):
    """How a loss is made up; see `summed_cross_entropy`."""

    softcap: float | None
    z_weight: float
    chunk_tokens: int
    slice_rows: int | None
    compiled: bool


class _SummedCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; the backward pass multiplies them by its one number."""

    @staticmethod
    def forward(ctx: Any, hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, terms: Terms) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss, *gradients = _loss_and_gradients(hidden_CD, weight_VD, labels_C, terms, wants_hidden, wants_weight)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradient_of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The factor carries the division by the number of targets. In place: a copy would take as much memory again, and a second
        # backward pass is refused by autograd because of it.
        scaled = (None if saved is None else saved.mul_(gradient_of_loss[0]) for saved in ctx.saved_tensors)
        return (*scaled, None, None)


def _loss_and_gradients(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, terms: Terms, wants_hidden: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss, and its gradients in the dtype of the inputs (None where unwanted)."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden_CD.device)
    hidden_gradient_CD = torch.empty_like(hidden_CD) if wants_hidden else None
    sum_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight and terms.slice_rows is None else None
    shares: list[SoftmaxParts] = []
    cast_VD = weight_VD.to(hidden_CD.dtype)
    loss_and_gradient = _compiled(_chunk_loss_and_gradient) if terms.compiled else _chunk_loss_and_gradient
    for start in range(0, len(labels_C), terms.chunk_tokens):
        chunk = slice(start, start + terms.chunk_tokens)
        hidden_cD, labels_c1 = hidden_CD[chunk], labels_C[chunk, None].long()
        logits_cV = hidden_cD @ cast_VD.T
        if not (wants_hidden or wants_weight):
            loss += _chunk_loss(logits_cV, labels_c1, terms)[0]
            continue
        chunk_loss, gradient_cV, parts = loss_and_gradient(logits_cV, labels_c1, terms)
        loss += chunk_loss
        shares.append(parts)
        if hidden_gradient_CD is not None:
            torch.mm(gradient_cV, cast_VD, out=hidden_gradient_CD[chunk])
        if sum_VD is not None:
            _add_product(sum_VD, gradient_cV.T, hidden_cD)
        del logits_cV, gradient_cV  # not beside the next chunk's
    weight_gradient_VD = None if sum_VD is None else sum_VD.to(weight_VD.dtype)
    if wants_weight and sum_VD is None:
        parts = SoftmaxParts(*(torch.cat(column) for column in zip(*shares, strict=True)))
        weight_gradient_VD = _weight_gradient_by_slices(hidden_CD, cast_VD, labels_C, parts, terms).to(weight_VD.dtype)
    return loss, hidden_gradient_CD, weight_gradient_VD


class SoftmaxParts(NamedTuple):
    """Of each token what its softmax needs besides its logits: probability = exp(logit - largest) / total."""

    largest_c1: torch.Tensor
    total_c1: torch.Tensor

    @property
    def log_z_c1(self) -> torch.Tensor:
        """Logarithm of the sum of exp(logit)."""
        return self.largest_c1 + self.total_c1.log()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _chunk_loss(
    logits_cV: torch.Tensor, labels_c1: torch.Tensor, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SoftmaxParts]:
    """The chunk's summed loss; capped logits l in fp32, exp(l - largest), and what makes probabilities of them."""
    valid_c1 = labels_c1 != IGNORE
    capped_cV = _cap(logits_cV.float(), terms.softcap)
    largest_c1 = capped_cV.amax(dim=-1, keepdim=True)
    exponential_cV = (capped_cV - largest_c1).exp_()
    total_c1 = exponential_cV.sum(dim=-1, keepdim=True)
    parts = SoftmaxParts(largest_c1, total_c1)
    # Not log Z - logit: where these are near 200, their rounding is an error of 1e-5.
    loss_c1 = total_c1.log() - (capped_cV.gather(1, labels_c1.where(valid_c1, 0)) - largest_c1)
    if terms.z_weight:
        loss_c1 = loss_c1 + terms.z_weight * parts.log_z_c1.square()
    return loss_c1.where(valid_c1, 0.0).sum(), capped_cV, exponential_cV, parts


def _chunk_loss_and_gradient(
    logits_cV: torch.Tensor, labels_c1: torch.Tensor, terms: Terms
) -> tuple[torch.Tensor, torch.Tensor, SoftmaxParts]:
    """The chunk's summed loss, and its gradient by the logits in their dtype."""
    loss, capped_cV, exponential_cV, parts = _chunk_loss(logits_cV, labels_c1, terms)
    return loss, _gradient(capped_cV, exponential_cV, labels_c1, parts, terms).to(logits_cV.dtype), parts


def _gradient(
    capped_cV: torch.Tensor, exponential_cV: torch.Tensor, labels_c1: torch.Tensor, parts: SoftmaxParts, terms: Terms
) -> torch.Tensor:
    """softmax - one-hot for logits of all of the vocabulary or of a slice of it, zero where there is no target; a label outside of
    the slice is IGNORE - 1. Takes the place of `exponential_cV`."""
    gradient_cV = exponential_cV.div_(parts.total_c1)
    if terms.z_weight:
        gradient_cV *= 1 + 2 * terms.z_weight * parts.log_z_c1
    inside_c1 = labels_c1 >= 0
    gradient_cV.scatter_add_(1, labels_c1.where(inside_c1, 0), inside_c1.float().neg())
    if terms.softcap is not None:
        gradient_cV *= 1 - (capped_cV / terms.softcap).square()
    return gradient_cV.masked_fill_(labels_c1 == IGNORE, 0.0)


def _add_product(sum_VD: torch.Tensor, gradient_Vc: torch.Tensor, hidden_cD: torch.Tensor) -> None:
    """In fp32 the product is added as it is formed; of other dtypes its rounded values are."""
    if hidden_cD.dtype == sum_VD.dtype:
        sum_VD.addmm_(gradient_Vc, hidden_cD)
    else:
        sum_VD += gradient_Vc @ hidden_cD


def _weight_gradient_by_slices(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, parts: SoftmaxParts, terms: Terms
) -> torch.Tensor:
    """The weight's gradient, some rows at a time for all tokens; each product is summed up in fp32 and rounded once."""
    gradient_VD = torch.empty_like(weight_VD)
    slice_gradient = _compiled(_slice_gradient) if terms.compiled else _slice_gradient
    step = terms.slice_rows or len(weight_VD)
    for start in range(0, len(weight_VD), step):
        rows_vD = weight_VD[start : start + step]
        labels_C1 = labels_C[:, None].long()
        here_C1 = (labels_C1 >= start) & (labels_C1 < start + len(rows_vD))
        labels_C1 = (labels_C1 - start).where(here_C1, torch.where(labels_C1 == IGNORE, IGNORE, IGNORE - 1))
        torch.mm(slice_gradient(hidden_CD @ rows_vD.T, labels_C1, parts, terms).T, hidden_CD, out=gradient_VD[start : start + step])
    return gradient_VD


def _slice_gradient(logits_Cv: torch.Tensor, labels_C1: torch.Tensor, parts: SoftmaxParts, terms: Terms) -> torch.Tensor:
    capped_Cv = _cap(logits_Cv.float(), terms.softcap)
    return _gradient(capped_Cv, (capped_Cv - parts.largest_c1).exp_(), labels_C1, parts, terms).to(logits_Cv.dtype)


def _cap(logits_cV: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits_cV if softcap is None else softcap * torch.tanh(logits_cV / softcap)
