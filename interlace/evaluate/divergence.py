"""How far two sets of logits are apart, and from the right tokens.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["token_divergence"]


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
) -> dict[str, float]:
    """Compare two sets of logits token by token.

    Args:
        student_logits: [N, V], any float dtype.
        teacher_logits: [N, V], any float dtype.
        labels: [N] int64, the right tokens.

    Returns:
        Sums over the N tokens: "divergence" KL(teacher || student) in nats, "agreeing" tokens
        whose most likely prediction is the same, "student_loss" and "teacher_loss" negative log
        likelihoods of the labels in nats. Computed in fp32, summed in fp64.
    """
    student = functional.log_softmax(student_logits.float(), dim=-1)
    teacher = functional.log_softmax(teacher_logits.float(), dim=-1)
    each = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)
    same = student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
    return {
        "divergence": each.double().sum().item(),
        "agreeing": same.double().sum().item(),
        "student_loss": functional.nll_loss(student, labels, reduction="none")
        .double()
        .sum()
        .item(),
        "teacher_loss": functional.nll_loss(teacher, labels, reduction="none")
        .double()
        .sum()
        .item(),
    }
