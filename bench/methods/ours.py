"""The package's own way: layers chosen with their cuts repaired, bridges folded, states matched."""

from __future__ import annotations

from typing import Any

import interlace as il
from methods.case import BATCH_SIZE, Case, Made, Method, heal

RULE = "compensated"
# A student with folded cuts is near the dense model, and few answers say little about what is
# missing; hidden states say it at every token.
HIDDEN_WEIGHT = 20.0


def compensated(case: Case) -> Made:
    """Drop what a repaired student misses least, and fold the repair into what stays."""
    shared = case.shared
    plan = il.make_plan(
        shared.scores,
        drop_fraction=case.fraction,
        rule=RULE,
        protect="auto",
        towers=shared.subject.towers,
        loss=shared.repaired_loss,
    )
    data = shared.calibration
    return Made(il.prune(case.vlm, plan, bridges="fold", data=data, batch_size=BATCH_SIZE))


def match_states(case: Case, student: Any) -> il.HealReport:
    """Heal in the common way, most of the loss being that of the hidden states."""
    return heal(case, student, hidden_weight=HIDDEN_WEIGHT)


METHODS = {RULE: Method(compensated, match_states)}
