"""Whether a model says the same in two ways of running it: what is wrong must not be timed."""

from __future__ import annotations

import torch
from torch import Tensor

# relative error of logits beyond which something is wrong, not rounded otherwise
MOST = 0.25
# tokens whose logits are compared: of the prompt, of the step that is recorded, of its replay
STEPS = 3


def logits_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative root-mean-square error of logits, the largest over the steps.

    Args:
        found: logits [B, V] of the first tokens, one per step.
        expected: the same from another way. Rows count as long as both chose the same tokens.
    """
    rows = torch.ones(len(expected[0]), dtype=torch.bool, device=expected[0].device)
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if rows.any():
            apart = (ours[rows].float() - theirs[rows].float()).square().mean().sqrt()
            error = float(apart / theirs[rows].float().square().mean().sqrt())
            # NaN is the largest error there is
            largest = max(largest, error) if error == error else float("inf")
        rows &= ours.argmax(-1) == theirs.argmax(-1)
    return largest
