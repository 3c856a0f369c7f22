"""A share of all parameters, taken out as whole layers, heads and neurons together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from methods.case import Case, Made, Method
from methods.ours import REPAIR, match_states
from methods.rules import OURS, cut, plan_by, tune_all
from methods.width import Shares, options, shapes_of, widths

if TYPE_CHECKING:
    import interlace as il

# numbers of dropped layers that are tried, beside none
DEPTHS = 4


@dataclass(frozen=True)
class Split:
    """How a tower loses its parameters.

    Attributes:
        tower: its name.
        drop: layers that go.
        shares: what those lose that stay.
        spread: as of `make_plan`.
    """

    tower: str
    drop: int
    shares: Shares
    spread: str = "uniform"

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.tower}: {self.drop} layers, of the others {self.shares}, {self.spread}"

    def plan(self, case: Case) -> il.Plan:
        """Choose the layers as our own method does, then heads and neurons by their importance."""
        arguments = widths({self.tower: self.shares})
        if not self.shares.gone:
            arguments = {}
        plan = plan_by(
            OURS,
            case,
            ("similarity", "head_norm", "ffn_norm"),
            drop_fraction=None,
            num_drop={self.tower: self.drop} if self.drop else None,
            towers=[self.tower],
            spread=self.spread,
            **arguments,
        )
        # where only layers go, the neighbours of the cuts train
        return tune_all(plan) if self.shares.gone else plan


def splits(case: Case, tower: str) -> list[Split]:
    """List the ways for a tower: for some numbers of layers, all widths that make up the rest.

    Raises:
        PlanError: heads and neurons cannot be cut.
    """
    shape = shapes_of(case)[tower]
    total, depth = sum(shape.layer_parameters), case.vlm.towers[tower].num_layers
    wanted = case.parameters(tower)
    most = min(wanted * depth // total, depth - len(case.vlm.towers[tower].pinned) - 1)
    found = []
    for number in sorted({round(step * most / DEPTHS) for step in range(DEPTHS + 1)}):
        # by the mean of a layer, since which go is not known yet; the layers are alike
        shares = options(shape, wanted - number * total // depth, range(depth - number))
        found += [Split(tower, number, each) for each in shares]
    return found


def total(case: Case) -> Made:
    """Drop layers, and cut heads and neurons of the others, until the share is reached.

    How much goes by what is decided, tower by tower, by what selects our layers: how far a student
    with folded cuts is from the dense model on calibration samples. Of the best split, heads and
    neurons are then also chosen over all layers, which end in different widths if that is better.
    What stays is refitted.

    Raises:
        PlanError: a tower's heads or neurons cannot be cut.
    """
    chosen: dict[str, il.Plan] = {}
    notes = []
    for tower in case.counts():
        found = {split: _loss(case, split) for split in splits(case, tower)}
        best = min(found, key=found.__getitem__)
        lowest: dict[int, float] = {}
        for split, loss in found.items():
            lowest[split.drop] = min(loss, lowest.get(split.drop, math.inf))
        tried = ", ".join(f"{number}: {loss:.3g}" for number, loss in lowest.items())
        if best.shares.gone:
            spread = replace(best, spread="global")
            found[spread] = _loss(case, spread)
            best = min(found, key=found.__getitem__)
        notes.append(f"{best}, loss {found[best]:.3g}; by layers dropped {tried}")
        chosen[tower] = best.plan(case)
    plan = next(iter(chosen.values()))
    towers = {name: each.towers[name] for name, each in chosen.items()}
    plan = replace(plan, towers=towers, standard=False)
    return Made(cut(case, plan, REPAIR), "; ".join(notes))


def _loss(case: Case, split: Split) -> float:
    return case.shared.repaired_loss.of_plan(split.plan(case))


METHODS = {"ours_total": Method(total, match_states, timed="total", together=OURS)}
