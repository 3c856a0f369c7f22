"""ReplaceMe and LinearPatch: a block of neighbouring layers goes, a linear map stands in for it.

Legend: N tokens, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import interlace as il
from interlace._torch_utils import inference, without_cache
from interlace.errors import PlanError
from interlace.models.states import layer_input
from interlace.surgery.bridges.calibration import Calibration
from interlace.surgery.bridges.gaps import Gap, find_gaps
from interlace.surgery.bridges.least_squares import NormalEquations, choose
from interlace.surgery.bridges.observe import Pair, Seen, observe
from interlace.surgery.bridges.structure import find_projection, record_calls
from interlace.surgery.bridges.weights import changed, put_weights
from interlace.surgery.cuts import read_cut
from methods.case import BATCH_SIZE, Case, Made, Method

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Cutting:
    """A student without a block of every tower, and what is needed to look at the cuts.

    Attributes:
        student: the student.
        gaps: the cut of every tower.
        pairs: tower -> the dense model and the student, and what both are run on.
    """

    student: Any
    gaps: tuple[Gap, ...]
    pairs: dict[str, Pair]

    def layers(self, gap: Gap) -> Any:
        """Return the student's layers of a cut tower."""
        return self.student.model.get_submodule(gap.path)

    def see(self, gap: Gap, modules: Mapping[str, nn.Module] | None = None) -> Iterator[Seen]:
        """Run both models over all batches and show them at a cut; padding is left out."""
        return observe(self.pairs[gap.tower], gap, modules)


@contextlib.contextmanager
def cutting(case: Case) -> Iterator[Cutting]:
    """Drop from every tower the block whose two ends are most alike by cosine.

    The first layer stays, since the map stands behind a layer.

    Source: "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2,
    as both papers do, with the cosine of all tokens.
    """
    shared = case.shared
    towers = shared.subject.towers
    plan = il.make_plan(
        shared.scores,
        drop_fraction=case.fraction,
        rule="uidl",
        protect={name: {0, *case.vlm.towers[name].pinned} for name in towers},
        towers=towers,
    )
    student = il.prune(case.vlm, plan)
    gaps = [
        gap
        for name, planned in plan.towers.items()
        for gap in find_gaps(read_cut(case.vlm, name, planned))[0]
    ]
    with contextlib.ExitStack() as stack:
        for model in (case.vlm.model, student.model):
            stack.enter_context(inference(model))
            stack.enter_context(without_cache(model))
        calibration = Calibration(case.vlm, shared.calibration, BATCH_SIZE)
        pairs = {
            tower: Pair(case.vlm.model, student.model, calibration, weights)
            for tower, weights in calibration.survey(towers).items()
        }
        yield Cutting(student, tuple(gaps), pairs)


def replaceme(case: Case) -> Made:
    """Fold a linear map of the feed-forward output into the projection before the cut.

    With M what the last projection before the cut gives, Y what it is added to and Z the state
    behind the removed block, T = argmin |M T + Y - Z|^2 + a |T|^2, and T' W takes the place of W.
    a is chosen on held-out samples.

    Source: ReplaceMe (NeurIPS 2025, arXiv 2505.02819), the least-squares variant and its ridge.

    Raises:
        PlanError: layers that do not add their last projection to the stream as it is.
    """
    with cutting(case) as cut:
        for gap in cut.gaps:
            linear = _projection(cut, gap)
            change = fit_replacement(cut.see(gap, {"features": linear}), linear)
            if change is None:
                raise PlanError(f"No linear map stands in for {gap}: none helps held-out samples.")
            _fold(linear, change)
    return Made(cut.student)


def _projection(cut: Cutting, gap: Gap) -> nn.Linear:
    layer = cut.layers(gap)[gap.position - 1]
    calibration = cut.pairs[gap.tower].calibration
    run = partial(calibration.run, cut.student.model, calibration.batches[0])
    found = find_projection(record_calls([layer], run)[0])
    if found is None or found.norms:
        raise PlanError(
            f"Layer {gap.after} of the {gap.tower} tower ({type(layer).__name__}) passes its "
            "output through a norm or a gate before it is the residual stream, so the linear map "
            "of ReplaceMe cannot be folded into it."
        )
    return found.linear


def fit_replacement(seen: Iterator[Seen], linear: nn.Linear) -> torch.Tensor | None:
    """Solve for T [D, D]; None where T = 0 is best on held-out samples.

    Args:
        seen: both models at the cut, with the "features" that the projection is given.
        linear: the projection.
    """
    width = linear.out_features
    both = tuple(
        NormalEquations(width, width, intercept=False, device=linear.weight.device)
        for _ in range(2)
    )
    for each in seen:
        added = linear(each.inputs["features"])
        residual = each.goal.double() - each.state.double() + added.double()
        for equations, rows in zip(both, (~each.held, each.held), strict=True):
            # every token counts alike, as published
            ones = torch.ones_like(each.weight[rows])
            equations.add(added[rows], residual[rows], ones, each.goal[rows])
    return choose(*both).change


def _fold(linear: nn.Linear, transform: torch.Tensor) -> None:
    """Make a projection give x T instead of x; T is [D, D]."""
    weight = changed(linear.weight, lambda value: transform.T @ value)
    bias = changed(linear.bias, lambda value: value @ transform)
    put_weights(linear, (weight, bias))


class Patch(nn.Module):
    """A linear map of the residual stream, x P with P [D, D]; trains with its layer."""

    def __init__(self, matrix: torch.Tensor) -> None:
        """Take the matrix P [D, D]."""
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states, [..., D] -> [..., D]."""
        return hidden @ self.matrix.to(hidden.dtype)


def linearpatch(case: Case) -> Made:
    """Put P = H diag(d) H' behind the cut, H an orthonormal Hadamard matrix.

    d_c = E|(x_j H)_c| / E|(x_i H)_c|, with x_i the state before and x_j behind the removed block.
    The map is a module of the layer behind the cut, and trains with it; the paper trains it alone.

    Source: "A Simple Linear Patch Revives Layer-Pruned Large Language Models" (LinearPatch, NeurIPS
    2025), the definition of P.

    Raises:
        PlanError: there is no Hadamard matrix of the tower's width here.
    """
    with cutting(case) as cut:
        for gap in cut.gaps:
            layer = cut.layers(gap)[gap.position]
            trains = any(parameter.requires_grad for parameter in layer.parameters())
            patch = Patch(fit_patch(cut.see(gap)).to(cut.student.dtype)).requires_grad_(trains)
            layer.linear_patch = patch
            layer.register_forward_pre_hook(_cross, with_kwargs=True)
    return Made(cut.student, "the map is a module at run time, D x D per cut")


def _cross(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give a layer what its patch makes of its input; a copy of the layer uses its own patch."""
    hidden = layer_input(args, kwargs, type(layer).__name__)
    crossed = layer.linear_patch(hidden)
    return (
        tuple(crossed if each is hidden else each for each in args),
        {key: crossed if each is hidden else each for key, each in kwargs.items()},
    )


def fit_patch(seen: Iterator[Seen]) -> torch.Tensor:
    """Compute P [D, D] in fp64 from both models at the cut.

    Raises:
        PlanError: there is no Hadamard matrix of this width here.
    """
    sizes: torch.Tensor | None = None
    turn = torch.empty(0)
    for each in seen:
        if sizes is None:
            turn = hadamard(each.state.shape[1]).to(each.state.device)
            sizes = turn.new_zeros(2, len(turn))
        for row, states in enumerate((each.state, each.goal)):
            sizes[row] += (states.double() @ turn).abs().sum(0)
    if sizes is None:
        raise PlanError("No sample reaches the cut, so no map can be fitted to it.")
    ratio = sizes[1] / sizes[0].clamp_min(torch.finfo(torch.float64).tiny)
    return turn @ torch.diag(ratio) @ turn.T


def hadamard(size: int) -> torch.Tensor:
    """Return an orthonormal Hadamard matrix [D, D], fp64: Sylvester's of one of Paley's.

    Raises:
        PlanError: D is not 1, 12 or 20 times a power of two.
    """
    odd = next((m for m in (1, 12, 20) if size % m == 0 and (size // m).bit_count() == 1), None)
    if odd is None:
        raise PlanError(
            f"LinearPatch turns the states by a Hadamard matrix, and there is none of width {size} "
            "here: it must be 1, 12 or 20 times a power of two."
        )
    made = torch.ones(1, 1, dtype=torch.float64) if odd == 1 else _paley(odd - 1)
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(double, made)
    return made / size**0.5


def _paley(prime: int) -> torch.Tensor:
    """Return Paley's first Hadamard matrix of size q + 1, for a prime q that is 3 modulo 4."""
    squares = {number * number % prime for number in range(1, prime)}
    made = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    for row in range(prime):
        for column in range(prime):
            positive = row == column or (row - column) % prime in squares
            made[row + 1, column + 1] = 1.0 if positive else -1.0
        made[row + 1, 0] = -1.0
    return made


METHODS = {
    "replaceme": Method(replaceme),
    "linearpatch": Method(linearpatch, timed="linearpatch"),
}
