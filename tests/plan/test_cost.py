from __future__ import annotations

import pytest

from interlace.errors import ConfigError, PlanError
from interlace.plan import model_cost, plan_cost
from interlace.plan.cost import decode_flops, kv_cache_bytes, prefill_flops
from interlace.records import ModelShape, Plan, TowerPlan, TowerShape

TEXT = TowerShape(8, 4, 2, 2, (100, 100, 100), causal=True)
VISION = TowerShape(8, 2, 2, 4, (50, 50), causal=False)
READER = TowerShape(8, 2, 2, 4, (60,), causal=True, cross_attention=True)


def test_one_tower_by_hand():
    # 2 * 300 * 5 for the matrices; 15 causal pairs, 4 * 4 * 2 each, in 3 layers
    assert prefill_flops(TEXT, 5) == 3000 + 15 * 32 * 3
    # one token more sees 6
    assert decode_flops(TEXT, 5) == 600 + 6 * 32 * 3
    # prefill of 6 is prefill of 5 and one decode step
    assert prefill_flops(TEXT, 6) == prefill_flops(TEXT, 5) + decode_flops(TEXT, 5)
    # keys and values, 2 heads of width 2, 3 layers, 5 tokens, 2 bytes
    assert kv_cache_bytes(TEXT, 5) == 2 * 2 * 2 * 3 * 5 * 2
    assert prefill_flops(VISION, 5) == 2 * 100 * 5 + 25 * 32 * 2
    assert decode_flops(VISION, 5) == kv_cache_bytes(VISION, 5) == 0
    assert prefill_flops(READER, 5, 7) == 2 * 60 * 5 + (15 + 35) * 32
    assert decode_flops(READER, 5, 7) == 120 + 13 * 32
    assert kv_cache_bytes(READER, 5, 7) == 2 * 2 * 4 * 12 * 2


def test_before_and_after_a_plan():
    shape = ModelShape({"text": TEXT, "vision": VISION}, total_parameters=1000)
    plan = Plan({"text": TowerPlan(3, drop=(1,))}, shape=shape)
    change = plan_cost(plan, {"text": 5, "vision": 4})
    assert change.before == model_cost(shape, {"text": 5, "vision": 4})
    assert change.before.parameters == 1000
    assert change.after.parameters == 900
    assert change.after.weight_bytes == 1800
    assert change.ratio("decode_flops") == pytest.approx(2 / 3)
    assert change.ratio("kv_cache_bytes") == pytest.approx(2 / 3)
    vision = prefill_flops(VISION, 4)
    text = prefill_flops(TEXT, 5)
    assert change.after.prefill_flops * 3 == text * 2 + vision * 3
    assert "66.7%" in str(change)
    assert "KV cache bytes" in str(change)


def test_bad_input():
    shape = ModelShape({"text": TEXT}, total_parameters=1000)
    with pytest.raises(ConfigError, match="Did you mean 'text'"):
        model_cost(shape, {"txt": 5})
    with pytest.raises(ConfigError, match="at least 0"):
        model_cost(shape, {"text": -1})
    with pytest.raises(PlanError, match="does not know the sizes"):
        plan_cost(Plan({"text": TowerPlan(3, drop=(1,))}), {"text": 5})
