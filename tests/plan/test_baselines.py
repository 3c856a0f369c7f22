from __future__ import annotations

import math

import pytest

from interlace.errors import PlanError
from interlace.plan import make_plan, rule_names
from interlace.plan.rules import USE_LOSS
from interlace.records import Scores


def scores_of(s1, **more):
    return Scores.from_similarity("text", {1: s1}, len(s1) + 1, **more)


def test_shortgpt_takes_the_highest_similarities_and_the_tail_where_recorded():
    s1 = [0.2, 0.9, 0.7, 0.9, 0.8]
    plan = make_plan(scores_of(s1), num_drop=3, rule="shortgpt")["text"]
    assert plan.drop == (1, 3, 4)
    # 1 claims 2 (0 is as near, the later wins), 3 claims 5 over the gap, for 4 only 0 is left
    assert plan.tune == (2, 5, 0)
    plan = make_plan(scores_of(s1, tail={1: 0.95}), num_drop=3, rule="shortgpt")["text"]
    assert plan.drop == (5, 1, 3)
    assert plan.layer_scores[5] == 0.95
    plan = make_plan(scores_of(s1, tail={1: 0.95}), num_drop=2, rule="shortgpt", protect=(5, 1))
    assert plan["text"].drop == (3, 4)


def test_uidl_takes_the_closest_block():
    packs = {1: [0.5] * 7, 3: [0.1, 0.2, 0.9, 0.9, 0.3]}
    scores = Scores.from_similarity("text", packs, 8, tail={3: 0.95})
    plan = make_plan(scores, num_drop=3, rule="uidl")["text"]
    assert plan.drop == (5, 6, 7)
    scores = Scores.from_similarity("text", packs, 8)
    plan = make_plan(scores, num_drop=3, rule="uidl")["text"]
    assert (plan.drop, plan.tune) == ((2, 3, 4), (1, 5, 6))
    assert f"{math.acos(0.9) / math.pi:.4f}" in plan.reasons[2]
    assert make_plan(scores, num_drop=3, rule="uidl", protect=(2,))["text"].drop == (3, 4, 5)
    with pytest.raises(PlanError, match=r"Pack 2 .*not scored.*packs=\(\.\.\., 2\)"):
        make_plan(scores, num_drop=2, rule="uidl")


def test_last_and_uniform_need_no_tables():
    scores = Scores.from_similarity("text", {}, 12)
    plan = make_plan(scores, num_drop=3, rule="last")["text"]
    assert (plan.drop, plan.tune) == ((11, 10, 9), (8, 7, 6))
    plan = make_plan(scores, num_drop=3, rule="last", protect=(11,))["text"]
    assert (plan.drop, plan.tune) == ((10, 9, 8), (11, 7, 6))
    plan = make_plan(scores, num_drop=3, rule="uniform")["text"]
    assert (plan.drop, plan.tune) == ((2, 6, 10), (3, 7, 11))
    assert plan.layer_scores == (None,) * 12


# `compensated_parts` takes parts: tests/plan/test_greedy_parts.py
@pytest.mark.parametrize("rule", [each for each in rule_names() if each != "compensated_parts"])
def test_every_rule_tunes_as_many_as_it_drops_and_respects_protection(rule, random_scores):
    asked = {"loss": lambda _, dropped: sum(dropped)} if rule in USE_LOSS else {}
    for seed in range(10):
        scores = random_scores(16, seed, pinned={0: "first", 1: "second", 15: "last"})
        plan = make_plan(scores, drop_fraction=0.19, rule=rule, protect="auto", **asked)["text"]
        assert len(plan.drop) == len(plan.tune) == 3
        assert not {0, 1, 15} & set(plan.drop)
        assert set(plan.drop) <= set(plan.reasons)
        assert set(plan.tune) <= set(plan.reasons)
