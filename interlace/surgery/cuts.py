"""Reading a plan against a model: which layers of every tower go, and whether they may."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interlace.errors import PlanError, unknown_name
from interlace.records import Plan, TowerPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.models.handle import VLM, Tower

_MIN_LAYERS = 2
# Where reasons of rules name layers of the tower that they are about; pins name its own layers
# and those of others, in original numbers already.
_LAYERS = re.compile(
    r"(?<=\btriplet )\d+(-\d+)*|(?<=\bpair )\d+(-\d+)*"
    r"|(?<=\blayer )(?<!vision layer )(?<!text layer )\d+"
)


@dataclass(frozen=True)
class Cut:
    """What happens to one tower.

    Attributes:
        tower: the tower before the cut.
        plan: its plan, in original layer numbers.
        kept: positions, before the cut, of the layers that stay; ascending.
    """

    tower: Tower
    plan: TowerPlan
    kept: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Original numbers of the layers that go, ascending."""
        return tuple(sorted(self.plan.drop))

    @property
    def original(self) -> tuple[int, ...]:
        """Original layer number of every position after the cut."""
        return tuple(self.tower.original[position] for position in self.kept)

    @property
    def tuned(self) -> tuple[int, ...]:
        """Positions after the cut of the layers that train."""
        return tuple(i for i, layer in enumerate(self.original) if layer in self.plan.tune)


def check_plan(vlm: VLM, plan: Plan, fingerprint: str) -> None:
    """Check that a plan was made for this model, as far as it says.

    Args:
        vlm: the model.
        plan: the plan.
        fingerprint: the model's, which takes a pass over its weights to compute.

    Raises:
        PlanError: it is no plan, names other towers, or the fingerprint of another model.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"prune takes a Plan, got {type(plan).__name__}. Make one with make_plan.")
    for name in plan.towers:
        if name not in vlm.towers:
            raise PlanError(unknown_name(f"tower of {vlm.name}", name, vlm.towers))
    expected = plan.inputs.get("model")
    if expected not in (None, fingerprint):
        raise PlanError(
            f"The plan was made for another model: it names the fingerprint {expected[:12]}..., "
            f"{vlm.name} has {fingerprint[:12]}... (weights and config count, and float16, which "
            "rounds small weights away). Open the model that was scored, in that dtype, or score "
            "this one."
        )


def original_depth(vlm: VLM, name: str) -> int:
    """Return how many layers a tower had in the first model."""
    gone = vlm.record.dropped.get(name, ()) if vlm.record is not None else ()
    return vlm.towers[name].num_layers + len(gone)


def read_cut(vlm: VLM, name: str, plan: TowerPlan) -> Cut:
    """Bring a tower's plan into original numbers and find the positions that stay.

    Raises:
        PlanError: the plan's depth fits neither the first model nor this one, or it names layers
            that are gone.
    """
    tower, depth = vlm.towers[name], original_depth(vlm, name)
    if plan.num_layers != depth:
        if plan.num_layers != tower.num_layers:
            since = f" (of {depth} originally)" if depth != tower.num_layers else ""
            raise PlanError(
                f"The plan is for a {tower.name} tower of {plan.num_layers} layers, but this "
                f"model's has {tower.num_layers}{since}. Score this model and plan again."
            )
        plan = renumbered(plan, tower.original, depth)
    named = {*plan.drop, *plan.tune, *plan.freeze, *plan.losing()}
    gone = sorted(named - set(tower.original))
    if gone:
        raise PlanError(
            f"The plan names layers {gone} of the {tower.name} tower, which an earlier cut "
            f"removed. Left are {list(tower.original)}."
        )
    drop = set(plan.drop)
    kept = tuple(i for i, layer in enumerate(tower.original) if layer not in drop)
    return Cut(tower, plan, kept)


def renumbered(plan: TowerPlan, original: Sequence[int], depth: int) -> TowerPlan:
    """Translate a plan that counts positions of a student into layers of the first model."""
    scores: list[float | None] = [None] * depth
    for position, value in enumerate(plan.layer_scores):
        scores[original[position]] = value
    return TowerPlan(
        num_layers=depth,
        drop=tuple(original[i] for i in plan.drop),
        tune=tuple(original[i] for i in plan.tune),
        freeze=tuple(original[i] for i in plan.freeze),
        layer_scores=tuple(scores),
        reasons={original[i]: _in_original(why, original) for i, why in plan.reasons.items()},
        cut={
            site: {original[i]: units for i, units in layers.items()}
            for site, layers in plan.cut.items()
        },
        parts={site: tuple(original[i] for i in layers) for site, layers in plan.parts.items()},
        graft={
            original[i]: {original[j]: groups for j, groups in sources.items()}
            for i, sources in plan.graft.items()
        },
    )


def _in_original(reason: str, original: Sequence[int]) -> str:
    """Translate the layers that a reason names, as in "triplet 3-4-5: takes over from layer 3"."""

    def translated(numbers: re.Match[str]) -> str:
        places = [int(each) for each in numbers[0].split("-")]
        # a reason of somebody's own may count otherwise
        known = max(places) < len(original)
        return "-".join(str(original[each]) for each in places) if known else numbers[0]

    return _LAYERS.sub(translated, reason)


def check_cut(cut: Cut, allow_pinned: bool) -> None:
    """Check that enough layers stay, and those that other parts refer to by number.

    Raises:
        PlanError: fewer than 2 layers are left, or a bound one is not.
    """
    tower = cut.tower
    if cut.plan.drop and len(cut.kept) < _MIN_LAYERS:
        raise PlanError(
            f"The plan leaves {len(cut.kept)} of {tower.num_layers} layers of the {tower.name} "
            f"tower; at least {_MIN_LAYERS} must stay. Drop fewer."
        )
    bound = {layer: why for layer, why in pinned_drops(cut).items() if layer in tower.bound}
    if bound and not allow_pinned:
        listed = "; ".join(f"layer {layer}: {reason}" for layer, reason in bound.items())
        raise PlanError(
            f"The plan drops pinned layers of the {tower.name} tower ({listed}). Protect them when "
            "planning (protect='auto'), or allow it (allow_pinned=True, --allow-pinned)."
        )


def pinned_drops(cut: Cut) -> dict[int, str]:
    """Return the pinned layers that go: original number -> why they are pinned."""
    return {layer: cut.tower.pinned[layer] for layer in cut.dropped if layer in cut.tower.pinned}
