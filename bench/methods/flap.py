"""FLAP: heads and neurons whose input fluctuates least go, and biases make up for their means.

Legend: N tokens, C columns of an output projection.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import interlace as il
from interlace._torch_utils import inference, without_cache
from interlace.models.sites import find_sites
from interlace.models.states import hooked, watch_state
from interlace.models.tokens import token_units
from interlace.records import TowerPlan
from interlace.surgery.bridges.calibration import Calibration
from methods.case import BATCH_SIZE, Case, Made, Method
from methods.width import choose_widths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interlace.models.sites import Site
    from interlace.plan.split_ways import Widths

    # (layer, place) -> moments
    Observed = dict[tuple[int, str], "Moments"]


class Moments:
    """Mean and variance of what a projection reads, column by column.

    Attributes:
        site: the place whose output projection it is.
        count: tokens.
        mean: [C] fp64.
    """

    def __init__(self, site: Site) -> None:
        """Start with no token."""
        self.site = site
        self.count = 0
        self.mean = torch.zeros(site.output.in_features, dtype=torch.float64)
        self._squares = torch.zeros_like(self.mean)

    def add(self, rows: torch.Tensor) -> None:
        """Take tokens in, [N, C]."""
        values = rows.double().cpu()
        count, mean = len(values), values.mean(0)
        apart, total = mean - self.mean, self.count + count
        # of two samples together
        self._squares += (values - mean).square().sum(0)
        self._squares += apart.square() * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """Of the tokens, [C] fp64."""
        return self._squares / max(1, self.count - 1)


@torch.no_grad()
def flap(case: Case) -> Made:
    """Cut the units whose input fluctuates least, the same number in every layer.

    Heads go by whole KV groups. The paper lets one threshold over standardised scores decide how
    many go from where; of the two to four KV groups per layer here that leaves nothing whole (49
    and 55 % of Qwen3-VL at a half, healed). So the loss on calibration samples decides how many of
    either kind go, as for `width`. All layers train.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arXiv 2312.11983: the measure (WIFV) and the compensation by biases, equations 3 to 6.

    Raises:
        PlanError: a tower's heads or neurons cannot be cut.
    """
    moments = look(case)
    chosen = choose_widths(case, lambda shares: _cut(case, moments, shares))
    note = "; ".join(f"{tower}: {each}" for tower, each in chosen.items())
    return Made(_cut(case, moments, chosen), f"{note}; biases where projections had none")


def _cut(case: Case, moments: Mapping[str, Observed], shares: Mapping[str, Widths]) -> Any:
    towers = {}
    for tower, widths in shares.items():
        cut: dict[str, dict[int, tuple[int, ...]]] = {}
        for (layer, place), own in moments[tower].items():
            units = least(own, widths.heads if own.site.kind == "heads" else widths.ffn)
            if units:
                cut.setdefault(place, {})[layer] = units
        depth = case.vlm.towers[tower].num_layers
        towers[tower] = TowerPlan(num_layers=depth, tune=tuple(range(depth)), cut=cut)
    shape = case.shared.scores.shape
    student = il.prune(case.vlm, il.Plan(towers=towers, shape=shape, standard=False))
    for tower, plan in towers.items():
        for place, by_layer in plan.cut.items():
            for layer, units in by_layer.items():
                sites = find_sites(student.towers[tower].layers[layer])
                compensate(sites[place].output, moments[tower][layer, place], units)
    return student


def least(moments: Moments, share: float) -> tuple[int, ...]:
    """Return the heads, in whole KV groups, or the neurons that fluctuate least, ascending.

    Args:
        moments: of the place.
        share: of its KV groups or neurons.
    """
    site = moments.site
    columns = moments.variance * site.output.weight.detach().double().cpu().square().sum(0)
    # of neurons every one is a group
    group_of = torch.tensor(site.kv_of) if site.kind == "heads" else torch.arange(site.num_units)
    groups = int(group_of.max()) + 1
    owner = group_of.repeat_interleave(site.head_dim)
    scores = torch.zeros(groups, dtype=torch.float64).index_add(0, owner, columns)
    gone = scores.argsort(stable=True)[: round(groups * share)]
    return tuple(torch.isin(group_of, gone).nonzero().flatten().tolist())


def compensate(linear: nn.Linear, moments: Moments, units: tuple[int, ...]) -> None:
    """Add to a narrowed projection what the columns of some units gave on average."""
    site = moments.site
    columns = torch.zeros(site.num_units, site.head_dim, dtype=torch.bool)
    columns[list(units)] = True
    mean = torch.where(columns.flatten(), moments.mean, 0.0)
    added = (site.output.weight.double().cpu() @ mean).to(linear.weight)
    if linear.bias is None:
        linear.bias = nn.Parameter(torch.zeros_like(added))
    linear.bias.add_(added)


def look(case: Case) -> dict[str, Observed]:
    """Return tower -> (layer, place) -> what its output projection reads; without padding."""
    vlm = case.vlm
    data = Calibration(vlm, case.shared.calibration, BATCH_SIZE)
    batch: dict[str, Any] = {}
    counts: dict[str, torch.Tensor] = {}

    def begin(tower: str, hidden: torch.Tensor) -> None:
        counts[tower] = token_units(vlm, tower, batch, hidden)[1] >= 0

    def take(tower: str, moments: Moments, linear: nn.Linear, args: Any) -> None:
        moments.add(args[0].reshape(-1, linear.in_features)[counts[tower]])

    found: dict[str, Observed] = {}
    hooks = []
    for tower in case.counts():
        layers = vlm.towers[tower].layers
        found[tower] = {
            (layer, place): Moments(site)
            for layer, module in enumerate(layers)
            for place, site in find_sites(module).items()
        }
        hooks.append(watch_state(layers, 0, tower, partial(begin, tower)))
        for moments in found[tower].values():
            hook = partial(take, tower, moments)
            hooks.append(moments.site.output.register_forward_pre_hook(hook))
    with hooked(hooks), inference(vlm.model), without_cache(vlm.model):
        for batch in data.batches:
            data.run(vlm.model, batch)
    return found


METHODS = {"flap": Method(flap, timed="width")}
