"""Scores as text: a table of layers per tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._records.tables import plain_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace._records.scores import Scores, TowerScores

# Rules look at packs 1, 2 and 3; "all" of them would be as many columns as layers.
_MOST_PACKS = 3


def _columns(tower: TowerScores) -> dict[str, Sequence[object]]:
    """Title -> one cell per layer."""
    columns: dict[str, Sequence[object]] = {"layer": range(tower.num_layers)}
    group = "all" if "all" in tower.similarity else next(iter(tower.similarity), "")
    of_group = "" if group == "all" else f" ({group})"
    for pack in sorted(tower.similarity.get(group, {}))[:_MOST_PACKS]:
        end = tower.end(pack, group)
        values = (*tower.packs(pack, group), *(() if end is None else (end,)))
        cells = [f"{value:.4f}" for value in values]
        columns[f"similarity {pack}{of_group}"] = cells + [""] * (tower.num_layers - len(cells))
    for name, values in tower.metrics.items():
        columns[name] = [f"{value:.4g}" for value in values]
    for name, sites in tower.importance.items():
        layers = zip(*sites.values(), strict=True)
        units = [[value for place in layer for value in place] for layer in layers]
        columns[f"mean {name}"] = [f"{sum(own) / len(own):.4g}" if own else "" for own in units]
    if tower.pinned:
        columns["pinned"] = [tower.pinned.get(layer, "") for layer in range(tower.num_layers)]
    return columns


def scores_text(scores: Scores) -> str:
    """Return the text of `print(scores)`.

    Similarities of pack p stand beside the layer that the p compared layers begin with, those of
    heads and neurons as the mean over a layer.
    """
    lines = [f"Scores of {scores.model_name}" if scores.model_name else "Scores"]
    for name, tower in scores.towers.items():
        columns = _columns(tower)
        lines += [
            "",
            f"{name}: {tower.num_layers} layers, {tower.num_samples} samples",
            plain_table(tuple(columns), list(zip(*columns.values(), strict=True))),
            *tower.notes,
        ]
    return "\n".join(lines)
