"""Which heads and neurons go: a budget spent on the least important bundles of the kept layers.

A bundle is what is cut as a whole: a KV head with its query heads, a single query head, or
`FFN_MULTIPLE` neurons of a layer.

    uniform   every layer loses the same number of bundles, whole KV groups: a standard checkpoint
    global    the least important bundles of all layers go, whole KV groups
    ragged    the same with single query heads; a KV head goes with its last query head

At least one bundle of every place stays.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from interlace._records.gates import GATE_METRICS
from interlace._records.shape import FFN_MULTIPLE
from interlace.errors import ConfigError, PlanError, unknown_name
from interlace.plan.parts import PARTS
from interlace.plan.shares import ceil_share, check_share, count_of, floor_share, shape_of
from interlace.records import TowerPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.config import PlanSettings
    from interlace.records import Scores, SiteShape, TowerScores

Spread = Literal["uniform", "global", "ragged"]
Fraction = float | Mapping[str, float] | None

SPREADS = ("uniform", "global", "ragged")
# The metrics of each kind that are scored; the first one takes most and pays where bridges repair.
_SCORED = {
    "heads": ("head_obs", "head_norm", "head_taylor"),
    "ffn": ("ffn_obs", "ffn_norm"),
}
# The first one that is there is taken; gates are there only where the caller has put them.
_METRICS = {kind: (GATE_METRICS[kind], *scored) for kind, scored in _SCORED.items()}
_RANDOM = "random"


def check_widths(
    *,
    heads: Fraction,
    ffn: Fraction,
    spread: str,
    metrics: Mapping[str, str],
    graft: float | None,
    drops: bool,
) -> None:
    """Refuse options of widths that are unknown or would have no effect.

    Args:
        heads: as of `make_plan`, like those that follow.
        ffn: likewise.
        spread: likewise.
        metrics: its `width_metrics`.
        graft: likewise.
        drops: whether layers are dropped.

    Raises:
        ConfigError: says which, and what to do.
    """
    if spread not in SPREADS:
        raise ConfigError(unknown_name("spread", spread, SPREADS))
    if spread != SPREADS[0] and heads is None and ffn is None:
        raise ConfigError(
            f"spread={spread!r} says how shares of heads and neurons are cut, but none are. Give "
            "heads or ffn, or leave spread out."
        )
    if graft is not None and not drops:
        raise ConfigError(
            f"graft={graft!r} moves heads of dropped layers, but no layer is dropped. Give "
            "drop_fraction or num_drop too, or leave graft out."
        )
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"width_metrics is {metrics!r}; give what judges heads and neurons, such as "
            "{'heads': 'head_norm', 'ffn': 'ffn_norm'}."
        )
    used = {"heads": heads is not None or graft is not None, "ffn": ffn is not None}
    for kind, metric in metrics.items():
        if kind not in _METRICS:
            raise ConfigError(unknown_name("kind of width", kind, _METRICS))
        if not used[kind]:
            raise ConfigError(
                f"width_metrics names what judges {kind}, but none are cut or moved. Give {kind}, "
                "or leave it out."
            )
        if metric not in (*_METRICS[kind], _RANDOM):
            raise ConfigError(unknown_name(f"metric of {kind}", metric, (*_METRICS[kind], _RANDOM)))


def check_width_settings(settings: PlanSettings, scored: Sequence[str]) -> None:
    """Refuse a recipe's plan of widths or parts that `make_plan` would refuse.

    Args:
        settings: of the plan.
        scored: metrics that the recipe scores.

    Raises:
        ConfigError: says what to score, or as `check_widths`.
    """
    # a share of the parameters may go as either
    heads = settings.parameters if settings.heads is None else settings.heads
    ffn = settings.parameters if settings.ffn is None else settings.ffn
    check_widths(
        heads=heads,
        ffn=ffn,
        spread=settings.spread,
        metrics=settings.width_metrics or {},
        graft=settings.graft,
        drops=settings.drops,
    )
    wanted = {"heads": heads is not None or settings.graft is not None, "ffn": ffn is not None}
    for kind, metrics in _SCORED.items():
        named = (settings.width_metrics or {}).get(kind)
        if wanted[kind] and named == GATE_METRICS[kind]:
            raise ConfigError(
                f"'{named}' is learned while healing, which comes after the plan of a recipe. Name "
                f"another metric of {kind}, or plan by Scores.with_gates in Python."
            )
        enough = (named,) if named else metrics
        if wanted[kind] and named != _RANDOM and not set(enough) & set(scored):
            raise ConfigError(
                f"The recipe cuts or moves {kind}, but does not score their importance. Add "
                f"'{named or _to_score(kind, settings)}' to metrics under [score]."
            )
    for argument, (_, metric) in PARTS.items():
        if getattr(settings, argument) is not None and metric not in scored:
            raise ConfigError(
                f"The recipe sets {argument}, but does not score the parts. Add '{metric}' to "
                "metrics under [score]."
            )


def _to_score(kind: str, settings: PlanSettings) -> str:
    """Return what judges heads or neurons where the settings name nothing.

    A share of all parameters is chosen repaired, so that the better metric is worth its passes.
    """
    return _SCORED[kind][0 if settings.parameters else 1]


def needed_metrics(settings: PlanSettings) -> tuple[str, ...]:
    """Return the metrics beside the similarity that a plan judges by.

    Args:
        settings: of the plan; gates and draws, which it may name as well, are not scored.
    """
    named = settings.width_metrics or {}
    shares = {"heads": settings.heads or settings.graft, "ffn": settings.ffn}
    cut = [kind for kind, share in shares.items() if share or settings.parameters]
    widths = [named.get(kind, _to_score(kind, settings)) for kind in cut]
    parts = [metric for name, (_, metric) in PARTS.items() if getattr(settings, name)]
    unscored = {"similarity", *GATE_METRICS.values(), _RANDOM}
    wanted = dict.fromkeys([*(settings.weights or {}), *widths, *parts])
    return tuple(metric for metric in wanted if metric not in unscored)


@dataclass(frozen=True)
class _Bundle:
    importance: float
    layer: int
    units: tuple[int, ...]


def check_scored(scores: Scores, tower: str, metrics: Mapping[str, str]) -> None:
    """Refuse scores that do not say how important the heads and neurons of a tower are.

    Args:
        scores: what was measured.
        tower: its name.
        metrics: as of `add_cuts`.

    Raises:
        PlanError: names what is missing.
    """
    for kind in _METRICS:
        _Chooser(scores, tower, kind, "uniform", metrics.get(kind), seed=0)


def add_cuts(
    plans: Mapping[str, TowerPlan],
    scores: Scores,
    *,
    heads: Fraction,
    ffn: Fraction,
    spread: str,
    metrics: Mapping[str, str],
    seed: int,
) -> dict[str, TowerPlan]:
    """Add to the plans of towers which heads and neurons their kept layers lose.

    Args:
        plans: tower -> plan of its layers.
        scores: with the sizes of the model and the importance of its units.
        heads: share of the query heads of the kept layers, or one per tower; None for none.
        ffn: share of the neurons, likewise.
        spread: one of `SPREADS`.
        metrics: "heads" or "ffn" -> metric, "random" for a draw; default: what was scored. Both
            checked by `check_widths`.
        seed: seed of the draw.

    Returns:
        Tower -> plan. A tower that drops no layers tunes all those that lose units.

    Raises:
        ConfigError: a fraction that cannot be used.
        PlanError: nothing was scored, or the fraction is less than one bundle or all of them.
    """
    made = dict(plans)
    for kind, given in (("heads", heads), ("ffn", ffn)):
        wanted = given if isinstance(given, Mapping) else dict.fromkeys(plans, given)
        for tower, fraction in wanted.items():
            if fraction is None:
                continue
            number = check_share(kind, fraction, "0.25 cuts a quarter of them.")
            plan = made.get(tower) or TowerPlan(scores[tower].num_layers)
            chooser = _Chooser(scores, tower, kind, spread, metrics.get(kind), seed)
            cut = {**plan.cut, **chooser.choose(plan, number)}
            smaller = replace(plan, cut=cut)
            tune = plan.tune if plan.drop else tuple(sorted(smaller.losing()))
            made[tower] = replace(smaller, tune=tune)
    return made


def add_grafts(
    plans: Mapping[str, TowerPlan], scores: Scores, share: Any, metric: str | None, seed: int
) -> dict[str, TowerPlan]:
    """Add to plans which KV groups of dropped layers move into a tuned neighbour.

    Args:
        plans: tower -> plan.
        scores: with the sizes of the model and the importance of its heads.
        share: of the KV groups of every dropped layer, above 0 and at most 1; rounded down.
        metric: of heads, "random" for a draw; default: what was scored.
        seed: seed of the draw.

    Raises:
        ConfigError: the share cannot be used.
        PlanError: no heads are known or scored, the share is less than a group, or no dropped
            layer has a tuned neighbour.
    """
    real = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not (real and 0.0 < share <= 1.0):
        raise ConfigError(f"graft must be a share above 0 and at most 1, got {share!r}.")
    made = dict(plans)
    for tower, plan in plans.items():
        if not plan.drop:
            continue
        chooser = _Chooser(scores, tower, "heads", "global", metric, seed)
        taken: dict[int, dict[int, tuple[int, ...]]] = {}
        for layer in sorted(plan.drop):
            beside = (i for i in (layer + 1, layer - 1) if i in plan.tune)
            target = next((i for i in beside if not chooser.lacks(plan, i)), None)
            if target is not None:
                taken.setdefault(target, {})[layer] = chooser.best_groups(layer, share)
        if not taken:
            raise PlanError(
                f"No dropped layer of the tower '{tower}' has a tuned neighbour to take its heads. "
                "Choose a rule that tunes neighbours, such as 'interlace', or leave graft out."
            )
        made[tower] = replace(plan, graft=taken)
    return made


class _Chooser:
    """Chooses units of one kind in one tower."""

    def __init__(
        self, scores: Scores, tower: str, kind: str, spread: str, metric: str | None, seed: int
    ) -> None:
        shapes = shape_of(scores, tower).sites
        self.sites = {name: site for name, site in shapes.items() if site.kind == kind}
        if not self.sites:
            raise PlanError(
                f"No {kind} are known in the layers of the tower '{tower}': their projections are "
                "of another make than those that can be cut."
            )
        self.tower, self.kind, self.spread, self.seed = tower, kind, spread, seed
        self.metric = metric or self._scored(scores[tower])
        self.importance = scores[tower].importance.get(self.metric, {})
        if self.metric != _RANDOM and not self.importance:
            raise PlanError(
                unknown_name(
                    f"metric of {kind} scored in the tower '{tower}'",
                    self.metric,
                    [*scores[tower].importance, _RANDOM],
                )
            )

    def _scored(self, scores: TowerScores) -> str:
        for metric in _METRICS[self.kind]:
            if metric in scores.importance:
                return metric
        best, cheap = _SCORED[self.kind][:2]
        raise PlanError(
            f"The importance of {self.kind} of the tower '{self.tower}' was not scored. Score "
            f"with metrics=(..., '{cheap}'), or --metrics similarity,{cheap} (where bridges repair "
            f"the cut, '{best}' keeps more for more passes); or choose 'random'."
        )

    def choose(self, plan: TowerPlan, fraction: float) -> dict[str, dict[int, tuple[int, ...]]]:
        """Return site -> layer -> units that go, ascending; of the layers that keep the place."""
        cut = {}
        for name, site in self.sites.items():
            gone = plan.parts.get(name, ())
            layers = [i for i in plan.kept if site.groups[i] and i not in gone]
            bundles = {layer: self._bundles(name, site, layer) for layer in layers}
            chosen: list[_Bundle] = []
            if self.spread == "uniform":
                for layer, own in bundles.items():
                    chosen += own[: self._count(len(own), fraction, f"each layer ({layer})")]
            else:
                total = sum(len(own) for own in bundles.values())
                free = sorted(
                    (each for own in bundles.values() for each in own[:-1]),
                    key=lambda each: (each.importance, each.layer),
                )
                count = self._count(total, fraction, "all layers")
                if count > len(free):
                    raise PlanError(
                        f"{self.kind}={fraction:g} of '{name}' in the tower '{self.tower}' is "
                        f"{count} of {total}, but every layer keeps one, so at most {len(free)} "
                        f"can go. The largest share is {floor_share(len(free) / total)}."
                    )
                chosen = free[:count]
            by_layer: dict[int, list[int]] = {}
            for each in chosen:
                by_layer.setdefault(each.layer, []).extend(each.units)
            cut[name] = {layer: tuple(sorted(by_layer[layer])) for layer in sorted(by_layer)}
        return cut

    def lacks(self, plan: TowerPlan, layer: int) -> bool:
        """Tell whether a plan takes a place of this kind out of a layer."""
        return any(layer in plan.parts.get(name, ()) for name in self.sites)

    def best_groups(self, layer: int, share: float) -> tuple[int, ...]:
        """Return the KV groups of a layer that matter most, ascending."""
        name, site = next(iter(self.sites.items()))
        bundles = self._bundles(name, site, layer)
        chosen = bundles[-self._count(len(bundles), share, f"layer {layer}", graft=True) :]
        return tuple(sorted({site.kv_of(layer)[each.units[0]] for each in chosen}))

    def _count(self, num_bundles: int, fraction: float, where: str, graft: bool = False) -> int:
        count = count_of(num_bundles, fraction)
        what = f"bundles of {FFN_MULTIPLE} neurons" if self.kind == "ffn" else "KV groups"
        what = "query heads" if self.kind == "heads" and self.spread == "ragged" else what
        if not num_bundles:
            raise PlanError(
                f"The layers of the tower '{self.tower}' have fewer than {FFN_MULTIPLE} neurons, "
                "so none can be cut."
            )
        if count == 0:
            asked = "graft" if graft else self.kind
            more = "" if graft else "; a global spread has more to choose from"
            raise PlanError(
                f"{asked}={fraction:g} of the {num_bundles} {what} in {where} of the tower '"
                f"{self.tower}' is less than one. The smallest share is "
                f"{ceil_share(1 / num_bundles)}{more}."
            )
        return count

    def _bundles(self, name: str, site: SiteShape, layer: int) -> list[_Bundle]:
        """Return the bundles of a layer, the least important first."""
        values = self._values(name, site, layer)
        if self.kind == "ffn":
            order = sorted(range(len(values)), key=lambda unit: (values[unit], unit))
            # what is left over are the most important ones, which stay
            ends = range(FFN_MULTIPLE, len(order) + 1, FFN_MULTIPLE)
            whole = [tuple(order[end - FFN_MULTIPLE : end]) for end in ends]
        elif self.spread == "ragged":
            whole = [(unit,) for unit in range(len(values))]
        else:
            kv_of = site.kv_of(layer)
            whole = [
                tuple(unit for unit, kv in enumerate(kv_of) if kv == group)
                for group in range(len(site.groups[layer]))
            ]
        bundles = [_Bundle(sum(values[unit] for unit in units), layer, units) for units in whole]
        return sorted(bundles, key=lambda each: (each.importance, each.units))

    def _values(self, name: str, site: SiteShape, layer: int) -> Sequence[float]:
        count = site.num_units(layer)
        if self.metric == _RANDOM:
            draw = random.Random(f"{self.seed} {self.tower} {name} {layer}")
            return [draw.random() for _ in range(count)]
        values = self.importance.get(name, ())
        if len(values) <= layer or len(values[layer]) != count:
            raise PlanError(
                f"The metric '{self.metric}' has no value for each of the {count} units of "
                f"'{name}' in layer {layer} of the tower '{self.tower}'. Score again."
            )
        return values[layer]
