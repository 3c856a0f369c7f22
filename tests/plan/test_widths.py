"""Budgets of heads and neurons: which bundles go, and how cost follows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from interlace.config import PlanSettings
from interlace.errors import ConfigError, PlanError
from interlace.plan import make_plan
from interlace.plan.cost import plan_cost
from interlace.plan.split import plan_by
from interlace.plan.widths import add_grafts, check_width_settings, needed_metrics
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


def scores(seed: int = 1) -> Scores:
    """Four KV heads of two query heads each; importance grows with layer and unit."""
    heads = tuple(
        tuple(10.0 * layer + (unit * 5 * seed) % 8 for unit in range(8)) for layer in range(LAYERS)
    )
    neurons = tuple(
        tuple(float(layer + (unit * 7) % NEURONS) for unit in range(NEURONS))
        for layer in range(LAYERS)
    )
    sites = {
        "attn": SiteShape("heads", ((2, 2, 2, 2),) * LAYERS, 64, 32),
        "mlp": SiteShape("ffn", ((NEURONS,),) * LAYERS, 48),
    }
    shape = TowerShape(16, 8, 4, 4, (3000,) * LAYERS, causal=True, sites=sites)
    measured = TowerScores(
        LAYERS,
        similarity={
            "all": {p: tuple(0.5 + 0.01 * i for i in range(LAYERS - p)) for p in (1, 2, 3)}
        },
        importance={"head_norm": {"attn": heads}, "ffn_norm": {"mlp": neurons}},
        num_samples=4,
    )
    return Scores({"text": measured}, shape=ModelShape({"text": shape}, 20000, 4))


def test_uniform_takes_the_least_important_groups_of_every_layer() -> None:
    plan = make_plan(scores(), heads=0.25, ffn=0.25)
    # values of the heads: 0 5 2 7 4 1 6 3, of the groups 5 9 5 9; ties go to the lower one
    assert plan["text"].cut["attn"] == dict.fromkeys(range(LAYERS), (0, 1))
    for units in plan["text"].cut["mlp"].values():
        assert units == tuple(sorted(unit for unit in range(NEURONS) if (unit * 7) % NEURONS < 8))
    assert plan.standard
    assert plan["text"].drop == ()
    assert plan["text"].tune == tuple(range(LAYERS))
    assert Plan.from_json(plan.to_json()) == plan
    assert "attn: 2 units cut in each of 6 layers, 12 in all" in str(plan)


def test_global_spends_the_budget_where_it_costs_least_and_spares_one_of_each() -> None:
    plan = make_plan(scores(), heads=0.25, spread="global")
    # 24 groups, 6 to go: three each of the two lowest layers
    assert {layer: len(units) for layer, units in plan["text"].cut["attn"].items()} == {0: 6, 1: 6}
    assert not plan.standard


def test_a_global_share_that_cannot_be_had_is_refused_with_one_that_can() -> None:
    # 24 groups in 6 layers, each of which keeps one
    with pytest.raises(
        PlanError, match=r"19 of 24, .* at most 18 can go. The largest share is 0.75"
    ):
        make_plan(scores(), heads=0.8, spread="global")
    cut = make_plan(scores(), heads=0.75, spread="global")["text"].cut["attn"]
    assert sum(map(len, cut.values())) == 36
    with pytest.raises(PlanError, match=r"The smallest share is 0\.0417"):
        make_plan(scores(), heads=0.04, spread="global")
    assert make_plan(scores(), heads=0.0417, spread="global")["text"].cut["attn"]


def test_ragged_takes_single_query_heads() -> None:
    plan = make_plan(scores(), heads={"text": 0.25}, spread="ragged")
    assert {layer: len(units) for layer, units in plan["text"].cut["attn"].items()} == {0: 7, 1: 5}
    assert plan["text"].cut["attn"][1] == (0, 2, 4, 5, 7)


def test_random_is_drawn_by_seed_and_layer() -> None:
    drawn = [
        make_plan(scores(), heads=0.5, width_metrics={"heads": "random"}, seed=seed)["text"].cut
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0]["attn"].values())) > 1


def test_layers_that_go_lose_nothing_and_their_best_groups_are_grafted() -> None:
    plan = make_plan(scores(), drop_fraction=1 / 6, heads=0.25, graft=0.5)
    own = plan["text"]
    (gone,) = own.drop
    assert set(own.cut["attn"]) == set(range(LAYERS)) - {gone}
    ((target, sources),) = own.graft.items()
    assert target in own.tune
    assert abs(target - gone) == 1
    assert sources == {gone: (1, 3)}
    assert not plan.standard


def test_cost_follows_the_widths() -> None:
    plan = make_plan(scores(), heads=0.25, ffn=0.25)
    change = plan_cost(plan, {"text": 10})
    gone = LAYERS * (2 * 64 + 32 + 8 * 48)
    assert change.before.parameters - change.after.parameters == gone
    assert change.ratio("kv_cache_bytes") == 0.75
    pairs = 10 * 11 // 2
    assert change.after.prefill_flops == 2 * (18000 - gone) * 10 + 4 * 6 * LAYERS * 4 * pairs
    graft = TowerPlan(LAYERS, drop=(2,), graft={3: {2: (0, 1, 3)}})
    grafted = plan_cost(dataclasses.replace(plan, towers={"text": graft}), {"text": 10})
    moved = 3 * (2 * 64 + 32)
    assert grafted.before.parameters - grafted.after.parameters == 3000 - moved
    assert grafted.ratio("kv_cache_bytes") == (5 * 4 + 3) / 24


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"heads": 0.1}, PlanError, "less than one. The smallest share is 0.25; a global"),
        ({"num_drop": 1, "graft": 0.1}, PlanError, r"^graft=0.1 .* smallest share is 0\.25\.$"),
        ({"heads": 1.5}, ConfigError, "above 0 and below 1"),
        ({"ffn": 0.2, "spread": "globally"}, ConfigError, "Did you mean 'global'"),
        ({"heads": 0.5, "width_metrics": {"heads": "head_taylor"}}, PlanError, "head_taylor"),
        ({"heads": 0.5, "width_metrics": {"head": "random"}}, ConfigError, "Did you mean 'heads'"),
        ({"heads": 0.5, "width_metrics": "heads=random"}, ConfigError, "give what judges heads"),
        ({"graft": 2.0, "num_drop": 1}, ConfigError, "at most 1"),
        ({"graft": 0.5, "heads": 0.25}, ConfigError, "no layer is dropped"),
        ({"num_drop": 1, "spread": "ragged"}, ConfigError, "Give heads or ffn, or leave spread"),
        ({"num_drop": 1, "spread": "raged"}, ConfigError, "Did you mean 'ragged'"),
        (
            {"heads": 0.25, "width_metrics": {"ffn": "random"}},
            ConfigError,
            "judges ffn, but none are cut",
        ),
        (
            {"heads": 0.25, "width_metrics": {"heads": "ffn_norm"}},
            ConfigError,
            "metric of heads 'ffn_norm'.*head_norm",
        ),
        ({"heads": 0.25, "protect": (0, 99)}, PlanError, "99"),
        (
            {"towers": ["text"], "ffn": {"text": 0.25, "vision": 0.25}},
            ConfigError,
            "leaves out 'vision'",
        ),
        ({}, ConfigError, "Give either drop_fraction"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(
    arguments: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_plan(scores(), **arguments)


def test_scores_without_importance_or_sizes_are_refused() -> None:
    given = scores()
    bare = dataclasses.replace(given["text"], importance={})
    with pytest.raises(PlanError, match="was not scored"):
        make_plan(dataclasses.replace(given, towers={"text": bare}), heads=0.5)
    with pytest.raises(PlanError, match="do not know the sizes"):
        make_plan(dataclasses.replace(given, shape=None), heads=0.5)


@pytest.mark.parametrize("spread", ["uniform", "global"])
def test_neurons_beyond_whole_bundles_are_the_most_important_ones_and_stay(spread: str) -> None:
    given = scores()
    odd = tuple(tuple(float(unit) for unit in range(20)) for _ in range(LAYERS))
    shape = given.shape
    assert shape is not None
    sites = {"mlp": SiteShape("ffn", ((20,),) * LAYERS, 48)}
    tower = dataclasses.replace(shape.towers["text"], sites=sites)
    measured = dataclasses.replace(given["text"], importance={"ffn_norm": {"mlp": odd}})
    given = dataclasses.replace(
        given,
        towers={"text": measured},
        shape=dataclasses.replace(shape, towers={"text": tower}),
    )
    cut = make_plan(given, ffn=0.5, spread=spread)["text"].cut["mlp"]
    assert cut == dict.fromkeys(range(LAYERS), tuple(range(8)))


def test_grafting_needs_a_tuned_neighbour() -> None:
    plans = {"text": TowerPlan(LAYERS, drop=(2,), tune=(5,))}
    with pytest.raises(PlanError, match="has a tuned neighbour"):
        add_grafts(plans, scores(), 0.5, None, 0)


def test_merging_averages_importance() -> None:
    one, other = scores(1), scores(3)
    merged = Scores.merge(one, other)["text"].importance["head_norm"]["attn"]
    for layer in range(LAYERS):
        pairs = zip(
            one["text"].importance["head_norm"]["attn"][layer],
            other["text"].importance["head_norm"]["attn"][layer],
            strict=True,
        )
        assert merged[layer] == tuple((a + b) / 2 for a, b in pairs)


def test_a_recipe_must_score_what_it_cuts() -> None:
    cut = PlanSettings(heads=0.25)
    with pytest.raises(ConfigError, match="Add 'head_norm' to metrics"):
        check_width_settings(cut, ("similarity", "ffn_norm"))
    check_width_settings(cut, ("head_taylor",))
    check_width_settings(PlanSettings(ffn=0.25, width_metrics={"ffn": "random"}), ("similarity",))


def test_a_share_of_all_parameters_is_scored_by_what_pays_where_it_is_repaired() -> None:
    assert needed_metrics(PlanSettings(parameters=0.4)) == ("head_obs", "ffn_obs")
    assert needed_metrics(PlanSettings(heads=0.25, ffn=0.25)) == ("head_norm", "ffn_norm")
    assert needed_metrics(PlanSettings(drop_fraction=0.25, graft=0.5)) == ("head_norm",)
    assert needed_metrics(PlanSettings(drop_fraction=0.25)) == ()
    mixed = PlanSettings(parameters=0.4, width_metrics={"heads": "head_taylor", "ffn": "random"})
    assert needed_metrics(mixed) == ("head_taylor",)
    with pytest.raises(ConfigError, match="Add 'ffn_obs' to metrics"):
        check_width_settings(PlanSettings(parameters=0.4), ("similarity", "head_norm"))


@pytest.mark.parametrize("better", ["head_obs", "head_gate"])
def test_of_what_is_there_the_metric_that_took_most_is_taken(better: str) -> None:
    given = scores()
    reverse = tuple(tuple(float(8 - unit) for unit in range(8)) for _ in range(LAYERS))
    importance = {**given["text"].importance, better: {"attn": reverse}}
    both = dataclasses.replace(
        given, towers={"text": dataclasses.replace(given["text"], importance=importance)}
    )
    assert make_plan(both, heads=0.25)["text"].cut["attn"][0] == (6, 7)
    by_norm = make_plan(both, heads=0.25, width_metrics={"heads": "head_norm"})
    assert by_norm["text"].cut == make_plan(given, heads=0.25)["text"].cut


def test_a_recipe_has_no_gates_yet() -> None:
    learned = PlanSettings(heads=0.25, width_metrics={"heads": "head_gate"})
    with pytest.raises(ConfigError, match="'head_gate' is learned while healing"):
        check_width_settings(learned, ("head_norm",))


def test_a_recipe_that_narrows_drops_no_layers_by_default() -> None:
    assert PlanSettings(heads=0.25).drop_fraction is None
    assert PlanSettings().drop_fraction == 0.25
    plan = plan_by(PlanSettings(heads=0.25), scores(), None)
    assert plan["text"].drop == ()
