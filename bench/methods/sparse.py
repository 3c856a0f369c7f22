"""Methods that set weights to zero and leave every shape as it is.

All layers of the pruned towers train afterwards, under their masks. There are no cuts, and so no
hidden states to compare: the loss is cross-entropy and divergence.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.sparse import to_sparse_semi_structured

import interlace as il
from interlace.errors import PlanError
from interlace.records import TowerPlan
from methods.case import Case, Made, Method, heal

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("retention")

# of 4 neighbouring weights of a row, 2 go
GROUP, GONE = 4, 2


class Mask(nn.Module):
    """Keeps the zeros of a weight zero, in its value and in its gradient."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Take the zeros of a weight [F, D] as they are."""
        super().__init__()
        self.register_buffer("mask", weight != 0)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with zeros where it is masked, [F, D]."""
        return weight * self.mask


def linears(case: Case, student: Any) -> Iterator[tuple[str, list[nn.Linear]]]:
    """Return the linear modules of the layers of every pruned tower."""
    for tower in case.counts():
        modules = student.towers[tower].layers.modules()
        yield tower, [each for each in modules if isinstance(each, nn.Linear)]


def whole(case: Case) -> Any:
    """Return a student that has all layers, all of which train, with weights of its own."""
    towers = {}
    for tower in case.counts():
        depth = case.vlm.towers[tower].num_layers
        towers[tower] = TowerPlan(num_layers=depth, tune=tuple(range(depth)))
    return il.prune(case.vlm, il.Plan(towers=towers, shape=case.shared.scores.shape))


def counted(case: Case, tower: str, modules: list[nn.Linear]) -> tuple[int, int]:
    """Return how many weights of a tower are to go, and how many its linear modules hold.

    As many go as `Case.parameters` says, norms and biases counted with them.

    Raises:
        PlanError: the linear modules hold fewer weights than are to go.
    """
    count = case.parameters(tower)
    available = sum(module.weight.numel() for module in modules)
    if count > available:
        raise PlanError(
            f"{count} weights of the {tower} tower are to go, but its linear modules hold "
            f"{available}. Choose a smaller fraction."
        )
    return count, available


def _zero_smallest(weights: list[torch.Tensor], count: int) -> None:
    """Zero exactly `count` of all weights, the smallest by magnitude."""
    sizes = torch.cat([weight.abs().reshape(-1) for weight in weights])
    keep = torch.ones_like(sizes, dtype=torch.bool)
    keep[sizes.argsort(stable=True)[:count]] = False
    for weight, kept in zip(weights, keep.split([each.numel() for each in weights]), strict=True):
        weight.mul_(kept.view_as(weight))


@torch.no_grad()
def magnitude(per_matrix: bool, case: Case) -> Made:
    """Zero the smallest weights of a tower's layers, over the tower or in every matrix alike.

    Source: Han et al., arXiv 1506.02626, section 3, in one shot.

    Raises:
        PlanError: as `counted`.
    """
    student = whole(case)
    for tower, modules in linears(case, student):
        count, available = counted(case, tower, modules)
        weights = [module.weight for module in modules]
        if per_matrix:
            for weight in weights:
                _zero_smallest([weight], round(weight.numel() * count / available))
        else:
            _zero_smallest(weights, count)
    return Made(student)


@torch.no_grad()
def semi_structured(case: Case) -> Made:
    """Zero the two smallest of every four neighbouring weights of a row.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, section 3.

    Raises:
        PlanError: rows of a matrix that are no multiple of four long.
    """
    student = whole(case)
    for tower, modules in linears(case, student):
        for module in modules:
            rows, columns = module.weight.shape
            if columns % GROUP:
                raise PlanError(
                    f"A matrix of the {tower} tower has rows of {columns} weights, which cannot "
                    f"be split into groups of {GROUP}."
                )
            groups = module.weight.view(rows, columns // GROUP, GROUP)
            smallest = groups.abs().argsort(dim=-1, stable=True)[..., :GONE]
            groups.scatter_(-1, smallest, 0.0)
    return Made(student)


def heal_masked(case: Case, student: Any) -> il.HealReport:
    """Heal in the common way; what is zero stays zero."""
    modules = [each for _, found in linears(case, student) for each in found]
    for module in modules:
        parametrize.register_parametrization(module, "weight", Mask(module.weight.detach()))
    try:
        return heal(case, student)
    finally:
        for module in modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def compressed(student: Any) -> Any:
    """Put 2:4 weights into the form that tensor cores compute with.

    Returns:
        The student, changed; None where the device or torch has no such form for it.
    """
    if student.device.type != "cuda":
        return None
    layers = [student.towers[tower].layers for tower in student.plan.towers]
    modules = [each for every in layers for each in every.modules() if isinstance(each, nn.Linear)]
    try:
        # all of them, or none
        packed = [to_sparse_semi_structured(module.weight.detach()) for module in modules]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        log.warning("2:4 weights cannot be compressed here: %s", error)
        return None
    for module, weight in zip(modules, packed, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    return student


METHODS = {
    **{
        name: Method(partial(magnitude, per_matrix), heal_masked, sparse=True, timed="zeros")
        for name, per_matrix in {"magnitude": False, "magnitude_per_matrix": True}.items()
    },
    "magnitude_2_4": Method(
        semi_structured,
        heal_masked,
        fractions=(0.5,),
        sparse=True,
        timed="2:4",
        fast=compressed,
    ),
}
