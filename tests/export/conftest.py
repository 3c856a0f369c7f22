"""Tiny models and students of every family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tiny import ALL

from interlace.models import VLM, family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Callable


def _student(name: str, **settings: Any) -> VLM:
    """A family's tiny model without a quarter of the layers of every tower."""
    model = ALL[name](**settings)
    vlm = VLM(model, family_of(model), name="acme/tiny-vlm")
    towers = {}
    for tower in vlm.towers.values():
        free = [layer for layer in range(tower.num_layers) if layer not in tower.pinned]
        drop = tuple(free[1::2][: tower.num_layers // 4])
        if tower.cross_attention_layers is not None:
            # a cross layer with the self layer that follows it
            drop = (2, 3)
        tune = tuple(layer + 1 for layer in drop[-1:])
        towers[tower.name] = TowerPlan(tower.num_layers, drop=drop, tune=tune)
    return prune(vlm, Plan(towers, rule="by hand"))


@pytest.fixture
def make_student() -> Callable[..., VLM]:
    return _student


@pytest.fixture(scope="module")
def student() -> VLM:
    """A small one, for what does not depend on the family."""
    return _student("clip", text=4, vision=4)
