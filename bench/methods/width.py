"""Narrower layers instead of fewer: heads and neurons go until as many parameters are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def options(shape: TowerShape, count: int) -> list[Shares]:
    """List the widths at which a tower loses as many parameters as `count` of its layers hold.

    For every number of KV groups, the bundles of neurons with which the loss comes nearest to it;
    what stays further away than one bundle is left out, unless nothing comes nearer.

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
    found = []
    for group in range(groups):
        bundle = min(max(0, round((wanted - group * per_group) / per_bundle)), bundles - 1)
        if group or bundle:
            gone = group * per_group + bundle * per_bundle
            found.append(Shares(group / groups, bundle / bundles, gone))
    limit = max(per_bundle, min(abs(each.gone - wanted) for each in found))
    return [each for each in found if abs(each.gone - wanted) <= limit]


def width(case: Case) -> Made:
    """Cut heads, in whole KV groups, and neurons, the same number in every layer.

    Heads are judged by the norm of what they add to the stream, neurons by that of their
    activations. How many of either go is decided, tower by tower, by the loss on calibration
    samples. All layers train.

    Source: Minitron, arXiv 2407.14679: importance by activations, candidates compared by loss.

    Raises:
        PlanError: a tower's heads or neurons cannot be cut.
    """
    shape = case.shared.width_scores.shape
    if shape is None:
        raise PlanError("The scores do not know the sizes of the model.")
    chosen: dict[str, Shares] = {}
    for tower, count in case.counts().items():
        found = options(shape.towers[tower], count)
        losses = [case.shared.loss_of(_cut(case, {tower: each}).model) for each in found]
        chosen[tower] = found[losses.index(min(losses))]
    note = "; ".join(
        f"{tower}: {each.heads:.0%} of the heads, {each.ffn:.0%} of the neurons, "
        f"{each.gone} parameters"
        for tower, each in chosen.items()
    )
    return Made(_cut(case, chosen), note)


def _cut(case: Case, shares: dict[str, Shares]) -> Any:
    plan = il.make_plan(
        case.shared.width_scores,
        # a hair more, so that rounding down gives the number that was chosen
        heads={name: each.heads + 1e-6 if each.heads else None for name, each in shares.items()},
        ffn={name: each.ffn + 1e-6 if each.ffn else None for name, each in shares.items()},
        towers=list(shares),
        seed=case.shared.seed,
        # widths that a family's config cannot state are no reason to refuse
        standard=False,
    )
    return il.prune(case.vlm, plan)


METHODS = {"width": Method(width, timed="width")}
