"""The summed next-token cross-entropy, without the logits of all tokens at once.

In: hidden states, the head's weight, targets. Out: one fp32 number, the sum over valid targets; the
training loop divides it by the number of valid targets of the whole step, which no single rank knows.

Why not F.cross_entropy: a micro-batch of 8 x 8192 tokens and a vocabulary of 128256 has 34 GB of fp32
logits, and as much again of their gradients. Here a chunk of tokens at a time is projected, its loss
added up and its gradient formed at once (d loss / d logits = softmax - one-hot needs nothing from
later), so nothing is computed twice and only one chunk of logits exists (Liger kernels, Hsu et al. 2024).

Shapes: C tokens (the whole batch, flattened), c tokens of one chunk, D model, V vocabulary.
"""

from typing import Any

import torch

IGNORE = -100
"""The label of a position that is not learnt from (PyTorch's own convention)."""

CHUNK_TOKENS = 1024
"""Tokens projected at once: fp32 logits of a chunk take 4 x 1024 x V bytes (0.5 GB for V = 128256)."""


def summed_cross_entropy(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> torch.Tensor:
    """Sum over valid targets of log(sum_v exp(h . w_v)) - h . w_label, in nats.

    The projection runs in the dtype of `weight_VD` (bf16 rounds each logit once); softmax, logarithm and
    all sums are fp32, and so is the weight's gradient while it is added up over chunks. Labels equal to
    -100 count for nothing: with no valid target the loss is 0 and so are the gradients.

    Memory beyond the inputs: about three chunks of logits, and while gradients are wanted one array like
    `hidden_CD` and an fp32 one like `weight_VD`. The gradient can be taken once, not twice.

    Returns: scalar fp32. Raises ValueError for shapes that do not fit or a `chunk_tokens` below 1; a label
    outside the vocabulary other than -100 raises on the CPU and is a device-side assertion on CUDA.
    """
    if hidden_CD.shape[:1] != labels_C.shape or hidden_CD.shape[1:] != weight_VD.shape[1:]:
        raise ValueError(
            f"hidden states {tuple(hidden_CD.shape)}, weight {tuple(weight_VD.shape)} and labels {tuple(labels_C.shape)} "
            "do not fit; wanted (C, D), (V, D) and (C,)"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    if torch.is_grad_enabled() and (hidden_CD.requires_grad or weight_VD.requires_grad):
        return _SummedCrossEntropy.apply(hidden_CD, weight_VD, labels_C, chunk_tokens)
    return _loss_and_gradients(hidden_CD, weight_VD, labels_C, chunk_tokens, False, False)[0]


class _SummedCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; the backward pass multiplies them by its one number."""

    @staticmethod
    def forward(ctx: Any, hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss, *gradients = _loss_and_gradients(hidden_CD, weight_VD, labels_C, chunk_tokens, wants_hidden, wants_weight)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradient_of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Multiplied in fp32 and rounded once: the factor carries the division by the number of targets.
        scaled = (None if saved is None else (saved * gradient_of_loss[0]).to(saved.dtype) for saved in ctx.saved_tensors)
        return (*scaled, None, None)


def _loss_and_gradients(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor, chunk_tokens: int, wants_hidden: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss, and its gradients in the dtype of the inputs (None where unwanted)."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden_CD.device)
    hidden_gradient_CD = torch.empty_like(hidden_CD) if wants_hidden else None
    weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
    for start in range(0, len(labels_C), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden_cD, labels_c1 = hidden_CD[chunk], labels_C[chunk, None].long()
        valid_c1 = labels_c1 != IGNORE
        targets_c1 = labels_c1.where(valid_c1, 0)

        log_probability_cV = torch.log_softmax(hidden_cD @ weight_VD.T, dim=-1, dtype=torch.float32)
        loss -= log_probability_cV.gather(1, targets_c1).where(valid_c1, 0.0).sum()
        if hidden_gradient_CD is None and weight_gradient_VD is None:
            continue

        # softmax - one-hot, in the memory of the logarithms, zero where there is no target.
        gradient_cV = log_probability_cV.exp_().scatter_add_(1, targets_c1, torch.full_like(targets_c1, -1.0, dtype=torch.float32))
        gradient_cV = gradient_cV.masked_fill_(~valid_c1, 0.0).to(weight_VD.dtype)
        if hidden_gradient_CD is not None:
            torch.mm(gradient_cV, weight_VD, out=hidden_gradient_CD[chunk])
        if weight_gradient_VD is not None:
            weight_gradient_VD += gradient_cV.T @ hidden_cD
    return loss, hidden_gradient_CD, None if weight_gradient_VD is None else weight_gradient_VD.to(weight_VD.dtype)
