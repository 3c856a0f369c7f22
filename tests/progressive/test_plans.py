from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny import TINY

from interlace.config import PlanSettings
from interlace.errors import ConfigError, PlanError, ShapeError
from interlace.models.handle import VLM
from interlace.models.registry import family_of
from interlace.progressive.plans import (
    after,
    drop_counts,
    gate_weight,
    plan_stage,
    whole,
    with_gates,
)
from interlace.records import Plan, Scores, TowerPlan
from interlace.surgery import prune


def _vlm() -> VLM:
    model = TINY["llava"]()
    return VLM(model, family_of(model))


def _scores(vlm: VLM, s1: list[float]) -> Scores:
    depth = vlm.towers["text"].num_layers
    packs = {p: s1[: depth - p] for p in (1, 2, 3)}
    return Scores.from_similarity("text", packs, depth, pinned={depth - 1: "last"})


S1 = [0.1, 0.5, 0.9, 0.4, 0.8, 0.3, 0.2]


def _stage(student: VLM, s1: list[float], count: int, **changes: Any) -> Plan:
    given = {"gates": {}, "weight": 0.0, "loss": None, **changes}
    settings = given.pop("settings", PlanSettings(rule="shortgpt", protect=()))
    return plan_stage(_scores(student, s1), student, {"text": count}, settings, **given)


def test_layers_count_in_the_first_model_in_every_stage() -> None:
    vlm = _vlm()
    first = _stage(vlm, S1, 2)
    assert first["text"].drop == (2, 4)
    student = prune(vlm, first)
    assert student.towers["text"].original == (0, 1, 3, 5, 6, 7)
    second = _stage(student, [0.1, 0.9, 0.2, 0.8, 0.3], 2)
    assert second["text"].drop == (1, 5)
    assert second["text"].num_layers == 8
    cut = after(first, second)
    plan = whole(whole(None, first, "dense", 1), cut, "dense", 2)
    assert plan["text"].drop == (2, 4, 1, 5)
    assert plan.inputs == {"model": "dense"}
    # what was trained goes on being trained while it is there
    assert first["text"].tune == (3, 5)
    assert set(cut["text"].tune) == {*second["text"].tune, 3}
    assert plan["text"].reasons[2].startswith("stage 1: ")
    assert plan["text"].reasons[1].startswith("stage 2: ")
    # a layer keeps the score it was dropped by
    assert plan["text"].layer_scores[2] == S1[2]
    assert plan["text"].layer_scores[1] == 0.9
    # both ways lead to the same student
    one, other = prune(student, cut), prune(vlm, replace(plan, inputs={}))
    assert one.towers["text"].original == other.towers["text"].original == (0, 3, 6, 7)


def test_of_two_roles_of_a_layer_the_new_one_counts() -> None:
    old = Plan(towers={"text": TowerPlan(num_layers=8, drop=(1,), tune=(2,), freeze=(3,))})
    new = Plan(towers={"text": TowerPlan(num_layers=8, drop=(5,), tune=(3,), freeze=(2,))})
    assert after(old, new)["text"] == new["text"]
    apart = Plan(towers={"text": TowerPlan(num_layers=8, drop=(2,), tune=(4,), freeze=(6,))})
    made = after(old, apart)["text"]
    assert (made.drop, made.tune, made.freeze) == ((2,), (4,), (6, 3))


def test_a_tower_that_a_stage_leaves_alone_goes_on_training() -> None:
    old = Plan(
        towers={
            "text": TowerPlan(num_layers=8, drop=(1,), tune=(2,)),
            "vision": TowerPlan(num_layers=6, drop=(4,), tune=(3,), freeze=(2,)),
        }
    )
    new = Plan(towers={"text": TowerPlan(num_layers=8, drop=(5,), tune=(6,))})
    cut = after(old, new)
    assert cut["vision"].drop == ()
    assert (cut["vision"].tune, cut["vision"].freeze) == ((3,), (2,))
    assert whole(old, cut, "dense", 2).dropped == {"text": (1, 5), "vision": (4,)}


def test_protected_layers_are_those_of_the_first_model() -> None:
    vlm = _vlm()
    student = prune(vlm, _stage(vlm, S1, 2))
    settings = PlanSettings(rule="shortgpt", protect=(1, 5))
    second = _stage(student, [0.1, 0.9, 0.2, 0.8, 0.3], 2, settings=settings)
    assert second["text"].drop == (6, 3)
    with pytest.raises(ShapeError, match="no layer 2"):
        _stage(student, [0.1] * 5, 1, settings=PlanSettings(protect={"text": (2,)}))


def test_a_low_gate_speaks_for_dropping_its_layer() -> None:
    vlm = _vlm()
    student = prune(vlm, _stage(vlm, S1, 2))
    similar = [0.50, 0.51, 0.52, 0.53, 0.54]
    gates = {"text": {0: 1.0, 1: 1.0, 3: 0.2, 5: 1.0, 6: 1.0, 7: 1.0}}
    assert _stage(student, similar, 1)["text"].drop == (6,)
    assert _stage(student, similar, 1, gates=gates, weight=1.0)["text"].drop == (3,)
    assert _stage(student, similar, 1, gates=gates, weight=0.0)["text"].drop == (6,)
    table = with_gates(_scores(student, similar), gates, student)["text"].metrics["gates"]
    assert table == (1.0, 1.0, 0.2, 1.0, 1.0, 1.0)


def test_weights_of_gates_that_mean_nothing_are_refused() -> None:
    scored, greedy = PlanSettings(rule="interlace"), PlanSettings(rule="sleb")
    assert gate_weight(scored, None, gated=True) == 1.0
    assert gate_weight(scored, 0.5, gated=True) == 0.5
    assert gate_weight(scored, None, gated=False) == 0.0
    # gates still regularise, but this rule takes no scores
    assert gate_weight(greedy, None, gated=True) == 0.0
    with pytest.raises(ConfigError, match=r"heal\.gates is 'none'"):
        gate_weight(scored, 1.0, gated=False)
    with pytest.raises(ConfigError, match="no use for the rule 'sleb'"):
        gate_weight(greedy, 1.0, gated=True)


def test_counts_are_those_of_one_cut() -> None:
    vlm = _vlm()
    scores = _scores(vlm, S1)
    assert drop_counts(scores, vlm, PlanSettings(drop_fraction=0.49)) == {"text": 3}
    assert drop_counts(scores, vlm, PlanSettings(num_drop={"text": 5})) == {"text": 5}
    # which layers go is not asked
    by_group = PlanSettings(num_drop=4, rule="shortgpt", group="vision")
    assert drop_counts(scores, vlm, by_group) == {"text": 4}
    protected = PlanSettings(num_drop=3, protect=tuple(range(6)))
    with pytest.raises(PlanError, match="only 2 may go"):
        drop_counts(scores, vlm, protected)
