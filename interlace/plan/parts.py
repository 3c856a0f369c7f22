"""Which kept layers lose their attention or their feed-forward part whole: those of least value.

A layer is judged by how much the loss rises without the part (`attention_relevance`,
`mlp_relevance`), measured on the whole model. The lowest go, ties to the lower layer.

Source: BlockPruner (arXiv 2406.10594) and FinerCut (arXiv 2405.18218) prune such parts one by one,
LLM-Drop (arXiv 2406.15786) attention at once, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from interlace.errors import PlanError
from interlace.plan.protection import protected_layers
from interlace.plan.shares import ceil_share, check_share, count_of, shape_of
from interlace.plan.weights import why_missing
from interlace.records import TowerPlan

if TYPE_CHECKING:
    from interlace.plan.protection import Guard
    from interlace.plan.widths import Fraction
    from interlace.records import Scores, SiteShape

# argument -> kind of the place, metric that it is judged by
PARTS = {
    "attention_parts": ("heads", "attention_relevance"),
    "ffn_parts": ("ffn", "mlp_relevance"),
}


def add_parts(
    plans: Mapping[str, TowerPlan],
    scores: Scores,
    wanted: Mapping[str, Fraction],
    guards: Guard | dict[str, Guard],
) -> dict[str, TowerPlan]:
    """Add to the plans of towers which kept layers lose a part.

    Args:
        plans: tower -> plan of its layers.
        scores: with the sizes of the model and the relevance of the parts.
        wanted: "attention_parts" or "ffn_parts" -> share of the kept layers, or one per tower.
        guards: what protects layers, as `protection.resolve` gives it.

    Returns:
        Tower -> plan. A tower that drops no layers tunes all those that lose something.

    Raises:
        ConfigError: a share that cannot be used.
        PlanError: the parts were not scored or are not known, or the share is less than one layer
            or more than may lose the part.
    """
    made = dict(plans)
    for argument, given in wanted.items():
        shares = given if isinstance(given, Mapping) else dict.fromkeys(plans, given)
        for tower, share in shares.items():
            if share is None:
                continue
            number = check_share(
                argument, share, "0.25 takes the part out of a quarter of the kept layers."
            )
            plan = made.get(tower) or TowerPlan(scores[tower].num_layers)
            protected, _ = protected_layers(guards, scores, tower)
            made[tower] = _without(plan, scores, tower, argument, number, protected)
    return made


def _without(
    plan: TowerPlan,
    scores: Scores,
    tower: str,
    argument: str,
    share: float,
    protected: Mapping[int, str],
) -> TowerPlan:
    kind, metric = PARTS[argument]
    name, site = _place(scores, tower, kind)
    values = scores[tower].metrics.get(metric)
    if values is None:
        if reason := why_missing(scores[tower], metric):
            raise PlanError(
                f"{argument} cannot be planned for the tower '{tower}': {reason}. Leave this tower "
                f"out of {argument}, or take heads, neurons or layers."
            )
        raise PlanError(
            f"{argument} needs the relevance of the parts of the tower '{tower}', which was not "
            f"scored. Score with metrics=(..., '{metric}'), or --metrics similarity,{metric}."
        )
    have = [layer for layer in plan.kept if site.groups[layer]]
    free = sorted((each for each in have if each not in protected), key=lambda i: (values[i], i))
    count = count_of(len(plan.kept), share)
    if count == 0:
        raise PlanError(
            f"{argument}={share:g} of the {len(plan.kept)} kept layers of the tower '{tower}' is "
            f"less than one. The smallest share is {ceil_share(1 / len(plan.kept))}."
        )
    if count > len(free) or count == len(have):
        most = min(len(free), len(have) - 1)
        raise PlanError(
            f"{argument}={share:g} takes '{name}' out of {count} layers of the tower '{tower}', "
            f"but only {most} may lose it: {len(have)} have it, one must keep it, and "
            f"{len(have) - len(free)} of them are protected. Take a smaller share, or protect "
            "fewer layers."
        )
    chosen = free[:count]
    reasons = dict(plan.reasons)
    for rank, layer in enumerate(chosen, start=1):
        note = f"without {name}: {metric} {values[layer]:.4g}, lowest {rank} of {len(free)}"
        reasons[layer] = f"{reasons[layer]}; {note}" if layer in reasons else note
    made = replace(
        plan,
        parts={**plan.parts, name: tuple(sorted(chosen))},
        reasons=dict(sorted(reasons.items())),
    )
    return made if plan.drop else replace(made, tune=tuple(sorted(made.losing())))


def _place(scores: Scores, tower: str, kind: str) -> tuple[str, SiteShape]:
    """Return the one place of a kind in the layers of a tower."""
    sites = shape_of(scores, tower).sites
    found = {name: site for name, site in sites.items() if site.kind == kind}
    if kind == "heads" and any(site.cross for site in found.values()):
        raise PlanError(
            f"The layers of the tower '{tower}' also attend to another tower. Their relevance was "
            "measured without both attentions, so it does not say which self-attention may go. "
            "Leave attention_parts out for this tower; ffn_parts can be used."
        )
    if len(found) != 1:
        raise PlanError(
            f"The layers of the tower '{tower}' must have exactly one place of the kind '{kind}' "
            f"that is known, not {len(found)} ({', '.join(found) or 'none'}), so it cannot be "
            "taken out."
        )
    return next(iter(found.items()))
