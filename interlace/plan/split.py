"""A share of a tower's parameters, taken out as layers, heads and neurons together.

How much goes by what is decided by a loss: for some numbers of dropped layers, beside none, and
growing numbers of KV groups, as many neurons go as make up the rest, and the student that comes
nearest to the whole model wins.

Source: Minitron (arXiv 2407.14679) compares candidates of depth and width by their loss; here they
are compared repaired, as the rule `compensated` compares layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from interlace._progress import track
from interlace.errors import ConfigError, PlanError
from interlace.plan.parts import PARTS
from interlace.plan.planner import arguments_of, make_plan, tower_names
from interlace.plan.protection import protected_layers, resolve
from interlace.plan.shares import check_share, shape_of
from interlace.plan.split_ways import Split, splits
from interlace.plan.widths import check_scored, check_widths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from interlace.config import PlanSettings
    from interlace.plan.protection import Protect
    from interlace.plan.rules import Loss
    from interlace.records import Plan, Scores

# What chooses the layers.
RULE = "compensated"
_SHARE_HINT = "0.4 takes out two fifths of what the layers hold."


def split_plan(
    scores: Scores,
    *,
    parameters: float | Mapping[str, float],
    loss: Loss,
    fixed_time: float | Mapping[str, float] = 0.0,
    towers: Sequence[str] | str | None = None,
    protect: Protect = "auto",
    seed: int = 42,
    weights: Mapping[str, float] | None = None,
    group: str = "all",
    width_metrics: Mapping[str, str] | None = None,
    standard: bool = False,
) -> Plan:
    """Plan to take out a share of the parameters, as layers, heads and neurons together.

    Layers are chosen by the rule `compensated`, heads and neurons by their importance, in every
    layer alike. Beside each number of dropped layers more heads go as long as that is better. Of
    the best split they are then also chosen over all layers, which end in different widths if that
    is better and need not be standard. All layers that stay are tuned where widths are cut.

    Args:
        scores: with the similarity, and the importance of heads and neurons ("head_obs" and
            "ffn_obs"; "head_norm" and "ffn_norm" take fewer passes and keep less).
        parameters: share of what the layers of a tower hold, above 0 and below 1, or one per tower.
            Embeddings are not counted.
        loss: of `interlace.layer_loss(vlm, calibration)`, which judges whole plans. Beside what
            `compensated` asks, it is asked about twice for each of at most five numbers of dropped
            layers, more often where heads are better cut than neurons, and once more.
        fixed_time: share of a layer's time that passes whatever its width, 0 to below 1, or one per
            tower, as `interlace.fixed_time` measures it. Above 0, as much of the time of the layers
            goes as whole layers of that share of the parameters take: with many heads and neurons
            more of the parameters, with few of them more layers.
        towers: as of `make_plan`, like those that follow.
        protect: likewise.
        seed: likewise.
        weights: likewise.
        group: likewise.
        width_metrics: likewise.
        standard: only what plain transformers can load.

    Returns:
        The plan; its settings say under "split" what was chosen, and what else was tried.

    Raises:
        ConfigError: a share, a fixed time or a loss that cannot be used, or as `make_plan` raises
            it.
        PlanError: sizes, heads or neurons are not known, or no split has a plan.
    """
    judge: Callable[[Plan], float] | None = getattr(loss, "of_plan", None)
    if judge is None:
        raise ConfigError(
            f"split_plan compares repaired students of whole plans, and loss={loss!r} cannot. Give "
            "interlace.layer_loss(vlm, calibration)."
        )
    if isinstance(parameters, Mapping):
        shares = dict(parameters)
        tower_names(scores, towers, shares)
    else:
        shares = dict.fromkeys(tower_names(scores, towers, None), parameters)
    fixed = _fixed_times(fixed_time, shares)
    judges = width_metrics or {}
    check_widths(heads=shares, ffn=shares, spread="uniform", metrics=judges, graft=None, drops=True)
    guards = resolve(protect, scores)
    order: dict[str, Any] = {"weights": weights, "group": group}
    chosen: dict[str, Plan] = {}
    notes: dict[str, Any] = {}
    for tower, share in shares.items():
        check_share("parameters", share, _SHARE_HINT)
        shape = shape_of(scores, tower)
        protected, _ = protected_layers(guards, scores, tower)
        # the rule keeps the first and the last layer
        inner = range(1, scores[tower].num_layers - 1)
        most = sum(1 for layer in inner if layer not in protected)

        def make(split: Split, tower: str = tower) -> Plan:
            amounts: dict[str, Any] = split.widths.arguments(tower)
            judged = {kind: by for kind, by in judges.items() if kind in amounts}
            if split.drop:
                amounts |= {"num_drop": {tower: split.drop}, "rule": RULE, "loss": loss, **order}
            if split.widths.gone:
                amounts |= {"spread": split.spread, "width_metrics": judged}
            plan = make_plan(
                scores,
                protect=protect,
                seed=seed,
                towers=[tower],
                standard=standard,
                **amounts,
            )
            if not split.widths.gone:
                return plan
            # all layers have lost something
            own = plan.towers[tower]
            return replace(plan, towers={tower: replace(own, tune=own.kept, freeze=())})

        # whole layers take the same share of the time and of the parameters
        whole = sum(shape.layer_parameters) / (1 - fixed[tower])
        beside = round(whole * fixed[tower] / shape.num_layers)
        ways = splits(shape, int(whole * share), most, beside)
        check_scored(scores, tower, judges)
        if any(split.drop for split in ways):
            # a split that has no plan is passed over, so what no layer can be chosen by is told
            # here, by the cheapest rule that looks at the same
            make_plan(scores, num_drop=1, rule="shortgpt", towers=[tower], **order)
        chosen[tower], notes[tower] = _best(tower, ways, make, judge, standard=standard)
    first = next(iter(chosen.values()))
    return replace(
        first,
        towers={tower: plan.towers[tower] for tower, plan in chosen.items()},
        rule=RULE,
        settings={
            "parameters": shares,
            "fixed_time": fixed,
            "protect": guards,
            "weights": weights,
            "group": group,
            "width_metrics": width_metrics,
            "split": notes,
        },
    )


def plan_by(settings: PlanSettings, scores: Scores, loss: Loss | None) -> Plan:
    """Plan as the settings say: `split_plan` for a share of the parameters, else `make_plan`.

    Args:
        settings: of the plan; checked by `check_settings`.
        scores: what was measured.
        loss: what the rule asks.

    Raises:
        InterlaceError: as the two raise it.
    """
    if settings.parameters is None:
        return make_plan(scores, loss=loss, **arguments_of(settings))
    assert loss is not None
    return split_plan(
        scores,
        parameters=settings.parameters,
        loss=loss,
        fixed_time=settings.fixed_time,
        towers=settings.towers,
        protect=settings.protect,
        seed=settings.seed,
        weights=settings.weights,
        group=settings.group,
        width_metrics=settings.width_metrics,
        standard=settings.standard is True,
    )


def check_settings(settings: PlanSettings) -> None:
    """Refuse `parameters` where it is out of range or contradicts other settings.

    Raises:
        ConfigError: it is no share, other amounts are given too, or the rule is not "compensated".
    """
    if settings.parameters is None:
        return
    shares = settings.parameters
    for share in shares.values() if isinstance(shares, dict) else [shares]:
        check_share("parameters", share, _SHARE_HINT)
    times = settings.fixed_time
    for time in times.values() if isinstance(times, dict) else [times]:
        _check_time(time)
    amounts = ("drop_fraction", "num_drop", "heads", "ffn", "graft", *PARTS)
    given = [name for name in amounts if getattr(settings, name) is not None]
    given += ["spread"] if settings.spread != "uniform" else []
    if given:
        raise ConfigError(
            f"parameters says how much goes in all, and {', '.join(given)} how much of something. "
            "Give one or the other."
        )
    if settings.rule != RULE:
        raise ConfigError(
            "A share of the parameters is split by how far repaired students are from the whole "
            f"model. Take rule={RULE!r}, not {settings.rule!r}."
        )


def _fixed_times(given: float | Mapping[str, float], towers: Iterable[str]) -> dict[str, float]:
    """Return tower -> share of a layer's time that no width changes."""
    times = {}
    for tower in towers:
        if isinstance(given, Mapping) and tower not in given:
            raise ConfigError(
                f"fixed_time is given for {', '.join(given)}, but not for the tower '{tower}'. "
                "Name it, or give one number."
            )
        times[tower] = _check_time(given[tower] if isinstance(given, Mapping) else given)
    return times


def _check_time(time: Any) -> float:
    hint = "interlace.fixed_time(vlm, data) measures it."
    return 0.0 if time == 0 else check_share("fixed_time", time, hint)


def _best(
    tower: str,
    ways: Sequence[Split],
    make: Callable[[Split], Plan],
    judge: Callable[[Plan], float],
    *,
    standard: bool,
) -> tuple[Plan, dict[str, Any]]:
    """Return the best plan, and what to note of the choice."""
    found: dict[Split, tuple[float, Plan]] = {}

    def look(split: Split) -> None:
        plan = make(split)
        value = judge(plan)
        found[split] = (math.inf if math.isnan(value) else value, plan)

    refused: PlanError | None = None
    last: dict[int, float] = {}
    enough: set[int] = set()
    for split in track(ways, description=f"splits, {tower}"):
        if split.drop in enough:
            continue
        try:
            look(split)
        except PlanError as error:
            # not every depth and width has a place in a model or its config
            refused = error
            continue
        if found[split][0] > last.get(split.drop, math.inf):
            enough.add(split.drop)
        last[split.drop] = found[split][0]
    if not found:
        wanted = "a standard checkpoint" if standard else "a model that can be built"
        looser = "Give standard=False, or cut" if standard else "Cut"
        raise PlanError(
            f"No split of the tower '{tower}' leaves {wanted}. {looser} another share. {refused}"
        ) from refused
    best = min(found, key=lambda split: found[split][0])
    if best.widths.gone and not standard:
        with contextlib.suppress(PlanError):
            look(replace(best, spread="global"))
        best = min(found, key=lambda split: found[split][0])
    loss, plan = found[best]
    if math.isinf(loss):
        raise PlanError(
            f"Tower '{tower}': no split leaves a finite loss. Check the loss and its data."
        )
    tried = {str(split): value for split, (value, _) in found.items()}
    return plan, {"chosen": str(best), "loss": loss, "tried": tried}
