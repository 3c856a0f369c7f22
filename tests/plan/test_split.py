"""Shares of all parameters: which splits are tried, and which is taken."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from interlace.config import PlanSettings
from interlace.errors import ConfigError, PlanError
from interlace.plan import split_plan
from interlace.plan.cost import plan_cost
from interlace.plan.split import check_settings, plan_by
from interlace.plan.split_ways import splits
from interlace.records import ModelShape, Plan, Scores, SiteShape, TowerScores, TowerShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LAYERS, NEURONS, GROUPS = 10, 64, 4
# of one layer: norms and so on, heads, neurons
PER_GROUP, PER_NEURON, REST = 160, 48, 88
LAYER = REST + GROUPS * PER_GROUP + NEURONS * PER_NEURON


def scores() -> Scores:
    """Importance grows with layer and unit."""
    sites = {
        "attn": SiteShape("heads", ((2,) * GROUPS,) * LAYERS, 64, 32),
        "mlp": SiteShape("ffn", ((NEURONS,),) * LAYERS, PER_NEURON),
    }
    shape = TowerShape(16, 8, 4, 4, (LAYER,) * LAYERS, causal=True, sites=sites)
    layers = range(LAYERS)
    heads = tuple(tuple(float(i + unit) for unit in range(2 * GROUPS)) for i in layers)
    neurons = tuple(tuple(float(i * unit) for unit in range(NEURONS)) for i in layers)
    tower = TowerScores(
        LAYERS,
        similarity={"all": {1: tuple(0.9 - 0.01 * i for i in range(LAYERS - 1))}},
        importance={"head_norm": {"attn": heads}, "ffn_norm": {"mlp": neurons}},
        pinned={LAYERS - 1: "last"},
    )
    return Scores({"text": tower}, shape=ModelShape({"text": shape}, 100_000, 4))


class Loss:
    """A loss of whole plans that is made up, and notes what it was asked."""

    def __init__(self, of: Callable[[Plan], float]) -> None:
        self._of = of
        self.asked: list[Plan] = []

    def __call__(self, tower: str, dropped: Iterable[int]) -> float:
        """Return the sum of the layers that are gone."""
        return float(sum(dropped))

    def of_plan(self, plan: Plan) -> float:
        """Return the made-up loss."""
        self.asked.append(plan)
        return self._of(plan)


def near(plan: Plan, drop: int) -> float:
    """Be lowest where so many layers go and neurons only."""
    own = plan["text"]
    return abs(len(own.drop) - drop) + len(own.cut.get("attn", {}))


def gone(plan: Plan) -> float:
    change = plan_cost(plan, {"text": 10})
    return (change.before.parameters - change.after.parameters) / (LAYERS * LAYER)


def test_layers_without_heads_or_neurons_lose_none() -> None:
    heads = tuple((2,) * GROUPS if layer % 2 else () for layer in range(LAYERS))
    neurons = tuple((NEURONS,) if layer % 3 else () for layer in range(LAYERS))
    sites = {
        "attn": SiteShape("heads", heads, 64, 32),
        "mlp": SiteShape("ffn", neurons, PER_NEURON),
    }
    shape = TowerShape(16, 8, 4, 4, (LAYER,) * LAYERS, causal=True, sites=sites)
    per_group = sum(map(bool, heads)) * PER_GROUP
    assert {each.widths.gone for each in splits(shape, per_group, 0)} >= {per_group}


def test_every_split_comes_to_the_share() -> None:
    shape = scores().shape
    assert shape is not None
    wanted = int(0.4 * LAYERS * LAYER)
    found = splits(shape.towers["text"], wanted, 8)
    assert {split.drop for split in found} == {0, 1, 2, 3, 4}
    assert len({split.widths.heads for split in found}) > 1
    bundle = 8 * PER_NEURON * LAYERS
    for split in found:
        assert split.drop * LAYER + split.widths.gone == pytest.approx(wanted, abs=bundle)
    # what a layer counts for beside its parameters goes with whole layers alone
    for split in splits(shape.towers["text"], int(1.5 * wanted), 8, LAYER // 2):
        counted = 1.5 * split.drop * LAYER + split.widths.gone
        assert counted == pytest.approx(1.5 * wanted, abs=bundle)
    # no more layers than may go
    assert max(split.drop for split in splits(shape.towers["text"], wanted, 2)) == 2


@pytest.mark.parametrize("drop", [0, 2, 4])
def test_the_split_with_the_lowest_loss_is_taken(drop: int) -> None:
    loss = Loss(lambda plan: near(plan, drop))
    plan = split_plan(scores(), parameters=0.4, loss=loss)
    own = plan["text"]
    # the rule tries the four layers most alike; the loss is lowest without the first of them
    assert own.drop == tuple(range(1, drop + 1))
    assert gone(plan) == pytest.approx(0.4, abs=0.05)
    # where layers alone make up the share, their neighbours train
    assert set(own.tune) == set(own.kept if own.cut else (0, 5, 6, 7))
    assert plan.rule == "compensated"
    assert not plan.standard
    assert plan.settings["parameters"] == {"text": 0.4}
    noted = plan.settings["split"]["text"]
    assert noted["chosen"].startswith(f"{drop} layers")
    assert noted["loss"] == 0
    assert len(noted["tried"]) == len(loss.asked)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("fixed", [0.3, {"text": 0.3, "vision": 0.9}])
def test_as_much_time_goes_as_whole_layers_take(fixed: Any) -> None:
    def time(plan: Plan) -> float:
        own = plan["text"]
        left = (1 - gone(plan)) * LAYERS
        return 1 - (0.3 * len(own.kept) + 0.7 * left) / LAYERS

    loss = Loss(lambda plan: near(plan, 2))
    plan = split_plan(scores(), parameters=0.4, fixed_time=fixed, loss=loss)
    assert len(plan["text"].drop) == 2
    # more of the parameters, since narrower layers save less
    assert gone(plan) > 0.45
    assert {round(time(each), 1) for each in loss.asked} == {0.4}
    assert plan.settings["fixed_time"] == {"text": 0.3}
    # four layers may go, and of the others seven tenths of five sixths
    with pytest.raises(PlanError, match=r"90 % of the time of the layers .*: at most 75 %"):
        split_plan(scores(), parameters=0.9, fixed_time=fixed, loss=loss, protect=tuple(range(5)))


def test_more_heads_go_as_long_as_that_is_better() -> None:
    def heads(plan: Plan) -> int:
        return len(plan["text"].cut.get("attn", {0: ()})[0]) // 2

    loss = Loss(lambda plan: abs(heads(plan) - 1) + 0.1 * len(plan["text"].drop))
    plan = split_plan(scores(), parameters=0.4, loss=loss)
    assert heads(plan) == 1
    by_depth: dict[int, list[int]] = {}
    for asked in loss.asked[:-1]:
        by_depth.setdefault(len(asked["text"].drop), []).append(heads(asked))
    # the third is worse than the second, so the fourth is not asked for
    assert by_depth[0] == [0, 1, 2]
    assert len(by_depth) == 5


def test_towers_of_many_heads_are_not_asked_head_by_head() -> None:
    sites = {
        "attn": SiteShape("heads", ((1,) * 32,) * LAYERS, 20, 0),
        "mlp": SiteShape("ffn", ((NEURONS,),) * LAYERS, PER_NEURON),
    }
    shape = TowerShape(32, 32, 4, 4, (LAYER,) * LAYERS, causal=True, sites=sites)
    tried = [split.widths.heads for split in splits(shape, int(0.2 * LAYERS * LAYER), 0)]
    assert tried == [each / 8 for each in range(len(tried))]
    assert len(tried) > 4


def test_of_the_best_split_widths_are_also_spread_over_all_layers() -> None:
    def even(plan: Plan) -> bool:
        return len({len(units) for units in plan["text"].cut.get("mlp", {}).values()}) < 2

    loss = Loss(lambda plan: near(plan, 2) + 0.5 * even(plan))
    plan = split_plan(scores(), parameters=0.4, loss=loss)
    assert not even(plan)
    assert "global" in plan.settings["split"]["text"]["chosen"]
    # what plain transformers are to load is spread evenly
    plan = split_plan(scores(), parameters=0.4, loss=loss, standard=True)
    assert even(plan)
    assert plan.standard


def test_what_a_config_cannot_state_is_no_candidate_for_a_standard_checkpoint() -> None:
    def of(plan: Plan) -> float:
        if "attn" in plan["text"].cut or not plan["text"].drop:
            raise PlanError("cannot state it")
        return 1.0

    plan = split_plan(scores(), parameters=0.4, loss=Loss(of), standard=True)
    assert plan["text"].drop
    # nor where it need not be one: what cannot be made is passed over
    assert split_plan(scores(), parameters=0.4, loss=Loss(of))["text"].drop

    def none(plan: Plan) -> float:
        raise PlanError("cannot state it")

    with pytest.raises(PlanError, match=r"leaves a standard checkpoint.*cannot state it"):
        split_plan(scores(), parameters=0.4, loss=Loss(none), standard=True)
    with pytest.raises(PlanError, match=r"leaves a model that can be built. Cut another share"):
        split_plan(scores(), parameters=0.4, loss=Loss(none))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"parameters": 1.0}, ConfigError, "above 0 and below 1, got 1.0"),
        ({"parameters": True}, ConfigError, "got True"),
        ({"fixed_time": 1.0}, ConfigError, "fixed_time must be .* got 1.0. interlace.fixed_time"),
        ({"fixed_time": {"vision": 0.1}}, ConfigError, "for vision, but not for the tower 'text'"),
        (
            {"parameters": 0.95, "protect": tuple(range(LAYERS))},
            PlanError,
            "95 % of the parameters of the layers is out of reach: at most 83.4 % can go",
        ),
        ({"parameters": {"txt": 0.4}}, PlanError, "Did you mean 'text'"),
        ({"loss": lambda *_: 0.0}, ConfigError, "Give interlace.layer_loss"),
        ({"loss": Loss(lambda _: math.nan)}, PlanError, "no split leaves a finite loss"),
        ({"group": "txt"}, ConfigError, "Did you mean 'text'"),
        ({"width_metrics": {"ffn": "head_norm"}}, ConfigError, "metric of ffn"),
        ({"width_metrics": {"heads": "ffn_norm"}}, ConfigError, "metric of heads"),
        ({"width_metrics": {"head": "head_norm"}}, ConfigError, "Did you mean 'heads'"),
        ({"weights": {"similarty": 1.0}}, PlanError, "Unknown metric 'similarty'"),
        ({"group": "vision"}, PlanError, "Unknown token group 'vision'"),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(
    arguments: Any, error: type[Exception], words: str
) -> None:
    loss = Loss(lambda plan: near(plan, 2))
    with pytest.raises(error, match=words):
        split_plan(scores(), **{"parameters": 0.4, "loss": loss, **arguments})
    # nothing is judged before it is refused
    assert not loss.asked


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("importance", "The importance of heads of the tower 'text' was"),
        # without it no layer could go, and splits without layers would be all that is tried
        ("similarity", "similarity"),
    ],
)
def test_heads_neurons_and_layers_must_be_scored(lacking: str, words: str) -> None:
    text: Any = replace(scores()["text"], **{lacking: {}})
    loss = Loss(lambda _: 0.0)
    with pytest.raises(PlanError, match=words):
        split_plan(replace(scores(), towers={"text": text}), parameters=0.4, loss=loss)
    assert not loss.asked


def test_a_share_smaller_than_any_cut_is_refused_by_the_smallest() -> None:
    shape = scores().shape
    assert shape is not None
    tower = shape.towers["text"]
    # of both kinds the least that goes from all layers is a tenth
    tower = replace(
        tower, sites=tower.sites | {"attn": replace(tower.sites["attn"], unit_parameters=192)}
    )
    with pytest.raises(PlanError, match=r"0\.0263 % .* out of reach: at least about .* can go"):
        splits(tower, 10, LAYERS - 2)


def test_sizes_must_be_known() -> None:
    bare = Scores({"text": scores()["text"]})
    with pytest.raises(PlanError, match="do not know the sizes"):
        split_plan(bare, parameters=0.4, loss=Loss(lambda _: 0.0))


def test_settings_say_which_of_the_two_plans() -> None:
    loss = Loss(lambda plan: near(plan, 2))
    settings = PlanSettings(parameters=0.4, rule="compensated")
    assert settings.drop_fraction is None
    check_settings(settings)
    assert plan_by(settings, scores(), loss) == split_plan(scores(), parameters=0.4, loss=loss)
    layers = plan_by(PlanSettings(num_drop=2, rule="compensated"), scores(), loss)
    assert layers["text"].cut == {}
    slow = {"fixed_time": 0.3}
    assert plan_by(settings.replace(**slow), scores(), loss) == split_plan(
        scores(), parameters=0.4, loss=loss, **slow
    )
    with pytest.raises(ConfigError, match=r"fixed_time must be .* got -0.1"):
        check_settings(settings.replace(fixed_time={"text": -0.1}))
    with pytest.raises(ConfigError, match="Give parameters, or leave fixed_time out"):
        PlanSettings(num_drop=2, **slow)
    with pytest.raises(ConfigError, match="ffn, spread how much of something"):
        check_settings(settings.replace(ffn=0.2, spread="global"))
    with pytest.raises(ConfigError, match="Take rule='compensated', not 'interlace'"):
        check_settings(PlanSettings(parameters=0.4))
