"""The terms of the healing loss, each computed over chunks of tokens.

Legend: N tokens, D hidden size, V vocabulary, C tokens of one chunk, B images and texts of a batch.

No tensor of this file is larger than [C, V] or [N, D]: the logits of student and teacher exist for
one chunk at a time. The gradient with respect to the hidden states is taken while a chunk's logits
exist, so the backward pass neither stores nor recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

Head = Callable[["Tensor"], "Tensor"]

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def widened(tensor: Tensor) -> Tensor:
    """Return half-precision values as fp32 and everything else as it is."""
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over rows of KL(teacher || student) of the softened distributions, times temperature^2.

    The factor keeps the size of the gradient independent of the temperature.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student_logits: [N, V], any float dtype.
        teacher_logits: [N, V], any float dtype.
        temperature: above 0; 1 compares the distributions as they are.
        weights: [N] of the rows; None counts all alike.

    Returns:
        A scalar, fp32 (fp64 for fp64 input).
    """
    student = functional.log_softmax(widened(student_logits) / temperature, dim=-1)
    teacher = functional.log_softmax(widened(teacher_logits) / temperature, dim=-1)
    if weights is None:
        total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    else:
        rows = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        total = rows @ weights.to(rows.dtype)
    return total * temperature**2


def _entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of the cross-entropies of [N, V] logits, each times its weight where there are any."""
    if weights is None:
        return functional.cross_entropy(widened(logits), targets, reduction="sum")
    rows = functional.cross_entropy(widened(logits), targets, reduction="none")
    return rows @ weights.to(rows.dtype)


class _HeadTerms(torch.autograd.Function):
    """Cross-entropy and divergence of [N, D] hidden states through a frozen head, in chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        token_weights: Tensor | None,
        heads: tuple[Head, Head | None],
        weights: tuple[float, float],
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, teacher_head = heads
        ce_weight, kl_weight = weights
        wide = widened(hidden[:0]).dtype
        sums = [torch.zeros((), dtype=wide, device=hidden.device) for _ in range(2)]
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden), chunk_tokens):
            each = None if token_weights is None else token_weights[part]
            piece = hidden[part].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                logits = head(piece)
                entropy = _entropy(logits, targets[part], each)
                objective = ce_weight * entropy
                if teacher_head is not None and teacher_hidden is not None:
                    with torch.no_grad():
                        teacher_logits = teacher_head(teacher_hidden[part])
                    apart = divergence(logits, teacher_logits, temperature, each)
                    objective = objective + kl_weight * apart
                    sums[1] += apart.detach()
            sums[0] += entropy.detach()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(objective, piece)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*sums)
        return ce_weight * sums[0] + kl_weight * sums[1], sums[0], sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else gradient * upstream[0].to(gradient.dtype)
        return scaled, None, None, None, None, None, None, None


def head_terms(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    token_weights: Tensor | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and logit distillation of hidden states through frozen heads.

    Args:
        hidden: [N, D] inputs of the student's head at the tokens that predict an answer token.
        targets: [N] int64, the tokens to predict.
        head: the student's head, [C, D] -> [C, V]. It gets no gradient.
        teacher_hidden: [N, D'] the same of the teacher; without it there is no divergence.
        teacher_head: the teacher's head, [C, D'] -> [C, V].
        token_weights: [N] what each token counts; None counts all alike.
        ce_weight: weight of the cross-entropy, at least 0.
        kl_weight: weight of the divergence, at least 0.
        temperature: of the divergence, above 0.
        chunk_tokens: C, tokens whose logits exist at once.

    Returns:
        Three scalar SUMS over tokens, by `token_weights`, fp32 (fp64 for fp64 input): the weighted
        total, which alone carries a gradient, the cross-entropy and the divergence.
    """
    if not kl_weight:
        teacher_head = None
    total, entropy, apart = _HeadTerms.apply(  # type: ignore[no-untyped-call]
        hidden,
        targets,
        teacher_hidden,
        token_weights,
        (head, teacher_head),
        (ce_weight, kl_weight),
        temperature,
        chunk_tokens,
    )
    return total, entropy, apart


class _NormalisedError(torch.autograd.Function):
    """Weighted sum over tokens of ||s - t||^2 / ||t||^2, without a [N, D] intermediate in fp32."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, chunk_tokens: int
    ) -> Tensor:
        total = torch.zeros((), dtype=widened(student[:0]).dtype, device=student.device)
        scales = torch.empty(len(student), dtype=total.dtype, device=student.device)
        for part in _chunks(len(student), chunk_tokens):
            target = widened(teacher[part])
            norm = target.square().sum(-1).clamp_min(torch.finfo(total.dtype).eps)
            scales[part] = weights[part] / norm
            total += ((widened(student[part]) - target).square().sum(-1) * scales[part]).sum()
        ctx.save_for_backward(student, teacher, scales)
        ctx.chunk_tokens = chunk_tokens
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, scales = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for part in _chunks(len(student), ctx.chunk_tokens):
            apart = widened(student[part]) - widened(teacher[part])
            gradient[part] = 2 * upstream[0] * scales[part, None] * apart
        return gradient, None, None, None


def normalised_error(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, chunk_tokens: int = 2048
) -> Tensor:
    """Sum over tokens of the squared distance of two hidden states relative to the teacher's norm.

    Args:
        student: [..., D] hidden states, any float dtype.
        teacher: [..., D] hidden states of the same shape; gets no gradient.
        mask: [...] true (or 1) where a token counts; None counts all.
        chunk_tokens: tokens that are worked on at once.

    Returns:
        A scalar SUM, fp32 (fp64 for fp64 input).
    """
    width = student.shape[-1]
    flat = student.reshape(-1, width)
    wide = widened(flat[:0]).dtype
    if mask is None:
        weights = torch.ones(len(flat), dtype=wide, device=flat.device)
    else:
        weights = mask.reshape(-1).to(flat.device, wide)
    other = teacher.detach().reshape(-1, width).to(flat.device)
    result: Tensor = _NormalisedError.apply(  # type: ignore[no-untyped-call]
        flat, other, weights, chunk_tokens
    )
    return result


def similarity_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    """Divergence of the similarity rows of a batch, images against texts and texts against images.

    Source: Wu et al. 2023, "TinyCLIP", affinity mimicking.

    Args:
        student_logits: [B, B] similarities, a row per image.
        teacher_logits: [B, B] the same of the teacher.
        temperature: above 0, on top of the models' own logit scale.

    Returns:
        A scalar SUM over the B rows, the mean of both directions.
    """
    by_image = divergence(student_logits, teacher_logits, temperature)
    by_text = divergence(student_logits.T, teacher_logits.T, temperature)
    return (by_image + by_text) / 2
