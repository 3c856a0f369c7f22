"""Methods that drop whole layers by a rule of `interlace.make_plan`; sources stand there."""

from __future__ import annotations

from functools import partial

import interlace as il
from interlace.surgery.bridges.names import has_bridges
from methods.case import BATCH_SIZE, Case, Made, Method

PUBLISHED = ("interlace", "interlace_oa", "interlace_tn", "random", "consecutive")
OTHERS = ("triplet_optimal", "shortgpt", "uidl", "last", "uniform", "sleb")


def plan_by(rule: str, case: Case) -> il.Plan:
    """Plan by a rule; the layers that the model's family pins stay."""
    shared = case.shared
    return il.make_plan(
        shared.scores,
        drop_fraction=case.fraction,
        rule=rule,
        protect="auto",
        seed=shared.seed,
        towers=shared.subject.towers,
        loss=shared.loss,
    )


def drop_by(rule: str, case: Case) -> Made:
    """Drop the layers that a rule chooses."""
    data = case.shared.calibration if has_bridges(case.bridges) else None
    plan = plan_by(rule, case)
    return Made(il.prune(case.vlm, plan, bridges=case.bridges, data=data, batch_size=BATCH_SIZE))


METHODS = {rule: Method(partial(drop_by, rule), bridges=True) for rule in (*PUBLISHED, *OTHERS)}
