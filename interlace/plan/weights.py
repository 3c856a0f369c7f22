"""One score per layer out of several metrics."""

from __future__ import annotations

import math
import numbers
import statistics
from typing import TYPE_CHECKING, Any

from interlace.errors import ConfigError, DataError, PlanError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interlace.records import TowerScores


def _metric(scores: TowerScores, name: str, group: str, tower: str) -> dict[int, float]:
    if name == "similarity":
        return dict(enumerate(scores.packs(1, group)))
    if name not in scores.metrics:
        raise PlanError(
            f"Tower '{tower}': {unknown_name('metric', name, ['similarity', *scores.metrics])} "
            "Score again with this metric, or leave it out of weights."
        )
    values = dict(enumerate(scores.metrics[name]))
    broken = [layer for layer, value in values.items() if not math.isfinite(value)]
    if broken:
        raise DataError(f"Tower '{tower}': the metric '{name}' is not finite at layers {broken}.")
    return values


def combined_scores(
    scores: TowerScores, weights: Mapping[str, float], group: str, tower: str
) -> tuple[float | None, ...]:
    """Combine metrics into one score per layer: the weighted sum of their z-scores.

    Each metric is brought to mean 0 and standard deviation 1 over the layers that have a value in
    all of the metrics named (the last layer has no similarity). A metric that is equal everywhere
    adds nothing. A positive weight means that a high value speaks for dropping the layer, as it
    does for "similarity"; give metrics of importance a negative one.

    Args:
        scores: what was measured.
        weights: metric name -> weight; "similarity" is s_1 of the group.
        group: token group of the similarity.
        tower: name of the tower, for messages.

    Returns:
        L scores, higher = more redundant; None for layers that lack one of the metrics.

    Raises:
        ConfigError: no weights, or one that is no finite number.
        PlanError: a metric was not scored.
        DataError: a metric is not finite somewhere.
    """
    if not weights or not any(weights.values()):
        raise ConfigError(f"weights must give a metric a weight other than 0, got {dict(weights)}.")
    given: Mapping[str, Any] = weights
    for name, weight in given.items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise ConfigError(f"The weight of '{name}' must be a finite number, got {weight!r}.")
    tables = {name: _metric(scores, name, group, tower) for name in weights}
    layers = [
        layer for layer in range(scores.num_layers) if all(layer in t for t in tables.values())
    ]
    combined = dict.fromkeys(layers, 0.0)
    for name, table in tables.items():
        values = [table[layer] for layer in layers]
        mean, spread = statistics.fmean(values), statistics.pstdev(values)
        if spread == 0:
            continue
        for layer in layers:
            combined[layer] += weights[name] * (table[layer] - mean) / spread
    return tuple(combined.get(layer) for layer in range(scores.num_layers))
