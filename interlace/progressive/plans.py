"""The plans of a stage: in the numbers of the first model, and added to those before it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from interlace.errors import ConfigError
from interlace.plan.planner import arguments_of, make_plan
from interlace.plan.rules import USE_WEIGHTS
from interlace.records import TowerPlan
from interlace.surgery.cuts import original_depth, renumbered

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from interlace.config import PlanSettings
    from interlace.models import VLM
    from interlace.plan.rules import Loss
    from interlace.records import Plan, Scores, TowerScores

METRIC = "gates"


def drop_counts(scores: Scores, vlm: VLM, settings: PlanSettings) -> dict[str, int]:
    """Return how many layers each tower loses in all: as many as in a single cut.

    Raises:
        PlanError: too many for a tower, or for what is not protected.
    """
    # any rule counts alike; this one has a plan wherever there are enough layers
    free = {"rule": "uniform", "weights": None, "group": "all"}
    arguments = {**arguments_of(settings), **free}
    towers = make_plan(scores, **{**arguments, "protect": ()}).towers
    arguments["protect"] = _at_positions(settings.protect, vlm, towers)
    plan = make_plan(scores, **arguments)
    return {name: len(tower.drop) for name, tower in plan.towers.items()}


def gate_weight(settings: PlanSettings, importance: float | None, *, gated: bool) -> float:
    """Return the weight of the gates beside the similarity: 0 where they are no signal.

    Args:
        settings: of the plan.
        importance: as the user set it; None for the default.
        gated: whether healing learns gates.

    Raises:
        ConfigError: a weight for a rule that takes no scores, or without gates.
    """
    scored = settings.rule in USE_WEIGHTS
    if importance and not gated:
        raise ConfigError(
            "gate_importance weighs the gates learned in healing, but heal.gates is 'none'. "
            "Set gates, or leave gate_importance out."
        )
    if importance and not scored:
        raise ConfigError(
            f"gate_importance has no use for the rule '{settings.rule}', which does not choose by "
            f"scores. Leave it out, or use one of {', '.join(sorted(USE_WEIGHTS))}."
        )
    if not (gated and scored):
        return 0.0
    return 1.0 if importance is None else importance


def with_gates(scores: Scores, gates: Mapping[str, Mapping[int, float]], student: VLM) -> Scores:
    """Add the gates of a student's layers to its scores, as the metric "gates".

    Args:
        scores: of the student.
        gates: tower -> layer of the first model -> mean size of its gates.
        student: gives the layers their positions.
    """

    def extended(name: str, tower: TowerScores) -> TowerScores:
        if name not in gates:
            return tower
        values = tuple(gates[name][layer] for layer in student.towers[name].original)
        return replace(tower, metrics={**tower.metrics, METRIC: values})

    return replace(scores, towers={n: extended(n, t) for n, t in scores.towers.items()})


def plan_stage(
    scores: Scores,
    student: VLM,
    counts: Mapping[str, int],
    settings: PlanSettings,
    *,
    gates: Mapping[str, Mapping[int, float]],
    weight: float,
    loss: Loss | None,
) -> Plan:
    """Choose the layers of one stage.

    Args:
        scores: of the student as it is.
        student: what is left before the stage.
        counts: tower -> layers to drop now; towers that it leaves out stay as they are.
        settings: of the plan; its amounts and towers are replaced by `counts`.
        gates: tower -> layer -> mean size of its gates in the stage before; empty for none.
        weight: of the gates beside the similarity; 0 for none.
        loss: for rules that choose by it.

    Returns:
        The plan in the numbers of the first model.
    """
    weights = settings.weights
    if gates and weight:
        scores = with_gates(scores, gates, student)
        weights = {**(weights or {"similarity": 1.0}), METRIC: weight}
    arguments = {
        **arguments_of(settings),
        "drop_fraction": None,
        "num_drop": dict(counts),
        "towers": None,
        "weights": weights,
        "protect": _at_positions(settings.protect, student, counts),
    }
    plan = make_plan(scores, loss=loss, **arguments)
    towers = {
        name: renumbered(tower, student.towers[name].original, original_depth(student, name))
        for name, tower in plan.towers.items()
    }
    # the sizes that the scores know are those of the student, whose layers have other numbers
    same = all(student.towers[name].num_layers == each.num_layers for name, each in towers.items())
    return replace(plan, towers=towers, shape=plan.shape if same else None)


def _at_positions(protect: Any, student: VLM, towers: Iterable[str]) -> Any:
    """Translate protected layers of the first model into positions in the student."""
    if isinstance(protect, str):
        return protect
    given = protect if isinstance(protect, dict) else dict.fromkeys(towers, protect)
    return {
        name: layers
        if isinstance(layers, str)
        else tuple(student.towers[name].position(layer) for layer in layers)
        for name, layers in given.items()
        if name in student.towers
    }


def after(earlier: Plan | None, cut: Plan) -> Plan:
    """Return the plan of a stage's cut that also trains what the stages before it trained.

    Of two roles of a layer the new one counts; anchors of earlier stages stay anchors.

    Args:
        earlier: the plan from the dense model to the stage before; None for the first stage.
        cut: the plan of this stage alone.
    """
    if earlier is None:
        return cut
    towers = {}
    for name in dict.fromkeys([*earlier.towers, *cut.towers]):
        old = earlier.towers.get(name)
        new = cut.towers.get(name)
        if new is None:
            # what was trained goes on being trained, though this stage cuts nothing here
            new = TowerPlan(num_layers=earlier[name].num_layers)
        if old is not None:
            taken = {*new.drop, *new.tune, *new.freeze}
            tune = new.tune + _without(old.tune, taken)
            freeze = new.freeze + _without(old.freeze, {*taken, *tune})
            new = replace(new, tune=tune, freeze=freeze)
        towers[name] = new
    return replace(cut, towers=towers)


def _without(layers: Sequence[int], taken: set[int]) -> tuple[int, ...]:
    return tuple(layer for layer in layers if layer not in taken)


def whole(earlier: Plan | None, cut: Plan, dense: str, number: int) -> Plan:
    """Return the plan that leads from the dense model to the end of a stage.

    Args:
        earlier: the same of the stage before; None for the first stage.
        cut: what `after` gave for this stage.
        dense: fingerprint of the dense model.
        number: of the stage, for the reasons.
    """
    towers = {}
    for name, new in cut.towers.items():
        old = earlier.towers.get(name) if earlier is not None else None
        reasons = {layer: f"stage {number}: {why}" for layer, why in new.reasons.items()}
        scores = new.layer_scores
        if old is not None:
            reasons = {**old.reasons, **reasons}
            # a layer that is gone keeps the score it went with
            pairs = zip(new.layer_scores, old.layer_scores, strict=True)
            scores = tuple(was if now is None else now for now, was in pairs)
        towers[name] = replace(
            new,
            drop=(old.drop if old is not None else ()) + new.drop,
            reasons=dict(sorted(reasons.items())),
            layer_scores=scores,
        )
    inputs = {key: value for key, value in cut.inputs.items() if key == "data"}
    shape = cut.shape if earlier is None else earlier.shape
    return replace(cut, towers=towers, shape=shape, inputs={**inputs, "model": dense})
