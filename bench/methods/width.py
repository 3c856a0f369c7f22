"""Narrower layers instead of fewer: heads and neurons go until as many parameters are gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import interlace as il
from interlace.plan.shares import shape_of
from interlace.plan.split_ways import Widths, widths_for
from methods.case import Case, Made, Method

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def width(case: Case) -> Made:
    """Cut heads, in whole KV groups, and neurons, the same number in every layer.

    Heads are judged by the norm of what they add to the stream, neurons by that of their
    activations. How many of either go is decided, tower by tower, by the loss on calibration
    samples. All layers train.

    Source: Minitron, arXiv 2407.14679: importance by activations, candidates compared by loss.

    Raises:
        PlanError: a tower's heads or neurons cannot be cut.
    """
    chosen = choose_widths(case, lambda shares: _cut(case, shares))
    note = "; ".join(f"{tower}: {each}" for tower, each in chosen.items())
    return Made(_cut(case, chosen), note)


def choose_widths(case: Case, make: Callable[[Mapping[str, Widths]], Any]) -> dict[str, Widths]:
    """Choose how many heads and neurons go, tower by tower, by the loss on calibration samples.

    Args:
        case: with the model and the share to take out.
        make: makes a student with these widths of towers.

    Raises:
        PlanError: a tower's heads or neurons cannot be cut.
    """
    chosen: dict[str, Widths] = {}
    for tower in case.counts():
        layers = range(case.vlm.towers[tower].num_layers)
        shape = shape_of(case.shared.width_scores, tower)
        found = widths_for(shape, case.parameters(tower), layers)
        losses = [case.shared.loss_of(make({tower: each}).model) for each in found]
        chosen[tower] = found[losses.index(min(losses))]
    return chosen


def _cut(case: Case, shares: Mapping[str, Widths]) -> Any:
    amounts: dict[str, dict[str, float]] = {}
    for tower, each in shares.items():
        for kind, share in each.arguments(tower).items():
            amounts.setdefault(kind, {}).update(share)
    scores, seed = case.shared.width_scores, case.shared.seed
    # widths that a family's config cannot state are no reason to refuse
    plan = il.make_plan(scores, towers=list(shares), seed=seed, standard=False, **amounts)
    return il.prune(case.vlm, plan)


METHODS = {"width": Method(width, timed="width")}
