"""Narrower layers instead of fewer: heads and neurons go until as many parameters are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import interlace as il
from interlace.errors import PlanError
from interlace.plan.widths import FFN_MULTIPLE
from methods.case import Case, Made, Method

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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

    def __str__(self) -> str:
        """Say it in words."""
        return (
            f"{self.heads:.0%} of the heads, {self.ffn:.0%} of the neurons, {self.gone} parameters"
        )


def options(shape: TowerShape, wanted: int, layers: Sequence[int]) -> list[Shares]:
    """List the widths at which some layers of a tower lose so many parameters.

    For every number of KV groups, the bundles of neurons with which the loss comes nearest to it;
    what stays further away than one bundle is left out, unless nothing comes nearer.

    Args:
        shape: of the tower.
        wanted: parameters that are to go.
        layers: from which they go, from each as much.

    Raises:
        PlanError: no heads or neurons are known that could be cut.
    """
    heads = [site for site in shape.sites.values() if site.kind == "heads"]
    neurons = [site for site in shape.sites.values() if site.kind == "ffn"]
    if not heads or not neurons:
        raise PlanError("No heads or no neurons are known in the layers, so no width can be cut.")
    groups = len(heads[0].groups[0])
    bundles = neurons[0].num_units(0) // FFN_MULTIPLE
    per_group = sum(site.parameters(layer) for site in heads for layer in layers) // groups
    per_bundle = sum(site.parameters(layer) for site in neurons for layer in layers) // bundles
    found = []
    for group in range(groups):
        bundle = min(max(0, round((wanted - group * per_group) / per_bundle)), bundles - 1)
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
    shapes = shapes_of(case)
    chosen: dict[str, Shares] = {}
    for tower in case.counts():
        layers = range(case.vlm.towers[tower].num_layers)
        found = options(shapes[tower], case.parameters(tower), layers)
        losses = [case.shared.loss_of(_cut(case, {tower: each}).model) for each in found]
        chosen[tower] = found[losses.index(min(losses))]
    note = "; ".join(f"{tower}: {each}" for tower, each in chosen.items())
    return Made(_cut(case, chosen), note)


def shapes_of(case: Case) -> Mapping[str, TowerShape]:
    """Return the sizes of all towers.

    Raises:
        PlanError: they are not known.
    """
    shape = case.shared.width_scores.shape
    if shape is None:
        raise PlanError("The scores do not know the sizes of the model.")
    return shape.towers


def widths(shares: Mapping[str, Shares]) -> dict[str, Any]:
    """Return the arguments of `make_plan` that cut a tower's shares."""
    return {
        # a hair more, so that rounding down gives the number that was chosen
        "heads": {name: each.heads + 1e-6 if each.heads else None for name, each in shares.items()},
        "ffn": {name: each.ffn + 1e-6 if each.ffn else None for name, each in shares.items()},
        # widths that a family's config cannot state are no reason to refuse
        "standard": False,
    }


def _cut(case: Case, shares: dict[str, Shares]) -> Any:
    scores, seed = case.shared.width_scores, case.shared.seed
    return il.prune(
        case.vlm, il.make_plan(scores, towers=list(shares), seed=seed, **widths(shares))
    )


METHODS = {"width": Method(width, timed="width")}
