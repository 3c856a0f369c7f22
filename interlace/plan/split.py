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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from interlace._progress import track
from interlace._records.shape import FFN_MULTIPLE
from interlace.errors import ConfigError, PlanError
from interlace.plan.parts import PARTS
from interlace.plan.planner import arguments_of, make_plan, tower_names
from interlace.plan.protection import protected_layers, resolve
from interlace.plan.shares import check_share, shape_of
from interlace.plan.widths import check_scored, check_widths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interlace.config import PlanSettings
    from interlace.plan.protection import Protect
    from interlace.plan.rules import Loss
    from interlace.records import Plan, Scores, TowerShape

# What chooses the layers.
RULE = "compensated"
# How many numbers of dropped layers are tried, beside none.
_DEPTHS = 4
# How many numbers of KV groups are tried at most, none among them; towers have up to 32 groups.
_HEADS = 8
# Shares are rounded down to whole groups and bundles; a hair more gives the number that was meant.
_HAIR = 1e-6
_SHARE_HINT = "0.4 takes out two fifths of what the layers hold."


@dataclass(frozen=True)
class Widths:
    """What every layer of a tower loses.

    Attributes:
        heads: share of the KV groups, 0..1.
        ffn: share of the neurons, 0..1.
        gone: parameters that go from the whole tower.
    """

    heads: float
    ffn: float
    gone: int

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.heads:.0%} of the heads, {self.ffn:.0%} of the neurons"

    def arguments(self, tower: str) -> dict[str, Any]:
        """Return what `make_plan` is to be given."""
        shares = {"heads": self.heads, "ffn": self.ffn}
        return {name: {tower: share + _HAIR} for name, share in shares.items() if share}


@dataclass(frozen=True)
class Split:
    """How a tower loses its parameters.

    Attributes:
        drop: layers that go.
        widths: what those lose that stay.
        spread: as of `make_plan`.
    """

    drop: int
    widths: Widths
    spread: str = "uniform"

    def __str__(self) -> str:
        """Say it in words."""
        spread = f", {self.spread}" if self.widths.gone else ""
        return f"{self.drop} layers, of the others {self.widths}{spread}"


def widths_for(shape: TowerShape, wanted: int, layers: Sequence[int]) -> list[Widths]:
    """List the widths at which some layers of a tower lose so many parameters.

    For growing numbers of KV groups, the bundles of neurons with which the loss comes nearest to
    it; what stays further away than one bundle is left out, unless nothing comes nearer.

    Args:
        shape: of the tower.
        wanted: parameters that are to go.
        layers: from which they go, from each as much.

    Raises:
        PlanError: no heads or neurons are known that could be cut.
    """
    heads = [site for site in shape.sites.values() if site.kind == "heads"]
    neurons = [site for site in shape.sites.values() if site.kind == "ffn"]
    if not heads or not neurons:
        raise PlanError("No heads or no neurons are known in the layers, so no width can be cut.")
    # layers of another kind, which recur or have experts, have none
    groups = max(map(len, heads[0].groups))
    bundles = max(map(sum, neurons[0].groups)) // FFN_MULTIPLE
    per_group = sum(site.parameters(layer) for site in heads for layer in layers) // groups
    per_bundle = sum(site.parameters(layer) for site in neurons for layer in layers) // bundles
    found = []
    for group in range(0, groups, math.ceil(groups / _HEADS)):
        bundle = min(max(0, round((wanted - group * per_group) / per_bundle)), bundles - 1)
        gone = group * per_group + bundle * per_bundle
        found.append(Widths(group / groups, bundle / bundles, gone))
    limit = max(per_bundle, min(abs(each.gone - wanted) for each in found))
    return [each for each in found if abs(each.gone - wanted) <= limit]


def _percent(number: int, total: int) -> str:
    return f"{100 * number / total:.3g} %"


def splits(shape: TowerShape, wanted: int, most: int) -> list[Split]:
    """List the ways for a tower to lose so many parameters.

    Args:
        shape: of the tower.
        wanted: parameters that are to go.
        most: layers that may go at most.

    Raises:
        PlanError: no split comes to so many; or as `widths_for`.
    """
    total, depth = sum(shape.layer_parameters), len(shape.layer_parameters)
    most = min(wanted * depth // total, most)
    found = []
    for number in sorted({round(step * most / _DEPTHS) for step in range(_DEPTHS + 1)}):
        # by the mean of a layer, since which go is not known yet; the layers are alike
        rest = widths_for(shape, wanted - number * total // depth, range(depth - number))
        found += [Split(number, each) for each in rest if number or each.gone]
    gone = {split: split.drop * total // depth + split.widths.gone for split in found}
    # whole bundles come within half of one, unless there are too few to go
    bundle = FFN_MULTIPLE * sum(
        site.parameters(layer) // site.num_units(layer)
        for site in shape.sites.values()
        if site.kind == "ffn"
        for layer in range(depth)
        if site.groups[layer]
    )
    near = [split for split in found if abs(gone[split] - wanted) <= bundle / 2 + depth]
    if not near:
        highest = max(gone.values(), default=wanted)
        if wanted > highest:
            limit = f"at most {_percent(highest, total)}"
            why = "every layer keeps heads and neurons, and protected ones stay"
        else:
            limit = f"at least about {_percent(bundle, total)}"
            why = f"every layer loses whole groups of heads or {FFN_MULTIPLE} neurons"
        raise PlanError(
            f"{_percent(wanted, total)} of the parameters of the layers is out of reach: {limit} "
            f"can go, since {why}."
        )
    return near


def split_plan(
    scores: Scores,
    *,
    parameters: float | Mapping[str, float],
    loss: Loss,
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
        ConfigError: a share or a loss that cannot be used, or as `make_plan` raises it.
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

        ways = splits(shape, int(sum(shape.layer_parameters) * share), most)
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
        towers=settings.towers,
        protect=settings.protect,
        seed=settings.seed,
        weights=settings.weights,
        group=settings.group,
        width_metrics=settings.width_metrics,
        standard=settings.standard is True,
    )


def check_settings(settings: PlanSettings) -> None:
    """Refuse a share of the parameters that is none, or that the other settings contradict.

    Raises:
        ConfigError: it is no share, others say how much of something goes, or the rule is another.
    """
    if settings.parameters is None:
        return
    shares = settings.parameters
    for share in shares.values() if isinstance(shares, dict) else [shares]:
        check_share("parameters", share, _SHARE_HINT)
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
