from __future__ import annotations

import itertools

import pytest

from interlace.errors import ConfigError, DataError, PlanError
from interlace.plan import make_plan, rule_names
from interlace.plan.protection import expressible
from interlace.plan.rules import USE_GROUP, USE_LOSS, USE_WEIGHTS
from interlace.records import ModelShape, Plan, Scores, TowerScores, TowerShape


@pytest.fixture
def scores(random_scores):
    return random_scores(12, 3, pinned={0: "injected", 11: "last layer"})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"drop_fraction": 1.2}, ConfigError, "0..1"),
        ({"drop_fraction": -0.1}, ConfigError, "0..1"),
        ({"drop_fraction": float("nan")}, ConfigError, "0..1"),
        ({"drop_fraction": "half"}, ConfigError, "a number"),
        ({"drop_fraction": 0.05}, PlanError, "rounds down to none.*0.0834"),
        ({"drop_fraction": 0.95}, PlanError, "leaves 1 of the 12.*at most 10"),
        ({"drop_fraction": 1.0}, PlanError, "leaves 0 of the 12"),
        ({"num_drop": 0}, ConfigError, "at least 1"),
        ({"num_drop": 2.0}, ConfigError, "whole number"),
        ({"num_drop": True}, ConfigError, "whole number"),
        ({"num_drop": 40}, PlanError, "leaves 0"),
        ({}, ConfigError, "either drop_fraction"),
        ({"num_drop": 2, "rule": ["interlace"]}, ConfigError, "Unknown rule"),
        ({"num_drop": 2, "towers": 3}, ConfigError, "a tower's name"),
        ({"num_drop": 2, "weights": {"similarity": "1"}}, ConfigError, "finite number"),
        ({"num_drop": 2, "weights": ["similarity"]}, ConfigError, "metric -> weight"),
        ({"num_drop": 2, "rule": "random", "seed": None}, ConfigError, "seed is None"),
        ({"num_drop": 2, "drop_fraction": 0.2}, ConfigError, "not both"),
        ({"num_drop": 2, "rule": "interlase"}, ConfigError, "Did you mean 'interlace'"),
        ({"num_drop": 2, "towers": ["vision"]}, PlanError, "Unknown tower 'vision'"),
        ({"num_drop": {"txt": 2}}, PlanError, "Did you mean 'text'"),
        ({"num_drop": {"text": 2}, "towers": ["vision"]}, ConfigError, "differ"),
        ({"num_drop": 2, "protect": "all"}, ConfigError, "protect='all'"),
        ({"num_drop": 2, "protect": 3}, ConfigError, "protect=3"),
        ({"num_drop": 2, "protect": [1.5]}, ConfigError, "layer numbers"),
        ({"num_drop": 2, "protect": [12]}, PlanError, "layers 0..11"),
        ({"num_drop": 2, "protect": {"vision": [1]}}, PlanError, "tower in protect"),
        ({"num_drop": 3, "protect": range(10)}, PlanError, "10 are protected.*only 2 may go"),
        ({"num_drop": 2, "group": "vision"}, PlanError, "token group 'vision'"),
        ({"num_drop": 2, "group": "vison", "rule": "last"}, ConfigError, "Did you mean 'vision'"),
        ({"num_drop": 2, "loss": max, "rule": "last"}, ConfigError, "'last' asks for no loss"),
        ({"num_drop": 2, "weights": {"relevance": 1}}, PlanError, "metric 'relevance'"),
        ({"num_drop": 2, "weights": {"similarity": 0}}, ConfigError, "above 0"),
        ({"num_drop": 2, "weights": {}}, ConfigError, "above 0"),
        ({"num_drop": 2, "weights": {"similarity": -1}}, ConfigError, "sign of the similarity"),
        ({"num_drop": 2, "weights": {"similarty": 1}}, PlanError, "Did you mean 'similarity'"),
        *(
            ({"num_drop": 2, "weights": {"similarity": 1}, "rule": rule}, PlanError, "weights mean")
            for rule in rule_names()
            if rule not in USE_WEIGHTS
        ),
        ({"num_drop": 2, "protect": "alignment"}, PlanError, "metrics=.*'alignment'"),
        *(
            ({"heads": 0.5} | more, ConfigError, "but none are dropped")
            for more in ({"weights": {"similarity": 1}}, {"rule": "last"}, {"group": "text"})
        ),
    ],
)
def test_bad_arguments_are_refused_in_words(scores, arguments, error, words):
    with pytest.raises(error, match=words):
        make_plan(scores, **arguments)


def test_scores_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match="needs Scores, got dict"):
        make_plan({"text": 1}, num_drop=2)


def test_the_plan_knows_what_it_was_made_from(scores):
    plan = make_plan(scores, drop_fraction=0.25, protect="auto")
    assert plan.inputs["scores"] == scores.fingerprint
    assert plan.rule == "interlace"
    assert plan.settings["protect"] == "auto"
    assert Plan.from_json(plan.to_json()) == plan
    assert plan["text"].reasons[11] == "protected: last layer"
    assert make_plan(scores, drop_fraction=0.25).fingerprint != plan.fingerprint


def test_which_towers_are_planned(random_scores):
    text = random_scores(12, 0)["text"]
    vision = random_scores(8, 1)["text"]
    both = Scores(towers={"vision": vision, "text": text})
    assert list(make_plan(both, num_drop=2).towers) == ["text"]
    for towers in (["vision", "text"], iter(("vision", "text"))):
        assert list(make_plan(both, num_drop=2, towers=towers).towers) == ["vision", "text"]
    plan = make_plan(both, drop_fraction={"text": 0.25, "vision": 0.3})
    assert {name: len(t.drop) for name, t in plan.towers.items()} == {"text": 3, "vision": 2}
    blind = Scores(towers={"vision": vision, "text_encoder": text})
    assert list(make_plan(blind, num_drop=2).towers) == ["vision", "text_encoder"]
    plan = make_plan(blind, num_drop=2, protect={"vision": range(5)}, rule="shortgpt")
    assert min(plan["vision"].drop) >= 5


def test_groups_choose_the_table():
    tower = TowerScores(
        num_layers=6,
        similarity={
            "all": {1: (0.9, 0.1, 0.1, 0.1, 0.1)},
            "vision": {1: (0.1, 0.1, 0.9, 0.1, 0.1)},
        },
    )
    scores = Scores(towers={"text": tower})
    assert make_plan(scores, num_drop=1, rule="shortgpt")["text"].drop == (0,)
    assert make_plan(scores, num_drop=1, rule="shortgpt", group="vision")["text"].drop == (2,)


def _loss(tower, dropped, parts=()):
    return float(sum(dropped))


@pytest.mark.parametrize("rule", [each for each in rule_names() if each != "compensated_parts"])
def test_a_group_is_refused_where_it_would_change_nothing(rule, random_scores):
    ours, theirs = (random_scores(12, seed)["text"].similarity["all"] for seed in (1, 2))
    wanted = {"num_drop": 2, "rule": rule} | ({"loss": _loss} if rule in USE_LOSS else {})

    def plan(tables, **more):
        scores = Scores(towers={"text": TowerScores(num_layers=12, similarity=tables)})
        return make_plan(scores, **wanted, **more)["text"].drop

    first, second = plan({"all": ours}), plan({"all": theirs})
    if rule in USE_GROUP:
        assert first != second
        assert plan({"all": ours, "vision": theirs}, group="vision") == second
    else:
        assert first == second
        with pytest.raises(ConfigError, match=f"'{rule}' looks at none"):
            plan({"all": ours, "vision": theirs}, group="vision")


def test_weights_combine_z_scores():
    similarity = (0.1, 0.2, 0.3, 0.4, 0.5)
    # similarity alone rises; importance speaks against the layers 3 and 4, twice as strongly
    tower = TowerScores(
        num_layers=6,
        similarity={"all": {1: similarity}},
        metrics={"importance": (1.0, 1.0, 1.0, 9.0, 9.0, 0.0), "flat": (2.0,) * 6},
    )
    scores = Scores(towers={"text": tower})
    assert make_plan(scores, num_drop=1, rule="shortgpt")["text"].drop == (4,)
    plan = make_plan(
        scores,
        num_drop=1,
        rule="shortgpt",
        weights={"similarity": 1.0, "importance": 2.0, "flat": 5.0},
    )["text"]
    assert plan.drop == (2,)
    # by hand: mean 0.3 and deviation sqrt(0.02); mean 4.2 and deviation sqrt(15.36)
    assert plan.layer_scores[0] == pytest.approx(-0.2 / 0.02**0.5 + 2 * 3.2 / 15.36**0.5)
    assert plan.layer_scores[5] is None


def test_weights_on_a_metric_that_is_not_finite():
    tower = TowerScores(num_layers=3, metrics={"importance": (float("nan"), 1.0, 2.0)})
    with pytest.raises(DataError, match=r"not finite at layers \[0\]"):
        make_plan(
            Scores(towers={"text": tower}),
            num_drop=1,
            rule="shortgpt",
            weights={"importance": 1.0},
        )


def test_expressible_patterns():
    every_second = range(0, 12, 2)
    assert expressible(range(12), every_second) == 2
    assert expressible([0, 1, 4, 5, 8, 9], every_second) == 2
    assert expressible([0, 2, 4], every_second) == 1
    assert expressible([0, 1, 3, 4, 5, 7], every_second) == 3
    # the first position always has cross-attention
    assert expressible([1, 2, 3, 4], every_second) is None
    assert expressible([0, 1, 2, 4], every_second) is None
    assert expressible([0, 1, 3, 5], every_second) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_choice_that_cannot_be_expressed_is_replaced_by_the_best_that_can(count, random_scores):
    crossing = tuple(range(0, 8, 2))
    replaced = 0
    for seed in range(12):
        scores = random_scores(8, seed, cross_attention_layers=crossing, pinned={0: "first"})
        s1 = [*scores["text"].packs(1), min(scores["text"].packs(1))]
        exact = make_plan(scores, num_drop=count, rule="shortgpt", protect=(0,))
        plain = Scores(
            towers={"text": TowerScores(**{**vars(scores["text"]), "cross_attention_layers": None})}
        )
        free = make_plan(plain, num_drop=count, rule="shortgpt", protect=(0,))["text"]
        plan = make_plan(scores, num_drop=count, rule="shortgpt", protect="auto")["text"]
        assert expressible(plan.kept, crossing) is not None
        assert 0 in plan.kept
        assert len(plan.tune) == min(count, len(plan.kept))
        if plan.drop != free.drop:
            replaced += 1
            options = [
                drop
                for drop in itertools.combinations(range(1, 8), count)
                if expressible([i for i in range(8) if i not in drop], crossing)
            ]
            best = max(sum(s1[i] for i in drop) for drop in options)
            assert sum(s1[i] for i in plan.drop) == pytest.approx(best)
            assert "cannot be expressed" in plan.reasons[plan.drop[0]]
        assert exact["text"].num_layers == 8
        # without protection the rule stays as it is
        bare = make_plan(scores, num_drop=count, rule="shortgpt")["text"]
        assert bare.drop == make_plan(plain, num_drop=count, rule="shortgpt")["text"].drop
    assert replaced > 0


def test_nothing_expressible_is_an_error(random_scores):
    scores = random_scores(4, 0, cross_attention_layers=(0, 2), pinned={0: "a", 1: "b", 3: "c"})
    plan = make_plan(scores, num_drop=1, rule="shortgpt", protect="auto")["text"]
    assert plan.kept == (0, 1, 3)
    scores = random_scores(4, 0, cross_attention_layers=(0, 2), pinned={1: "b", 2: "c"})
    with pytest.raises(PlanError, match="in every f-th layer"):
        make_plan(scores, num_drop=2, rule="uniform", protect={"text": (1, 2)})


def test_print(scores):
    shape = TowerShape(64, 4, 2, 16, (1000,) * 12, causal=True)
    scores = Scores(
        towers=scores.towers,
        shape=ModelShape({"text": shape}, total_parameters=20_000, bytes_per_parameter=2),
        model_name="a model",
    )
    plan = make_plan(scores, num_drop=3, protect="auto")
    lines = str(plan).splitlines()
    assert lines[0] == "Plan by rule 'interlace' for a model"
    assert "text: 12 layers, drop 3, tune 3, freeze 3, 9 left" in lines
    assert sum(line.split()[:1] == [str(i)] for i in range(12) for line in lines) == 12
    (strip,) = [line for line in lines if line.startswith("text  |")]
    assert strip.count("x") - 1 == 3 == strip.count("T") == strip.count("F")
    assert lines[-1] == (
        "parameters 20.00 k -> 17.00 k (85.0%), weights 39.06 KiB -> 33.20 KiB, "
        "KV cache 1.50 KiB -> 1.12 KiB per token"
    )
