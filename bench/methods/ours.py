"""The package's own way: layers chosen with cuts repaired, the rest refitted, states matched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interlace._recommended import RECOMMENDED_HEAL, RECOMMENDED_PRUNE
from methods.case import Case, Made, Method, heal
from methods.rules import OURS, cut, plan_by

if TYPE_CHECKING:
    import interlace as il

REPAIR = str(RECOMMENDED_PRUNE.bridges)


def compensated(case: Case) -> Made:
    """Drop what a repaired student misses least, and refit what stays."""
    return Made(cut(case, plan_by(OURS, case), REPAIR))


def match_states(case: Case, student: Any, **overrides: Any) -> il.HealReport:
    """Heal in the common way, most of the loss being that of the hidden states."""
    return heal(case, student, **({"hidden_weight": RECOMMENDED_HEAL.hidden_weight} | overrides))


METHODS = {OURS: Method(compensated, match_states, together=OURS)}
