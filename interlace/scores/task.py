"""Relevance for a task: how far a measure of the caller's own falls when one layer is dropped.

    task_relevance(i) = measure(model) - measure(model without layer i)

Legend: L layers of a tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from interlace._progress import track
from interlace.errors import ConfigError, DataError
from interlace.scores.metrics import Summed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from interlace.models.handle import Tower

# (tower, dropped positions) -> a number, higher is better; ("text", ()) measures the whole model.
Measure = Callable[[str, tuple[int, ...]], float]


class TaskRelevance(Summed):
    """Calls back once per layer and once for the whole model: L + 1 calls per tower.

    The calls are shared between processes. What a skipped layer means is the callback's: it may
    prune, generate and compare answers.
    """

    def __init__(self, measure: Measure | None, towers: Mapping[str, Tower]) -> None:
        """Take the callback.

        Raises:
            ConfigError: there is none.
        """
        if measure is None:
            raise ConfigError(
                "The metric 'task_relevance' asks the caller what a model is worth. Give "
                "score(..., measure=callback), where callback(tower, dropped_layers) returns a "
                "number, higher for better."
            )
        self._measure = measure
        self._towers = towers
        self._values = {
            name: torch.zeros(1 + tower.num_layers, dtype=torch.float64)
            for name, tower in towers.items()
        }

    def run(self, rank: int, world: int) -> None:
        """Make this process's share of the calls.

        Raises:
            DataError: the callback gave something that is not finite.
        """
        calls = [
            (name, layer)
            for name, tower in self._towers.items()
            for layer in range(-1, tower.num_layers)
        ]
        for name, layer in track(calls[rank::world], description="task_relevance"):
            value = float(self._measure(name, () if layer < 0 else (layer,)))
            if not math.isfinite(value):
                what = "the whole model" if layer < 0 else f"the model without layer {layer}"
                raise DataError(
                    f"The measure of {what} of the tower '{name}' is {value}. Return a number."
                )
            self._values[name][1 + layer] = value

    def sums(self) -> Sequence[Tensor]:
        """Return the values, 0 where another process holds one; see `Summed`."""
        return list(self._values.values())

    def results(self, tower: str) -> dict[str, Any]:
        """Return fields of `TowerScores`."""
        values = self._values[tower]
        return {
            "metrics": {"task_relevance": tuple((values[0] - values[1:]).tolist())},
            "group_samples": {"task_relevance": 1},
        }
