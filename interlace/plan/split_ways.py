"""The ways for a tower to lose a share of its parameters as layers, heads and neurons together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interlace._records.shape import FFN_MULTIPLE
from interlace.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.records import TowerShape

# How many numbers of dropped layers are tried, beside none.
_DEPTHS = 4
# How many numbers of KV groups are tried at most, none among them; towers have up to 32 groups.
_HEADS = 8
# Shares are rounded down to whole groups and bundles; a hair more gives the number that was meant.
_HAIR = 1e-6


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
        """Return the shares as arguments of `make_plan`."""
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
    """List pairs of head and neuron shares with which layers lose about `wanted` parameters.

    For each number of KV groups, the number of neuron bundles that comes nearest. Pairs that miss
    by more than one bundle are left out, unless none comes nearer.

    Args:
        shape: of the tower.
        wanted: parameters to remove in all.
        layers: the layers to narrow, all by the same shares.

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


def splits(shape: TowerShape, wanted: int, most: int, fixed: int = 0) -> list[Split]:
    """List the ways for a tower to lose about `wanted` parameters.

    Args:
        shape: of the tower.
        wanted: parameters to remove in all.
        most: the largest number of layers to drop.
        fixed: parameters that a layer counts for beside its own; only dropping it removes them.

    Raises:
        PlanError: no split comes near `wanted`; or as `widths_for` raises it.
    """
    depth = shape.num_layers
    total = sum(shape.layer_parameters) + depth * fixed
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
            f"{_percent(wanted, total)} of the {'time' if fixed else 'parameters'} of the layers "
            f"is out of reach: {limit} "
            f"can go, since {why}."
        )
    return near


def _percent(number: int, total: int) -> str:
    return f"{100 * number / total:.3g} %"
