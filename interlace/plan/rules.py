"""What a rule is, and the list of them.

L = number of layers; h_i = input of layer i, h_L = output of the last layer;
s_p(i) = mean cosine of h_i and h_{i+p}, i = 0..L-p-1.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from interlace.errors import ConfigError, PlanError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from interlace.plan.weights import Weighted
    from interlace.records import TowerScores, TowerShape

    # of the tower, the dropped layers and, by `compensated_parts`, the parts that others lose
    Loss = Callable[..., float]
    Rule = Callable[["Problem"], "Choice"]

# Rule name -> "module:function". Adding a rule is adding a function and its line here.
RULES: dict[str, str] = {
    "interlace": "interlace.plan.published:interlace",
    "interlace_oa": "interlace.plan.published:interlace_oa",
    "interlace_tn": "interlace.plan.published:interlace_tn",
    "random": "interlace.plan.published:random",
    "consecutive": "interlace.plan.published:consecutive",
    "triplet_optimal": "interlace.plan.optimal:triplet_optimal",
    "shortgpt": "interlace.plan.baselines:shortgpt",
    "uidl": "interlace.plan.baselines:uidl",
    "last": "interlace.plan.baselines:last",
    "uniform": "interlace.plan.baselines:uniform",
    "sleb": "interlace.plan.greedy:sleb",
    "compensated": "interlace.plan.greedy:compensated",
    "compensated_parts": "interlace.plan.greedy_parts:compensated_parts",
}

# The rules that judge layers, triplets or pairs by a score, so that another can take its place. The
# others draw (random), count (last, uniform), measure a whole block of n layers by its own angle
# (uidl) or ask for the loss alone (sleb).
USE_WEIGHTS = frozenset(
    {
        "interlace",
        "interlace_oa",
        "interlace_tn",
        "consecutive",
        "triplet_optimal",
        "shortgpt",
        "compensated",
    }
)

# The rules that look at the similarity, which is of all tokens or of a group of them.
USE_GROUP = USE_WEIGHTS | {"uidl"}

# The rules that call back for the loss of a model without some layers.
USE_LOSS = frozenset({"sleb", "compensated", "compensated_parts"})

# The rules that choose by scores alone.
WITHOUT_MODEL = tuple(name for name in RULES if name not in USE_LOSS)

DEFAULT_RULE = "interlace"

FEWER = "Drop fewer layers, protect fewer, or use another rule (such as 'shortgpt')."


@dataclass(frozen=True)
class Problem:
    """What a rule is given: one tower, and how many layers to drop.

    Attributes:
        tower: name of the tower.
        scores: what was measured.
        num_drop: n, the number of layers to drop, at least 1.
        protected: layers never to drop, with the reason. They may be tuned or be anchors.
        guarded: the caller asked for a plan that can be carried out; off for the exact
            published behaviour, which may fail.
        group: token group of the similarity.
        seed: seed of rules that draw.
        weighted: what the layers are worth by several metrics, where weights were given.
        loss: callback (tower, dropped layers) -> loss of the model without them.
        shape: sizes of the tower, where known.
    """

    tower: str
    scores: TowerScores
    num_drop: int
    protected: Mapping[int, str] = field(default_factory=dict)
    guarded: bool = False
    group: str = "all"
    seed: int = 42
    weighted: Weighted | None = None
    loss: Loss | None = None
    shape: TowerShape | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return self.scores.num_layers

    @property
    def candidates(self) -> list[int]:
        """Layers that may be dropped, ascending."""
        return [layer for layer in range(self.num_layers) if layer not in self.protected]

    def packs(self, pack: int) -> tuple[float, ...]:
        """Return s_pack; see `TowerScores.packs`."""
        return self.scores.packs(pack, self.group)

    def score_table(self) -> tuple[float | None, ...]:
        """Return the score by which single layers are judged, higher = more redundant, L of them.

        It is s_1 unless weights were given; None where a layer has none (h_L is not scored).

        Raises:
            PlanError: pack 1 was not scored.
        """
        if self.weighted is not None:
            return self.weighted.layer_scores
        return (*self.packs(1), None)

    def scored(self, *, with_tail: bool = False) -> dict[int, float]:
        """Return the layer scores of the layers that have one.

        Args:
            with_tail: also that of the last layer, where it was recorded apart. The published
                rules leave it out.
        """
        scores = {i: value for i, value in enumerate(self.score_table()) if value is not None}
        tail = self.scores.end(1, self.group)
        if with_tail and tail is not None and self.weighted is None:
            scores[self.num_layers - 1] = tail
        return scores

    def group_scores(self, length: int, dropped: Callable[[int], int]) -> dict[int, float]:
        """Return what every triplet (length 3) or pair (2) is worth: start -> score.

        It is s_length unless weights were given; then see `Weighted`. As published, no group takes
        in the pair of states that ends in h_L.

        Args:
            length: layers of a group.
            dropped: start -> the layer that would be dropped from the group.

        Raises:
            PlanError: the similarity takes part, and this pack was not scored.
        """
        if self.weighted is None:
            return dict(enumerate(self.packs(length)))
        takes_part = self.weighted.similarity_weight > 0
        similarity = self.packs(length) if takes_part else ()
        starts = range(self.num_layers - length)
        scores = self.scored()
        usable = [i for i in starts if i in scores and i + 1 in scores]
        return self.weighted.group_values(similarity, {i: dropped(i) for i in usable})

    def shortage(self, found: int, of_what: str, advice: str = FEWER) -> PlanError:
        """Word the error of a rule that cannot find enough layers to drop."""
        guard = ""
        if self.protected:
            guard = f" with {len(self.protected)} layers protected {sorted(self.protected)}"
        return PlanError(
            f"Tower '{self.tower}': {self.num_drop} of {self.num_layers} layers are to be "
            f"dropped, but only {found} {of_what} can be found{guard}. {advice}"
        )


@dataclass(frozen=True)
class Choice:
    """What a rule answers.

    Attributes:
        drop: layers to remove, in selection order.
        tune: layers to train, in selection order.
        freeze: anchors, in selection order.
        reasons: layer -> why, in words.
        layer_scores: what the rule judged the layers by, where that is not the layer scores.
        parts: place in a layer -> kept layers, ascending, that lose it whole.
    """

    drop: tuple[int, ...]
    tune: tuple[int, ...]
    freeze: tuple[int, ...] = ()
    reasons: dict[int, str] = field(default_factory=dict)
    layer_scores: tuple[float | None, ...] | None = None
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules, the published ones first."""
    return tuple(RULES)


def check_rule_without_model(name: str) -> None:
    """Refuse a rule that cannot choose by scores alone.

    Raises:
        ConfigError: there is no such rule, or it needs a model to ask.
    """
    if name not in RULES:
        raise ConfigError(unknown_name("rule", name, WITHOUT_MODEL))
    if name in USE_LOSS:
        raise ConfigError(
            f"The rule '{name}' asks the model for its loss without some layers, which scores "
            "alone cannot answer. Use it in `interlace run` or `interlace progressive`, which have "
            f"the model at hand, or from Python: make_plan(..., rule='{name}', "
            f"loss=interlace.layer_loss(vlm, calibration, '{name}')). Here choose from "
            f"{', '.join(WITHOUT_MODEL)}."
        )


def check_use(
    rule: str,
    weights: Mapping[str, float] | None,
    group: str,
    *,
    drops: bool,
    named: bool | None = None,
) -> None:
    """Refuse a rule, weights or a token group that would have no effect.

    Args:
        rule: name of the rule.
        weights: as of `make_plan`.
        group: likewise.
        drops: layers are dropped, or may be.
        named: the rule was asked for by name; default: where it is not the default one.

    Raises:
        ConfigError: no layers are dropped, or the rule looks at no similarity.
        PlanError: weights for a rule that has no use for them.
    """
    given = {
        f"rule={rule!r}": rule != DEFAULT_RULE if named is None else named,
        "weights": weights is not None,
        f"group={group!r}": group != "all",
    }
    words = ", ".join(name for name, is_given in given.items() if is_given)
    if words and not drops:
        raise ConfigError(
            f"Layers are to be chosen by {words}, but none are dropped: heads, neurons and parts "
            "of layers are judged by metrics of their own. Say how many layers to drop as well "
            "(drop_fraction or num_drop, --drop-fraction or --num-drop), or leave this out."
        )
    if weights is not None and rule not in USE_WEIGHTS:
        raise PlanError(
            f"The rule '{rule}' does not choose by scores of layers, so weights mean nothing to "
            f"it. Leave weights out, or use one of {', '.join(sorted(USE_WEIGHTS))}."
        )
    if group != "all" and rule not in USE_GROUP:
        raise ConfigError(
            f"group={group!r} says whose similarity counts, and the rule '{rule}' looks at none. "
            f"Leave group out, or use one of {', '.join(sorted(USE_GROUP))}."
        )


def find_rule(name: str) -> Rule:
    """Return a rule by its name.

    Raises:
        ConfigError: there is no such rule; the message has the nearest name.
    """
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(unknown_name("rule", name, RULES))
    module, function = RULES[name].split(":")
    rule: Rule = getattr(importlib.import_module(module), function)
    return rule


def by_score(scores: Iterable[tuple[int, float]]) -> list[int]:
    """Return indices by falling score, ties to the lower index."""
    return [index for index, _ in sorted(scores, key=lambda pair: (-pair[1], pair[0]))]


def nearest_kept(problem: Problem, drop: Iterable[int]) -> tuple[int, ...]:
    """Choose as many layers to tune as are dropped: the neighbours of the gaps.

    Every dropped layer, in selection order, claims the nearest layer that is kept and not claimed
    yet; of two equally near the later one, as the published rules train the next layer. Where
    fewer layers are kept than dropped, all kept ones are tuned.
    """
    gone = tuple(drop)
    free = [layer for layer in range(problem.num_layers) if layer not in gone]
    tune: list[int] = []
    for layer in gone:
        if not free:
            break
        near = min(free, key=lambda other, layer=layer: (abs(other - layer), -other))  # type: ignore[misc]
        tune.append(near)
        free.remove(near)
    return tuple(tune)


def finish(
    problem: Problem,
    drop: list[int],
    reasons: dict[int, str],
    layer_scores: tuple[float | None, ...] | None = None,
) -> Choice:
    """Make the choice of a rule that does not say which layers to tune: the nearest kept ones."""
    tune = nearest_kept(problem, drop)
    reasons = reasons | {
        layer: f"nearest kept neighbour of layer {gone}"
        for gone, layer in zip(drop, tune, strict=False)
    }
    return Choice(tuple(drop), tune, reasons=reasons, layer_scores=layer_scores)
