"""The package's own way: layers chosen with their cuts repaired, bridges folded, then healed."""

from __future__ import annotations

import interlace as il
from methods.case import BATCH_SIZE, Case, Made, Method

RULE = "compensated"


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


METHODS = {RULE: Method(compensated)}
