"""Gates of heads and neurons, as healing learned them, as importance of units.

Healing counts layers in the first model, scores count them as they stand in the model scored. Every
layer of a gated tower has gates, so the n-th of the report is the n-th of the scores.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from interlace._records.healing import HealReport
from interlace._records.shape import FFN_MULTIPLE
from interlace.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interlace._records.scores import Scores
    from interlace._records.shape import TowerShape

# Kind of site -> the metric that its gates become.
GATE_METRICS = {"heads": "head_gate", "ffn": "ffn_gate"}


def add_gates(scores: Scores, report: HealReport) -> Scores:
    """Do what `Scores.with_gates` says."""
    if not isinstance(report, HealReport):
        raise ConfigError(
            f"with_gates was given a {type(report).__name__}; give the HealReport of healing with "
            "gate_units."
        )
    shapes = scores.shape.towers if scores.shape is not None else {}
    common = [name for name in report.unit_gates if name in scores.towers and name in shapes]
    if not common:
        raise ConfigError(
            f"There are no gates to add: the report has gates of heads or neurons in the towers "
            f"{sorted(report.unit_gates)}, the scores are of {sorted(scores.towers)}. Heal with "
            "gates='l1' and gate_units=('heads', 'neurons'), and score the healed student."
        )
    towers = dict(scores.towers)
    for name in common:
        found = _importance(report.unit_gates[name], shapes[name], name)
        own = {**towers[name].importance, **found}
        towers[name] = dataclasses.replace(towers[name], importance=own)
    inputs = {**scores.inputs, "gates": report.fingerprint}
    return dataclasses.replace(scores, towers=towers, inputs=inputs)


def _importance(
    gates: Mapping[int, Mapping[str, tuple[float, ...]]], shape: TowerShape, tower: str
) -> dict[str, dict[str, tuple[tuple[float, ...], ...]]]:
    """Return the sizes of gates as `TowerScores.importance` holds values of units.

    Args:
        gates: layer of the first model -> site -> gates: one per query head, or per `FFN_MULTIPLE`
            neurons, each of which gets their value.
        shape: of the tower that was scored.
        tower: its name, for the message.

    Raises:
        ShapeError: the gates are of another model.
    """
    made: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {}
    rows = [gates[layer] for layer in sorted(gates)]
    for name in dict.fromkeys(name for row in rows for name in row):
        site = shape.sites.get(name)
        each = FFN_MULTIPLE if site is not None and site.kind == "ffn" else 1
        have = [len(row.get(name, ())) for row in rows]
        # layers that lack the site have no gates there
        wanted = [-(-sum(groups) // each) for groups in site.groups] if site is not None else []
        if site is None or have != wanted:
            raise ShapeError(
                f"The gates of '{name}' in the tower '{tower}' are {have} per layer, its layers "
                f"take {wanted}. Score the student that was healed with these gates."
            )
        made.setdefault(GATE_METRICS[site.kind], {})[name] = tuple(
            tuple(abs(row[name][unit // each]) for unit in range(sum(groups)))
            for row, groups in zip(rows, site.groups, strict=True)
        )
    return made
