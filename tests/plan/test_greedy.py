from __future__ import annotations

import math
from dataclasses import replace

import pytest

from interlace.errors import ConfigError, PlanError
from interlace.plan import make_plan
from interlace.plan.greedy import CANDIDATES
from interlace.records import Scores


def test_sleb_is_greedy_over_the_loss_with_barriers():
    asked = []

    def loss(tower, dropped):
        asked.append((tower, dropped))
        # layer 4 is cheapest alone; together with it, 2 is cheaper than 1
        return {1: 1.0, 2: 3.0, 3: 5.0, 4: 0.5}[dropped[-1]] - 2.5 * (dropped == (4, 2))

    scores = Scores.from_similarity("text", {}, 6)
    plan = make_plan(scores, num_drop=2, rule="sleb", loss=loss)["text"]
    assert plan.drop == (4, 2)
    assert plan.layer_scores == (None, 1.0, 3.0, 5.0, 0.5, None)
    assert asked == [("text", d) for d in [(1,), (2,), (3,), (4,), (4, 1), (4, 2), (4, 3)]]
    with pytest.raises(ConfigError, match="loss is a float; give a callback"):
        make_plan(scores, num_drop=2, rule="sleb", loss=0.5)
    with pytest.raises(ConfigError, match="loss=callback"):
        make_plan(scores, num_drop=2, rule="sleb")
    with pytest.raises(PlanError, match="not a number"):
        make_plan(scores, num_drop=2, rule="sleb", loss=lambda tower, dropped: math.nan)

    def refusing(tower: str, dropped: tuple[int, ...]) -> float:
        if 4 in dropped or len(dropped) > most:
            raise PlanError("It cannot be built.")
        return loss(tower, dropped)

    # a student that cannot be made is passed over, unless all are
    most = 2
    assert make_plan(scores, num_drop=2, rule="sleb", loss=refusing)["text"].drop == (1, 2)
    most = 1
    with pytest.raises(PlanError, match=r"after \[1\], since .*: It cannot be built\."):
        make_plan(scores, num_drop=2, rule="sleb", loss=refusing)
    with pytest.raises(PlanError, match="only 2 layers between"):
        make_plan(scores, num_drop=3, rule="sleb", protect=(1, 2), loss=loss)


def _asking(costs: dict[int, float], asked: list[tuple[int, ...]]):
    def loss(_tower: str, dropped: tuple[int, ...]) -> float:
        asked.append(dropped)
        return costs.get(dropped[-1], 9.0)

    return loss


def test_compensated_asks_only_for_the_layers_with_the_highest_scores():
    s1 = [0.99, 0.1, 0.8, 0.2, 0.9, 0.3, 0.7, 0.6, 0.4]
    scores = Scores.from_similarity("text", {1: s1}, 10)
    asked: list[tuple[int, ...]] = []
    # layer 1 would be cheapest, but its score is the lowest; layer 0 is never dropped
    loss = _asking({1: 0.0, 6: 1.0, 2: 2.0}, asked)
    plan = make_plan(scores, num_drop=2, rule="compensated", loss=loss)["text"]
    assert CANDIDATES == 4
    assert plan.drop == (6, 2)
    assert asked == [(4,), (2,), (6,), (7,), (6, 4), (6, 2), (6, 7), (6, 8)]
    assert plan.layer_scores[6] == 1.0
    assert plan.layer_scores[1] is None
    assert plan.reasons[2].endswith("lowest loss 2")


def test_reasons_show_small_losses():
    scores = Scores.from_similarity("text", {}, 6)
    plan = make_plan(scores, num_drop=1, rule="sleb", loss=lambda *_: 1.234567e-5)["text"]
    assert plan.reasons[plan.drop[0]].endswith("lowest loss 1.235e-05")


def test_compensated_takes_other_scores_and_layers_without_one_last():
    scores = Scores.from_similarity("text", {1: [0.5] * 5}, 6)
    tower = replace(scores["text"], metrics={"relevance": (9.0, 5.0, 1.0, 2.0, 3.0, 4.0)})
    scores = replace(scores, towers={"text": tower})
    asked: list[tuple[int, ...]] = []
    loss = _asking({4: 0.5}, asked)
    given = {"num_drop": 1, "rule": "compensated", "loss": loss}
    assert make_plan(scores, **given, weights={"relevance": 1.0})["text"].drop == (4,)
    # in the order of their scores: layer 5 is the last, which stays, and 1 the most important
    assert asked == [(2,), (3,), (4,), (1,)]
    with pytest.raises(ConfigError, match="layer_loss"):
        make_plan(scores, num_drop=1, rule="compensated")
    with pytest.raises(PlanError, match="not a number"):
        make_plan(scores, num_drop=1, rule="compensated", loss=lambda *_: math.nan)
