"""The package's own ways: what goes is chosen repaired, the rest refitted, states matched."""

from __future__ import annotations

from functools import partial
from typing import Any

import interlace as il
from interlace._recommended import RECOMMENDED_HEAL, RECOMMENDED_PRUNE
from methods.case import Case, Made, Method, heal
from methods.rules import OURS, OURS_NORM, OURS_PARTS, OURS_SPLIT, OURS_TIME, cut, plan_by

REPAIR, WEIGHED = str(RECOMMENDED_PRUNE.bridges), RECOMMENDED_PRUNE.token_weights


def compensated(case: Case) -> Made:
    """Drop what a repaired student misses least, and refit what stays."""
    return Made(cut(case, plan_by(OURS, case), REPAIR, WEIGHED))


def match_states(case: Case, student: Any, **overrides: Any) -> il.HealReport:
    """Heal in the common way, most of the loss being that of the hidden states."""
    return heal(case, student, **({"hidden_weight": RECOMMENDED_HEAL.hidden_weight} | overrides))


def compensated_parts(case: Case) -> Made:
    """Do so with single attentions and feed-forward parts, of as many parameters."""
    student = cut(case, plan_by(OURS_PARTS, case), REPAIR, WEIGHED)
    parts = {
        f"{tower} {place}": list(layers)
        for tower, planned in student.plan.towers.items()
        for place, layers in planned.parts.items()
    }
    return Made(student, "; ".join(f"{name} {layers}" for name, layers in parts.items()))


def compensated_split(case: Case, metric: str = "obs", fixed_time: float = 0.0) -> Made:
    """Do so with layers, heads and neurons together, of as many parameters or as much time."""
    shared = case.shared
    judged = {"heads": f"head_{metric}", "ffn": f"ffn_{metric}"}
    plan = il.split_plan(
        shared.scored("similarity", *judged.values()),
        parameters={tower: case.share(tower) for tower in case.counts()},
        loss=shared.repaired_loss,
        fixed_time=fixed_time,
        seed=shared.seed,
        width_metrics=judged,
    )
    notes = (f"{tower}: {each['chosen']}" for tower, each in plan.settings["split"].items())
    return Made(cut(case, plan, REPAIR, WEIGHED), "; ".join(notes))


# One minus the share of a copy's bandwidth at which Qwen3-VL-8B, fused, decodes on an H200.
FIXED_TIME = 0.4

METHODS = {
    OURS: Method(compensated, match_states, together=OURS),
    OURS_PARTS: Method(compensated_parts, match_states, timed="parts"),
    OURS_SPLIT: Method(compensated_split, match_states, timed="split", together=OURS),
    OURS_NORM: Method(
        partial(compensated_split, metric="norm"), match_states, timed="split norm", together=OURS
    ),
    OURS_TIME: Method(
        partial(compensated_split, fixed_time=FIXED_TIME),
        match_states,
        timed="split time",
        together=OURS,
    ),
}
