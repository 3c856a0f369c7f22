"""Narrower layers instead of fewer: heads and neurons go until as many parameters are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import interlace as il
from interlace.errors import PlanError
from interlace.plan.widths import FFN_MULTIPLE
from methods.case import Case, Made, Method

if TYPE_CHECKING:
    from interlace.records import TowerShape


@dataclass(frozen=True)
class Shares:
    """What every layer of a tower loses.

    Attributes:
        heads: share of the KV groups, 0..1.
        ffn: share of the neurons, 0..1.
        gone: parameters that go from the whole tower.
    """

    heads: float
    ffn: float
    gone: int


def shares_of(shape: TowerShape, count: int) -> Shares:
    """Find the widths at which a tower loses as many parameters as `count` of its layers hold.

    Of all numbers of KV groups and bundles of neurons that come within one bundle of it, those
    whose shares are most alike are taken; where none does, those that come nearest.

    Raises:
        PlanError: no heads or neurons are known that could be cut.
    """
    layers = range(len(shape.layer_parameters))
    heads = [site for site in shape.sites.values() if site.kind == "heads"]
    neurons = [site for site in shape.sites.values() if site.kind == "ffn"]
    if not heads or not neurons:
        raise PlanError("No heads or no neurons are known in the layers, so no width can be cut.")
    groups = len(heads[0].groups[0])
    bundles = neurons[0].num_units(0) // FFN_MULTIPLE
    per_group = sum(site.parameters(layer) for site in heads for layer in layers) // groups
    per_bundle = sum(site.parameters(layer) for site in neurons for layer in layers) // bundles
    wanted = sum(shape.layer_parameters) * count // len(layers)

    def cost(option: tuple[int, int]) -> tuple[float, float]:
        off = abs(option[0] * per_group + option[1] * per_bundle - wanted)
        apart = abs(option[0] / groups - option[1] / bundles)
        return (0.0 if off <= per_bundle else off, apart)

    options = [(h, f) for h in range(groups) for f in range(bundles) if h or f]
    best = min(options, key=cost)
    gone = best[0] * per_group + best[1] * per_bundle
    return Shares(best[0] / groups, best[1] / bundles, gone)


def width(case: Case) -> Made:
    """Cut heads, in whole KV groups, and neurons, the same number in every layer.

    Heads are judged by the norm of what they add to the stream, neurons by that of their
    activations. All layers train.

    Source: Minitron, arXiv 2407.14679, importance of heads and neurons by their activations.

    Raises:
        PlanError: a tower's heads or neurons cannot be cut.
    """
    scores, counts = case.shared.width_scores, case.counts()
    if scores.shape is None:
        raise PlanError("The scores do not know the sizes of the model.")
    shares = {name: shares_of(scores.shape.towers[name], n) for name, n in counts.items()}
    plan = il.make_plan(
        scores,
        # a hair more, so that rounding down gives the number that was chosen
        heads={name: each.heads + 1e-6 if each.heads else None for name, each in shares.items()},
        ffn={name: each.ffn + 1e-6 if each.ffn else None for name, each in shares.items()},
        towers=list(counts),
        seed=case.shared.seed,
        protect="auto",
    )
    note = "; ".join(
        f"{name}: {each.heads:.0%} of the heads, {each.ffn:.0%} of the neurons, "
        f"{each.gone} parameters"
        for name, each in shares.items()
    )
    return Made(il.prune(case.vlm, plan), note)


METHODS = {"width": Method(width, timed="width")}
