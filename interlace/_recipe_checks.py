"""What a recipe asks for that a later stage would refuse, found before any work is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.data.samples import check_source
from interlace.errors import ConfigError, unknown_name
from interlace.evaluate.selection import checked_names
from interlace.plan.rules import find_rule
from interlace.progressive.verb import check_amounts
from interlace.scores.metrics import metric_classes
from interlace.surgery.bridges.names import WITHIN_LAYERS, check_bridges, has_bridges

if TYPE_CHECKING:
    from interlace.config import Recipe
    from interlace.models import VLM


def check_names(settings: Recipe) -> None:
    """Refuse names that a later stage would refuse.

    Raises:
        ConfigError: names what is unknown, or what does not go together.
        PlanError: weights for a rule that has no use for them.
    """
    metric_classes(settings.score.metrics)
    find_rule(settings.plan.rule)
    stages = 1 if settings.progressive is None else settings.progressive.stages
    check_amounts(settings.plan, stages, settings.score.metrics)
    _check_metrics(settings)
    _check_cut(settings)
    checked_names(settings.eval.tasks)
    check_source(settings.data.source, settings.data.root, settings.data.split)
    measured = settings.eval.source or settings.data.source
    check_source(measured, settings.eval.root, settings.eval.split)


def _check_cut(settings: Recipe) -> None:
    """Refuse bridges where no layer is dropped that they could stand in for."""
    bridges = settings.prune.bridges
    check_bridges(bridges)
    if has_bridges(bridges, but=WITHIN_LAYERS) and not settings.plan.drops:
        raise ConfigError(
            f"The recipe asks for bridges ({bridges!r}), but [plan] names no layers to drop that "
            "a bridge could stand in for. Add drop_fraction or num_drop to [plan], take one of "
            f"{', '.join(WITHIN_LAYERS)}, which also repair narrower layers, or leave bridges out "
            "of [prune]."
        )


def _check_metrics(settings: Recipe) -> None:
    """Refuse a plan by metrics that the recipe does not score."""
    needed = dict.fromkeys(settings.plan.weights or (), "weighs")
    protect = settings.plan.protect
    if "alignment" in (protect.values() if isinstance(protect, dict) else [protect]):
        needed["alignment"] = "protects by"
    for name, why in needed.items():
        if name not in settings.score.metrics:
            known = ", ".join(settings.score.metrics)
            raise ConfigError(
                f"The recipe {why} the metric '{name}' in [plan], but scores only {known}. Name it "
                "under [score] metrics too, or leave it out of [plan]."
            )


def check_towers(settings: Recipe, vlm: VLM) -> None:
    """Refuse towers that the model does not have, or that are planned but not scored.

    Raises:
        ConfigError: names the tower.
    """
    bridges = settings.prune.bridges
    for name in bridges if isinstance(bridges, dict) else ():
        if name not in vlm.towers:
            raise ConfigError(unknown_name(f"tower of {vlm.name}", name, vlm.towers))
    scored = settings.score.towers or tuple(vlm.towers)
    plan = settings.plan
    within = (plan.heads, plan.ffn, plan.attention_parts, plan.ffn_parts)
    given = (plan.drop_fraction, plan.num_drop, plan.parameters, *within)
    amounts = [each for each in given if isinstance(each, dict)]
    planned = [*(plan.towers or ()), *(name for each in amounts for name in each)]
    for name in (*scored, *planned):
        if name not in vlm.towers:
            raise ConfigError(unknown_name(f"tower of {vlm.name}", name, vlm.towers))
    unscored = [name for name in planned if name not in scored]
    if unscored:
        raise ConfigError(
            f"The recipe plans the tower {unscored[0]}, but scores only {', '.join(scored)}. "
            "Name it under [score] towers too, or leave it out of [plan]."
        )
