"""Methods that drop whole layers by a rule of `interlace.make_plan`; sources stand there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import interlace as il
from interlace.plan.rules import USE_LOSS
from interlace.surgery.bridges.names import EVEN, has_bridges
from methods.case import BATCH_SIZE, Case, Made, Method

PUBLISHED = ("interlace", "interlace_oa", "interlace_tn", "random", "consecutive")
OTHERS = ("triplet_optimal", "shortgpt", "uidl", "last", "uniform", "sleb")


# the rules of the package's own methods, of parts instead of layers, and of widths beside them
OURS, OURS_PARTS, OURS_SPLIT = "compensated", "compensated_parts", "compensated_split"
# the same with heads and neurons judged by what they add to the stream
OURS_NORM = "compensated_split_norm"
# the same, as fast as whole layers by a stated share of a layer's time that no width changes
OURS_TIME = "compensated_split_time"


def plan_by(
    rule: str, case: Case, metrics: tuple[str, ...] = ("similarity",), **options: Any
) -> il.Plan:
    """Plan by a rule; the layers that the model's family pins stay.

    What rules ask for is kept, so that a second plan of the same losses costs next to nothing.

    Args:
        rule: its name.
        case: with the model and the share to drop.
        metrics: to score by.
        options: further ones of `make_plan`, or others than these.
    """
    shared = case.shared
    usual = {
        "drop_fraction": case.fraction,
        "protect": "auto",
        "seed": shared.seed,
        "towers": shared.subject.towers,
    }
    if rule in USE_LOSS:
        usual["loss"] = shared.repaired_loss if rule in (OURS, OURS_PARTS) else shared.loss
    return il.make_plan(shared.scored(*metrics), rule=rule, **(usual | options))


def tune_all(plan: il.Plan) -> il.Plan:
    """Let all layers train that stay."""
    towers = {name: replace(tower, tune=tower.kept) for name, tower in plan.towers.items()}
    return replace(plan, towers=towers)


def cut(case: Case, plan: il.Plan, bridges: str, token_weights: str = EVEN) -> Any:
    """Make the student of a plan, its bridges fitted on the calibration samples."""
    data = case.shared.calibration if has_bridges(bridges) else None
    return il.prune(
        case.vlm,
        plan,
        bridges=bridges,
        data=data,
        batch_size=BATCH_SIZE,
        token_weights=token_weights,
    )


def drop_by(rule: str, case: Case) -> Made:
    """Drop the layers that a rule chooses."""
    return Made(cut(case, plan_by(rule, case), case.bridges))


METHODS = {rule: Method(partial(drop_by, rule), bridges=True) for rule in (*PUBLISHED, *OTHERS)}
