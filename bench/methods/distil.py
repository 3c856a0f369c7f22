"""Methods that differ in how the student learns, not in what is cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import interlace as il
from methods.case import Case, Made, Method, heal
from methods.rules import drop_by, plan_by, tune_all


def every_nth(case: Case) -> Made:
    """Keep layers at even distances, as DistilBERT does; all that stay train.

    Source: DistilBERT, arXiv 1910.01108, for where the student's weights come from.
    """
    return Made(il.prune(case.vlm, tune_all(plan_by("uniform", case))))


def distil(case: Case, student: Any) -> il.HealReport:
    """Learn from answers and from the teacher's predictions, and from nothing inside it.

    Source: Hinton et al., arXiv 1503.02531, section 2, at temperature 1.
    """
    return heal(case, student, hidden_weight=0.0)


def match_hidden(case: Case, student: Any) -> il.HealReport:
    """Learn from the teacher's hidden states alone: behind the cuts and at the end of the tower.

    Source: arXiv 2507.20749 (last hidden state); LLM-Streamline, arXiv 2403.19135 (behind the cut).
    Here the squared distance is relative to the teacher's norm.
    """
    weights = {"ce_weight": 0.0, "kl_weight": 0.0}
    return heal(case, student, **weights, validation_fraction=0.0)


METHODS = {
    "kd": Method(every_nth, distil),
    "shortgpt_hidden": Method(partial(drop_by, "shortgpt"), match_hidden),
    "uidl_hidden": Method(partial(drop_by, "uidl"), match_hidden),
}
