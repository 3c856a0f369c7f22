"""What a progressive run does where nobody says otherwise: docs/decisions/0006-default-rule.md.

Recipes and single verbs keep the published method as their default.
"""

from __future__ import annotations

from interlace.config import HealSettings, PlanSettings, PruneSettings

RECOMMENDED_PLAN = PlanSettings(rule="compensated")
RECOMMENDED_PRUNE = PruneSettings(bridges="refit", token_weights="fisher")
# With its cuts repaired a student is near the dense model from the start, and the hidden states
# say what is missing at every token.
# How long a step suits it nobody knows before, so a few samples say how far to go.
RECOMMENDED_HEAL = HealSettings(hidden_weight=20.0, validation_fraction=0.05)
