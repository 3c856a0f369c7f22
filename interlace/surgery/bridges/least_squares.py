"""Streamed normal equations, and the ridge solution that held-out samples choose.

Legend: N tokens, F features, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

# Ridges are tried as multiples of the mean diagonal entry of the Gram matrix.
RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class NormalEquations:
    """Weighted sums that least squares needs, in fp64: X'WX, X'WR and tr R'WR.

    Attributes:
        gram: X'WX [F, F], with a last feature that is 1 where there is an intercept.
        cross: X'WR [F, D].
        energy: tr R'WR, which is the weighted squared error of changing nothing.
        goal_energy: the weighted squared size of the states that are aimed at.
    """

    def __init__(
        self, num_features: int, width: int, *, intercept: bool, device: torch.device
    ) -> None:
        """Start with empty sums."""
        rows = num_features + intercept
        self.intercept = intercept
        self.gram = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        self.cross = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.energy = self.goal_energy = 0.0

    def add(
        self,
        features: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        goal: torch.Tensor,
    ) -> None:
        """Add tokens to the sums.

        Args:
            features: X [N, F], any floating dtype.
            residual: R [N, D], what the features should explain.
            weight: [N] fp64, >= 0.
            goal: [N, D], what the student's state should be.
        """
        x = features.double()
        if self.intercept:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        r = residual.double()
        weighted = x * weight[:, None]
        self.gram += weighted.T @ x
        self.cross += weighted.T @ r
        self.energy += float(weight @ r.square().sum(1))
        self.goal_energy += float(weight @ goal.double().square().sum(1))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Return the sums of both; the operands stay as they are."""
        width = self.cross.shape[1]
        made = NormalEquations(0, width, intercept=self.intercept, device=self.gram.device)
        made.gram, made.cross = self.gram + other.gram, self.cross + other.cross
        made.energy = self.energy + other.energy
        made.goal_energy = self.goal_energy + other.goal_energy
        return made

    def solve(self, ridge: float) -> torch.Tensor:
        """Return M [F, D] that minimises tr (R - XM)'W(R - XM) + penalty |M|^2.

        The penalty is `ridge` times the mean diagonal entry of X'WX. The intercept is free of it.
        """
        features = len(self.gram) - self.intercept
        diagonal = self.gram.diagonal()[:features]
        mean = float(diagonal.mean())
        damped = self.gram.clone()
        # where no feature was ever active the penalty alone decides, and gives no change
        damped.diagonal()[:features] += ridge * mean if mean > 0 else 1.0
        factor = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(self.cross, factor)

    def error(self, change: torch.Tensor) -> float:
        """Return tr (R - XM)'W(R - XM) of a change M [F, D]."""
        explained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return max(0.0, self.energy - float(explained))


@dataclass(frozen=True)
class Solution:
    """What held-out samples chose.

    Attributes:
        change: M [F, D]; None where no change was best.
        ridge: the chosen ridge; infinite where no change was best.
        before: held-out squared error of changing nothing, as a share of the goal's squared size.
        after: the same of what was fitted without the held-out samples.
    """

    change: torch.Tensor | None
    ridge: float
    before: float
    after: float


def choose(
    fitted: NormalEquations,
    held: NormalEquations,
    *,
    solve: Callable[[NormalEquations, float], torch.Tensor] = NormalEquations.solve,
    refit: bool = True,
) -> Solution:
    """Choose the ridge by the error on held-out samples.

    Args:
        fitted: the samples to fit on.
        held: the held-out ones.
        solve: gives the change for equations and a ridge.
        refit: solve with all samples once the ridge is chosen. Not where the held-out samples are
            to judge what follows.
    """
    size = held.goal_energy or 1.0
    best, error, change = math.inf, held.energy, None
    for ridge in RIDGES:
        tried = solve(fitted, ridge)
        found = held.error(tried)
        if found < error:
            best, error, change = ridge, found, tried
    if change is not None and refit:
        change = solve(fitted + held, best)
    return Solution(change, best, held.energy / size, error / size)
