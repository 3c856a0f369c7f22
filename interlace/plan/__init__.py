"""Stage 2, plan: from scores to what happens to every layer. Imports no torch."""

from interlace.plan.cost import Cost, CostChange, model_cost, plan_cost
from interlace.plan.planner import make_plan
from interlace.plan.rules import RULES, rule_names
from interlace.plan.split import split_plan

__all__ = [
    "RULES",
    "Cost",
    "CostChange",
    "make_plan",
    "model_cost",
    "plan_cost",
    "rule_names",
    "split_plan",
]
