"""`compensated_parts` on made-up losses: what it asks, when it ends, what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from plan.test_parts import ATTENTION, FFN, LAYERS, scores

from interlace.errors import ConfigError, PlanError
from interlace.plan import make_plan
from interlace.plan.greedy_parts import CANDIDATES
from interlace.records import SiteShape

Parts = dict[str, tuple[int, ...]]


class Asked:
    """A loss that adds up what the parts cost."""

    def __init__(
        self, costs: dict[tuple[str, int], float], sites: tuple[str, ...] = ("attn", "mlp")
    ) -> None:
        """Every other part costs 9."""
        self.costs, self.sites, self.calls = costs, sites, []

    def __call__(self, tower: str, dropped: tuple[int, ...], parts: Parts) -> float:
        """Return the loss; a layer costs what its parts do."""
        lost = [(site, i) for site, layers in parts.items() for i in layers]
        lost += [(site, i) for site in self.sites for i in dropped]
        self.calls.append((tower, sorted(lost)))
        return sum(self.costs.get(part, 9.0) for part in lost)


def test_the_cheapest_part_by_parameter_goes_until_the_layers_are_made_up() -> None:
    # layer 1: the feed-forward part costs twice the attention, for 2.4 times the parameters
    loss = Asked({("attn", 1): 1.0, ("mlp", 1): 2.0, ("attn", 2): 1.5, ("mlp", 4): 5.0})
    plan = make_plan(scores(), num_drop=1, rule="compensated_parts", loss=loss)
    own = plan["text"]
    first, second = 2 * (LAYERS - 2), 2 * (LAYERS - 2) - 1
    assert [len(lost) for _, lost in loss.calls[:first]] == [1] * first
    assert all(0 < layer < LAYERS - 1 for _, lost in loss.calls for _, layer in lost)
    assert [len(lost) for _, lost in loss.calls[first : first + second]] == [2] * second
    # 1552 + 656 of 3000 parameters, and 656 more are nearer than none
    assert own.drop == (1,)
    assert own.parts == {"attn": (2,)}
    assert pytest.approx(3000, abs=ATTENTION / 2) == FFN + 2 * ATTENTION
    assert own.reasons[1] == "round 1: without mlp, loss 2; round 2: without attn, loss 3"
    assert set(own.tune) == {2}
    assert not plan.standard


def test_later_rounds_try_the_likely_ones_of_every_kind() -> None:
    wide = scores()
    loss = Asked({("mlp", layer): float(layer) for layer in range(LAYERS)})
    make_plan(wide, num_drop=2, rule="compensated_parts", loss=loss)
    sizes = [len(lost) for _, lost in loss.calls]
    assert max(sizes.count(size) for size in set(sizes) - {1}) <= 2 * CANDIDATES


def test_protected_layers_stay_whole_and_parts_that_would_be_too_much_are_not_asked() -> None:
    loss = Asked({("mlp", 3): 0.0, ("attn", 4): 0.5})
    own = make_plan(scores(), num_drop=1, rule="compensated_parts", protect=(2, 3), loss=loss)[
        "text"
    ]
    assert not {2, 3} & (own.losing() | set(own.drop))
    gone = [
        sum({"attn": ATTENTION, "mlp": FFN}[site] for site, _ in lost) for _, lost in loss.calls
    ]
    assert max(gone) <= 3000 + ATTENTION / 2


def _three(*_: Any) -> float:
    return math.nan


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ConfigError, "layer_loss"),
        ({"loss": lambda tower, dropped: 0.0}, ConfigError, "cannot be called so"),
        ({"loss": _three}, PlanError, "not a number"),
        ({"loss": Asked({}), "protect": (1, 2, 3)}, PlanError, "only 1 layers between"),
        ({"loss": Asked({}), "ffn_parts": 0.3}, ConfigError, "Leave attention_parts and ffn_parts"),
    ],
)
def test_what_cannot_be_chosen_is_refused(given: Any, error: Any, words: str) -> None:
    num_drop = 2 if "protect" in given else 1
    with pytest.raises(error, match=words):
        make_plan(scores(), num_drop=num_drop, rule="compensated_parts", **given)


def test_towers_whose_parts_are_unknown_or_in_a_pattern_are_refused() -> None:
    loss = Asked({})
    with pytest.raises(PlanError, match="are not known"):
        make_plan(
            dataclasses.replace(scores(), shape=None),
            num_drop=1,
            rule="compensated_parts",
            loss=loss,
        )
    crossing = dataclasses.replace(scores()["text"], cross_attention_layers=(0, 2, 4))
    with pytest.raises(PlanError, match="only some layers have cross-attention"):
        make_plan(
            dataclasses.replace(scores(), towers={"text": crossing}),
            num_drop=1,
            rule="compensated_parts",
            protect="auto",
            loss=loss,
        )


def test_cross_attention_goes_with_its_layer() -> None:
    cross = SiteShape("heads", ((2, 2, 2, 2),) * LAYERS, 64, 32, cross=True, shared_parameters=16)
    costs = {(site, 2): 0.1 for site in ("attn", "mlp", "cross")}
    loss = Asked(costs, ("attn", "mlp", "cross"))
    own = make_plan(scores(cross=cross), num_drop=1, rule="compensated_parts", loss=loss)["text"]
    assert own.drop == (2,)
    assert own.parts == {}
    asked = [part for _, lost in loss.calls for part in lost if part[0] == "cross"]
    assert set(asked) == {("cross", 2)}
