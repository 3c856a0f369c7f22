"""The package's own way: layers chosen with their cuts repaired, bridges folded, then healed."""

from __future__ import annotations

from methods.case import Case, Made, Method
from methods.rules import OURS, cut, plan_by


def compensated(case: Case) -> Made:
    """Drop what a repaired student misses least, and fold the repair into what stays."""
    return Made(cut(case, plan_by(OURS, case), "fold"))


METHODS = {OURS: Method(compensated, together=OURS)}
