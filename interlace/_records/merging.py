"""Scores of one tower from two: other metrics, or other samples."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from interlace.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from interlace._records.scores import TowerScores


def _tables(scores: TowerScores) -> dict[tuple[str, ...], tuple[float, ...]]:
    tables: dict[tuple[str, ...], tuple[float, ...]] = {}
    for group, packs in scores.similarity.items():
        tables |= {("similarity", group, str(pack)): v for pack, v in packs.items()}
    for group, ends in scores.tail.items():
        tables |= {("tail", group, str(pack)): (value,) for pack, value in ends.items()}
    for metric, sites in scores.importance.items():
        for site, layers in sites.items():
            tables |= {("importance", metric, site, str(i)): v for i, v in enumerate(layers)}
    return tables | {("metrics", name): values for name, values in scores.metrics.items()}


def merged_tower(name: str, one: TowerScores, other: TowerScores) -> TowerScores:
    """Combine two scores of a tower; see `Scores.merge`.

    Raises:
        ConfigError: averaging without known numbers of samples.
        ShapeError: the scores are of different models, or overlap in part.
    """
    fixed = ["num_layers", "pinned", "cross_attention_layers"]
    if one.alignment is not None and other.alignment is not None:
        fixed.append("alignment")
    for what in fixed:
        if getattr(one, what) != getattr(other, what):
            raise ShapeError(
                f"The scores of tower '{name}' differ in {what}: {getattr(one, what)} and "
                f"{getattr(other, what)}. Merge scores of one model only."
            )
    ours, theirs = _tables(one), _tables(other)
    shared = ours.keys() & theirs.keys()
    if shared and ours.keys() != theirs.keys():
        only = sorted("/".join(key) for key in ours.keys() ^ theirs.keys())
        raise ShapeError(
            f"The scores of tower '{name}' overlap in part; only one side has {', '.join(only)}. "
            "Merge scores with the same tables (other samples) or with none in common."
        )
    merged = ours | theirs
    for key in shared:
        weights = [_weight(name, key, each) for each in (one, other)]
        pairs = zip(ours[key], theirs[key], strict=True)
        total = sum(weights)
        merged[key] = tuple((a * weights[0] + b * weights[1]) / total for a, b in pairs)
    similarity: dict[str, dict[int, tuple[float, ...]]] = {}
    tail: dict[str, dict[int, float]] = {}
    metrics: dict[str, tuple[float, ...]] = {}
    importance: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {}
    for key, values in merged.items():
        if key[0] == "similarity":
            similarity.setdefault(key[1], {})[int(key[2])] = values
        elif key[0] == "tail":
            tail.setdefault(key[1], {})[int(key[2])] = values[0]
        elif key[0] == "importance":
            # layers come in order
            layers = importance.setdefault(key[1], {}).get(key[2], ())
            importance[key[1]][key[2]] = (*layers, values)
        else:
            metrics[key[1]] = values
    return dataclasses.replace(
        one,
        similarity=similarity,
        tail=tail,
        metrics=metrics,
        importance=importance,
        num_samples=_join(one.num_samples, other.num_samples, bool(shared)),
        num_tokens=_join_dicts(one.num_tokens, other.num_tokens, bool(shared)),
        group_samples=_join_dicts(one.group_samples, other.group_samples, bool(shared)),
        alignment=other.alignment if one.alignment is None else one.alignment,
        notes=tuple(dict.fromkeys((*one.notes, *other.notes))),
    )


def _weight(name: str, key: tuple[str, ...], scores: TowerScores) -> int:
    weight = scores.group_samples.get(key[1], scores.num_samples)
    if weight < 1:
        raise ConfigError(
            f"Averaging the scores of tower '{name}' needs to know how many samples stand behind "
            f"each; one says {weight}. Set num_samples."
        )
    return weight


def _join(one: int, other: int, other_samples: bool) -> int:
    return one + other if other_samples else max(one, other)


def _join_dicts(one: dict[str, int], other: dict[str, int], add: bool) -> dict[str, int]:
    return {key: _join(one.get(key, 0), other.get(key, 0), add) for key in sorted({*one, *other})}
