"""Which layers lose attention or the feed-forward part, and how text and cost follow."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from interlace.config import PlanSettings
from interlace.errors import ConfigError, PlanError
from interlace.plan import make_plan
from interlace.plan.cost import plan_cost
from interlace.plan.split import plan_by
from interlace.plan.widths import check_width_settings
from interlace.records import (
    ModelShape,
    Plan,
    Scores,
    SiteShape,
    TowerPlan,
    TowerScores,
    TowerShape,
)

LAYERS, NEURONS = 6, 32
# parameters of a layer: attention 8 * 64 + 4 * 32 + 16, feed-forward part 32 * 48 + 16
ATTENTION, FFN = 656, 1552
ATTENTION_VALUES = (0.5, 0.1, 0.3, 0.1, 0.9, 0.2)
FFN_VALUES = (0.5, 0.4, -0.1, 0.2, 0.1, 0.6)


def scores(**more: Any) -> Scores:
    sites = {
        "attn": SiteShape("heads", ((2, 2, 2, 2),) * LAYERS, 64, 32, shared_parameters=16),
        "mlp": SiteShape("ffn", ((NEURONS,),) * LAYERS, 48, shared_parameters=16),
        **more,
    }
    shape = TowerShape(16, 8, 4, 4, (3000,) * LAYERS, causal=True, sites=sites)
    measured = TowerScores(
        LAYERS,
        similarity={
            "all": {p: tuple(0.5 + 0.01 * i for i in range(LAYERS - p)) for p in (1, 2, 3)}
        },
        metrics={"attention_relevance": ATTENTION_VALUES, "mlp_relevance": FFN_VALUES},
        importance={"head_norm": {"attn": (tuple(map(float, range(8))),) * LAYERS}},
        pinned={3: "needed elsewhere"},
        num_samples=4,
    )
    return Scores({"text": measured}, shape=ModelShape({"text": shape}, 20000, 4))


def test_the_parts_of_least_relevance_go() -> None:
    plan = make_plan(scores(), attention_parts=0.5, ffn_parts=0.2)
    own = plan["text"]
    # ties go to the lower layer
    assert own.parts == {"attn": (1, 3, 5), "mlp": (2,)}
    assert own.tune == (1, 2, 3, 5)
    assert own.drop == ()
    assert not plan.standard
    assert plan.rule == "within layers"
    assert own.reasons[3] == "without attn: attention_relevance 0.1, lowest 2 of 6"
    assert own.reasons[2] == "without mlp: mlp_relevance -0.1, lowest 1 of 6"
    assert "attn: taken out of 3 layers whole (1, 3, 5)" in str(plan)
    assert own.reasons[2] in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


def test_protected_and_dropped_layers_keep_out() -> None:
    plan = make_plan(scores(), attention_parts={"text": 0.5}, protect="auto")
    assert plan["text"].parts == {"attn": (1, 2, 5)}
    dropping = make_plan(scores(), num_drop=1, attention_parts=0.4, ffn_parts=0.2, protect="auto")
    own = dropping["text"]
    (gone,) = own.drop
    assert gone == 2
    assert own.parts == {"attn": (1, 5), "mlp": (4,)}
    # with layers dropped, the rule says what trains
    assert own.tune == make_plan(scores(), num_drop=1, protect="auto")["text"].tune
    assert own.reasons[3].endswith("protected: needed elsewhere")


def test_heads_are_cut_and_grafted_where_attention_stays() -> None:
    plan = make_plan(scores(), attention_parts=0.5, heads=0.25)
    assert set(plan["text"].cut["attn"]) == {0, 2, 4}
    assert plan["text"].tune == (0, 1, 2, 3, 4, 5)
    with pytest.raises(PlanError, match="No dropped layer"):
        make_plan(scores(), num_drop=1, attention_parts=0.9, graft=0.5)


def test_cost_follows_the_parts() -> None:
    plan = make_plan(scores(), attention_parts=0.5, ffn_parts=0.2)
    change = plan_cost(plan, {"text": 10})
    gone = 3 * ATTENTION + FFN
    assert change.before.parameters - change.after.parameters == gone
    assert change.ratio("kv_cache_bytes") == 0.5
    pairs = 10 * 11 // 2
    assert change.after.prefill_flops == 2 * (18000 - gone) * 10 + 4 * 4 * 3 * 8 * pairs
    assert change.after.decode_flops == 2 * (18000 - gone) + 4 * 4 * 3 * 8 * 11


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"attention_parts": 0.1}, PlanError, "less than one. The smallest share is 0.1667"),
        ({"ffn_parts": 1.0}, ConfigError, "ffn_parts must be a share above 0 and below 1"),
        ({"ffn_parts": True}, ConfigError, "ffn_parts must be a share above 0 and below 1"),
        ({"attention_parts": 0.7, "protect": (0, 1, 2)}, PlanError, "only 3 may lose it"),
        ({"attention_parts": {"vision": 0.5}}, PlanError, "vision"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(
    arguments: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_plan(scores(), **arguments)


def test_parts_must_be_scored_and_known() -> None:
    given = scores()
    bare = dataclasses.replace(given["text"], metrics={})
    with pytest.raises(PlanError, match=r"Score with metrics=\(\.\.\., 'mlp_relevance'\)"):
        make_plan(dataclasses.replace(given, towers={"text": bare}), ffn_parts=0.5)
    # what could not be scored is not asked for once more
    noted = dataclasses.replace(bare, notes=("no mlp_relevance: layer 1 has experts",))
    with pytest.raises(PlanError, match="'text': no mlp_relevance: layer 1 has experts"):
        make_plan(dataclasses.replace(given, towers={"text": noted}), ffn_parts=0.5)
    with pytest.raises(PlanError, match=r"layer 1 has experts\. Leave it out of weights"):
        make_plan(
            dataclasses.replace(given, towers={"text": noted}),
            drop_fraction=0.2,
            weights={"similarity": 1, "mlp_relevance": 1},
        )
    with pytest.raises(PlanError, match="do not know the sizes"):
        make_plan(dataclasses.replace(given, shape=None), ffn_parts=0.5)
    cross = SiteShape("heads", ((1, 1),) * LAYERS, 64, 32, cross=True)
    with pytest.raises(PlanError, match="measured without both attentions"):
        make_plan(scores(cross=cross), attention_parts=0.5)
    second = SiteShape("ffn", ((NEURONS,),) * LAYERS, 48)
    with pytest.raises(PlanError, match="exactly one place of the kind 'ffn'"):
        make_plan(scores(other=second), ffn_parts=0.5)


def test_parts_that_are_gone_are_not_chosen_again() -> None:
    given = scores(attn=SiteShape("heads", ((2, 2), (), (2, 2), (2, 2), (2, 2), (2, 2)), 64, 32))
    assert make_plan(given, attention_parts=0.4)["text"].parts == {"attn": (3, 5)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": {"attn": (1,)}, "drop": (1,)}, "must be kept ones"),
        ({"parts": {"attn": (2, 1)}}, "ascending, each once"),
        ({"parts": {"attn": (7,)}}, "must be kept ones"),
        ({"parts": {"attn": (1,)}, "cut": {"attn": {1: (0,)}}}, "both cuts units of 'attn'"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        TowerPlan(LAYERS, **settings)


def test_a_recipe_must_score_the_parts_that_it_takes_out() -> None:
    with pytest.raises(ConfigError, match="Add 'attention_relevance' to metrics"):
        check_width_settings(PlanSettings(attention_parts=0.25), ("similarity", "mlp_relevance"))
    check_width_settings(PlanSettings(ffn_parts=0.25), ("mlp_relevance",))
    settings = PlanSettings(ffn_parts=0.25)
    assert settings.drop_fraction is None
    assert plan_by(settings, scores(), None)["text"].parts == {"mlp": (2,)}
