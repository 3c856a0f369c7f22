"""What every part of our own method does: each is left out, or an optional one put in, in turn."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import interlace as il
from interlace._recommended import RECOMMENDED_HEAL
from interlace.config import PlanSettings, ScoreSettings
from interlace.errors import PlanError
from methods.case import BATCH_SIZE, LOSS_SAMPLES, Case, Made, Method
from methods.ours import REPAIR, WEIGHED, match_states
from methods.rules import OURS, cut, plan_by, tune_all

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Variant:
    """What differs from `compensated`.

    Attributes:
        rule: that chooses the layers.
        metrics: what is scored.
        plan: options of `make_plan`.
        bridges: of the student; the layers are chosen with folded cuts all the same.
        token_weights: of the bridges; likewise.
        tune_all: train all layers that stay, not the neighbours of the cuts alone.
        heal: settings of healing.
        timed: as of `Method`.
    """

    rule: str = OURS
    metrics: tuple[str, ...] = ("similarity",)
    plan: Mapping[str, Any] = field(default_factory=dict)
    bridges: str = REPAIR
    token_weights: str = WEIGHED
    tune_all: bool = False
    heal: Mapping[str, Any] = field(default_factory=dict)
    timed: str = "layers"


VARIANTS = {
    # without a part
    "ours_no_bridges": Variant(bridges="none", token_weights="even"),
    "ours_even_tokens": Variant(token_weights="even"),
    "ours_fold_alone": Variant(bridges="fold"),
    "ours_chosen_unrepaired": Variant(rule="sleb"),
    "ours_chosen_by_cosine": Variant(rule="shortgpt"),
    "ours_chosen_by_triplets": Variant(rule="interlace"),
    "ours_ce_alone": Variant(heal={"hidden_weight": 0.0, "kl_weight": 0.0}),
    "ours_no_ce": Variant(heal={"ce_weight": 0.0}),
    "ours_hidden_as_others": Variant(heal={"hidden_weight": 1.0}),
    "ours_no_hidden": Variant(heal={"hidden_weight": 0.0}),
    "ours_no_kl": Variant(heal={"kl_weight": 0.0}),
    "ours_all_tuned": Variant(tune_all=True),
    # with a part that is optional
    "ours_scale": Variant(bridges="scale"),
    "ours_diagonal": Variant(bridges="diagonal", timed="diagonal"),
    "ours_lowrank": Variant(bridges="lowrank", timed="lowrank"),
    "ours_balanced": Variant(plan={"group": "balanced"}),
    "ours_relevance": Variant(
        metrics=("similarity", "relevance"), plan={"weights": {"relevance": 1.0}}
    ),
    "ours_alignment": Variant(metrics=("similarity", "alignment"), plan={"protect": "alignment"}),
    "ours_l1_gates": Variant(heal={"gates": "l1", "validation_fraction": 0.0}),
    "ours_l0_gates": Variant(heal={"gates": "hard_concrete", "validation_fraction": 0.0}),
    "ours_grafted": Variant(
        metrics=("similarity", "head_norm", "ffn_norm"),
        # a half is the least that Qwen3-VL has, one of two KV groups
        plan={"graft": 0.5, "standard": False},
        timed="graft",
    ),
}
STAGES = 2


def make(variant: Variant, case: Case) -> Made:
    """Make the student of a variant.

    Raises:
        PlanError: the model cannot take it, or it comes to the same as `compensated`.
    """
    plan = plan_by(variant.rule, case, variant.metrics, **variant.plan)
    usual = plan_by(OURS, case)
    if variant.tune_all:
        plan = tune_all(plan)
    alike = all(
        (set(each.drop), set(each.tune), each.graft)
        == (set(usual[name].drop), set(usual[name].tune), usual[name].graft)
        for name, each in plan.towers.items()
    )
    repaired = (variant.bridges, variant.token_weights) == (REPAIR, WEIGHED)
    if alike and repaired and not variant.heal:
        return Made(None, same_as=OURS)
    return Made(cut(case, plan, variant.bridges, variant.token_weights))


def in_stages(case: Case) -> Made:
    """Cut, heal and score twice instead of once, on the samples and steps of one healing.

    The student comes healed, so that there is nothing to measure before healing.
    """
    shared = case.shared
    with tempfile.TemporaryDirectory() as folder:
        made = il.progressive(
            case.vlm,
            calibration=shared.calibration,
            healing=shared.healing,
            # no stage is rolled back, so these decide nothing
            held_out=shared.calibration[:LOSS_SAMPLES],
            output=folder,
            stages=STAGES,
            score=ScoreSettings(batch_size=BATCH_SIZE),
            plan=PlanSettings(
                drop_fraction=case.fraction,
                rule=OURS,
                towers=shared.subject.towers,
                seed=shared.seed,
            ),
            heal=case.settings.replace(hidden_weight=RECOMMENDED_HEAL.hidden_weight),
        )
    reports = [stage.healed for stage in made.stages if stage.healed is not None]
    if not reports:
        raise PlanError("Stages are of no use without healing. Give samples to heal with.")
    spent = {
        key: sum(getattr(report, key) for report in reports)
        for key in ("tokens", "steps", "num_samples", "seconds")
    }
    return Made(made.student, f"{len(made.stages)} stages", healed=replace(reports[-1], **spent))


METHODS = {
    name: Method(
        partial(make, variant),
        partial(match_states, **variant.heal),
        timed=variant.timed,
        together=OURS,
    )
    for name, variant in VARIANTS.items()
} | {"ours_two_stages": Method(in_stages, together=OURS)}
