"""Wanda and SparseGPT: weights are set to zero by what the layers are given, layer after layer.

Every layer is pruned on what the pruned layers before it give. All layers train afterwards, under
their masks, as in `methods.sparse`.

Legend: N tokens, D inputs of a matrix, F outputs.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace._torch_utils import inference, without_cache
from interlace.models.states import hooked, watch_state
from interlace.models.tokens import token_units
from interlace.surgery.bridges.calibration import Calibration
from methods.case import BATCH_SIZE, Case, Made, Method
from methods.sparse import counted, heal_masked, linears, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    # (weight [F, D], X'X [D, D] fp64, share of the weights that go) -> the new weight
    Prune = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

# Columns of which SparseGPT chooses the zeros at once, and its damping, both as published.
BLOCK, DAMPING = 128, 0.01


class _EnoughError(Exception):
    """The layer that is looked at has run."""


def grams(case: Case, student: Any, tower: str, layer: int, data: Calibration) -> dict[Any, Any]:
    """Return linear module -> X'X [D, D], fp64, of all that it is given; padding is left out."""
    layers = student.towers[tower].layers
    module = layers[layer]
    found: dict[Any, torch.Tensor] = {}
    counts = torch.empty(0, dtype=torch.bool)
    batch: dict[str, Any] = {}

    def begin(hidden: torch.Tensor) -> None:
        nonlocal counts
        counts = token_units(case.vlm, tower, batch, hidden)[1] >= 0

    def take(linear: nn.Linear, args: Any) -> None:
        rows = args[0].reshape(-1, linear.in_features)
        # what a layer reads beside its own states, an image for one, has rows of its own
        rows = (rows[counts] if len(rows) == len(counts) else rows).double()
        found[linear] = found.get(linear, 0) + rows.T @ rows

    def end(*_: Any) -> None:
        raise _EnoughError

    hooks = [
        watch_state(layers, layer, tower, begin),
        module.register_forward_hook(end),
        *(
            each.register_forward_pre_hook(take)
            for each in module.modules()
            if isinstance(each, nn.Linear)
        ),
    ]
    with hooked(hooks):
        for batch in data.batches:
            with contextlib.suppress(_EnoughError):
                data.run(student.model, batch)
    return found


@torch.no_grad()
def layer_by_layer(prune: Prune, case: Case) -> Made:
    """Prune every matrix of a tower's layers by the same share, on what it is then given.

    Raises:
        PlanError: as `counted`.
    """
    student = whole(case)
    data = Calibration(case.vlm, case.shared.calibration, BATCH_SIZE)
    with inference(student.model), without_cache(student.model):
        for tower, modules in linears(case, student):
            count, available = counted(case, tower, modules)
            for layer in range(len(student.towers[tower].layers)):
                for module, gram in grams(case, student, tower, layer, data).items():
                    module.weight.copy_(prune(module.weight, gram, count / available))
    return Made(student)


def wanda(weight: torch.Tensor, gram: torch.Tensor, share: float) -> torch.Tensor:
    """Zero of every row the weights w_ij with the smallest |w_ij| |x_j|_2.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv
    2306.11695, equation 1, compared per output.

    Args:
        weight: [F, D].
        gram: X'X [D, D] of its inputs.
        share: of the weights that go, 0..1.

    Returns:
        The new weight.
    """
    scores = weight.abs() * gram.diagonal().sqrt().to(weight.dtype)
    gone = scores.argsort(dim=1, stable=True)[:, : round(weight.shape[1] * share)]
    return weight.scatter(1, gone, 0.0)


def sparsegpt(weight: torch.Tensor, gram: torch.Tensor, share: float) -> torch.Tensor:
    """Zero weights column by column, the others of their row making up for it.

    With U the upper Cholesky factor of (X'X + damping)^-1, a weight w_ij costs (w_ij / U_jj)^2, and
    what it leaves is taken over by the columns behind it, w_i - w_ij U_j / U_jj. The zeros are
    chosen in blocks of columns.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, section 3 and algorithm 1.

    Args:
        weight: [F, D].
        gram: X'X [D, D] of its inputs, fp64.
        share: of the weights that go, 0..1.

    Returns:
        The new weight.
    """
    left = weight.double()
    damped = gram.clone()
    # an input that is never active costs nothing
    silent = damped.diagonal() == 0
    damped.diagonal()[silent] = 1.0
    left[:, silent] = 0.0
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, left.shape[1]))
        costs = (left[:, block] / factor.diagonal()[block]).square()
        gone = torch.zeros_like(costs, dtype=torch.bool).view(-1)
        gone[costs.view(-1).argsort(stable=True)[: round(costs.numel() * share)]] = True
        gone = gone.view_as(costs)
        for column in range(block.start, block.stop):
            removed = torch.where(gone[:, column - start], left[:, column], 0.0)
            # the column's own entry becomes zero by this too, to rounding
            behind = factor[column, column:]
            left[:, column:] -= torch.outer(removed / behind[0], behind)
            left[:, column].masked_fill_(gone[:, column - start], 0.0)
    return left.to(weight.dtype)


METHODS = {
    name: Method(partial(layer_by_layer, prune), heal_masked, sparse=True, timed="zeros")
    for name, prune in {"wanda": wanda, "sparsegpt": sparsegpt}.items()
}
