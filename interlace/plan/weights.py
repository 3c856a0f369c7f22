"""One score per layer out of several metrics, and what a group of neighbours is worth then.

Legend: L layers; z(v) = (v - mean) / standard deviation over what has a value; s_p(i) = mean cosine
of h_i and h_{i+p}; weights a_m >= 0 of metrics m.

    redundancy of layer i           a_sim z(s_1)(i) - sum over other metrics m of a_m z(m)(i)
    value of a group of p layers    a_sim z(s_p)(i) - sum over other metrics m of a_m z(m)(j)
    that starts at i and drops j

Every metric but the similarity measures importance, so a high value speaks for keeping the layer;
the similarity measures redundancy, and its sign is turned. Dropping a layer out of a group costs
what this layer is worth by the other metrics, while s_p says how little the group as a whole does.
With the similarity alone, layers and groups stand in the order of the published rules.
"""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interlace.errors import ConfigError, DataError, PlanError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.records import TowerScores

SIMILARITY = "similarity"


@dataclass(frozen=True)
class Weighted:
    """What the layers of a tower are worth by several metrics.

    Attributes:
        layer_scores: [L] redundancy, higher = drop first; None where a metric has no value.
        similarity_weight: a_sim; 0 where the similarity takes no part.
        others: [L] minus the sum over the other metrics; None where one has no value.
    """

    layer_scores: tuple[float | None, ...]
    similarity_weight: float
    others: tuple[float | None, ...]

    def group_values(
        self, similarity: Sequence[float], dropped: Mapping[int, int]
    ) -> dict[int, float]:
        """Return what groups of neighbours are worth, higher = take first.

        Args:
            similarity: s_p of every start; empty where the similarity takes no part.
            dropped: start of a group -> the layer that would be dropped from it.
        """
        standard = dict(enumerate(z_scores(similarity)))
        values: dict[int, float] = {}
        for start, layer in dropped.items():
            other = self.others[layer]
            if other is not None:
                values[start] = self.similarity_weight * standard.get(start, 0.0) + other
        return values


def z_scores(values: Sequence[float]) -> list[float]:
    """Bring values to mean 0 and standard deviation 1; equal ones all become 0."""
    if not values:
        return []
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]


def _check(weights: Mapping[str, float]) -> None:
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"weights is {weights!r}; give metric -> weight, such as {{'similarity': 1.0}}."
        )
    given: Mapping[str, Any] = weights
    for name, weight in given.items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise ConfigError(f"The weight of '{name}' must be a finite number, got {weight!r}.")
        if weight < 0:
            raise ConfigError(
                f"The weight of '{name}' is {weight!r}, below 0. Every metric counts as importance "
                "(high values keep a layer) and the sign of the similarity is turned for you, so "
                "all weights are 0 or more."
            )
    if not weights or not any(weights.values()):
        raise ConfigError(f"weights must give a metric a weight above 0, got {dict(weights)}.")


def why_missing(scores: TowerScores, metric: str) -> str | None:
    """What the scores noted about a metric that they were asked for and could not measure."""
    return next((note for note in scores.notes if note.startswith(f"no {metric}:")), None)


def _metric(scores: TowerScores, name: str, group: str, tower: str) -> dict[int, float]:
    if name == SIMILARITY:
        return dict(enumerate(scores.packs(1, group)))
    if name not in scores.metrics:
        if reason := why_missing(scores, name):
            raise PlanError(f"Tower '{tower}': {reason}. Leave it out of weights.")
        raise PlanError(
            f"Tower '{tower}': {unknown_name('metric', name, [SIMILARITY, *scores.metrics])} "
            "Score again with this metric, or leave it out of weights."
        )
    values = dict(enumerate(scores.metrics[name]))
    broken = [layer for layer, value in values.items() if not math.isfinite(value)]
    if broken:
        raise DataError(f"Tower '{tower}': the metric '{name}' is not finite at layers {broken}.")
    return values


def weighted(scores: TowerScores, weights: Mapping[str, float], group: str, tower: str) -> Weighted:
    """Combine metrics into one score per layer: the weighted sum of their z-scores.

    Each metric is brought to mean 0 and standard deviation 1 over the layers that have a value in
    all of the metrics named (the last layer has no similarity). A metric that is equal everywhere
    adds nothing; one with the weight 0 is left out.

    Args:
        scores: what was measured.
        weights: metric name -> weight of at least 0; "similarity" is s_1 of the group.
        group: token group of the similarity.
        tower: name of the tower, for messages.

    Raises:
        ConfigError: no weights, or one that is below 0 or no finite number.
        PlanError: a metric was not scored.
        DataError: a metric is not finite somewhere.
    """
    _check(weights)
    tables = {name: _metric(scores, name, group, tower) for name in weights}
    tables = {name: table for name, table in tables.items() if weights[name]}
    layers = [
        layer for layer in range(scores.num_layers) if all(layer in t for t in tables.values())
    ]
    others, all_of_them = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for name, table in tables.items():
        sign = 1.0 if name == SIMILARITY else -1.0
        for layer, value in zip(layers, z_scores([table[each] for each in layers]), strict=True):
            all_of_them[layer] += sign * weights[name] * value
            if name != SIMILARITY:
                others[layer] -= weights[name] * value
    numbered = range(scores.num_layers)
    return Weighted(
        layer_scores=tuple(all_of_them.get(layer) for layer in numbered),
        similarity_weight=float(weights.get(SIMILARITY, 0.0)),
        others=tuple(others.get(layer) for layer in numbered),
    )
