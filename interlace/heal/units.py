"""Gates on units of a site: a factor on every query head, or on every 8 neurons.

    y = sum over units j of g_j W_j x_j + b

x_j is what unit j gives and W_j the columns of the output projection that read it, so g_j ends in
those columns, W_j <- g_j W_j, and the bias stays. It is the query head that has a gate, not the KV
group: the finest that a plan cuts, and plans of whole groups add up their heads. Neurons are gated
in runs of `FFN_MULTIPLE` neighbours, the size of the bundles that a plan cuts.

Source: gates on attention heads under the hard-concrete relaxation of L0 (arXiv 1712.01312): Voita
et al., Analyzing multi-head self-attention (arXiv 1905.09418), section 6; L1 masks on heads and
neurons: UPop (arXiv 2301.13741).

Legend: B.. batch and tokens, C input columns of an output projection, n gates of a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interlace._records.shape import FFN_MULTIPLE
from interlace.errors import ConfigError
from interlace.heal.sparsity import (
    BRANCHES,
    Gated,
    check_own,
    check_unnormalised,
    find_branches,
)
from interlace.models.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from torch import Tensor, nn

    from interlace.models import VLM, Tower

# What gates can stand on inside a branch -> the kind of site, and units of it under one gate.
_UNITS = {"heads": ("heads", 1), "neurons": ("ffn", FFN_MULTIPLE)}


@dataclass(frozen=True)
class Units(Gated):
    """The gated units of one site, at its output projection; `kind` is the name of the site.

    Attributes:
        width: columns under one gate; the last gate may have fewer.
    """

    width: int = 1

    def attach(self, module: nn.Module, drawn: Callable[[], Tensor | None]) -> None:
        """Scale what the projection reads, [B.., C]."""

        def scale(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            gates = drawn()
            if gates is None:
                return None
            return (inputs[0] * self._columns(gates, inputs[0].shape[-1]).to(inputs[0].dtype),)

        module.register_forward_pre_hook(scale)

    def fold(self, module: Any, gates: Sequence[float]) -> None:
        """Scale the columns of the weight; the bias stays."""
        weight = module.weight
        exact = torch.tensor(gates, dtype=torch.float64, device=weight.device)
        scaled = weight.detach().double() * self._columns(exact, weight.shape[-1])
        weight.data = scaled.to(weight.dtype)

    def _columns(self, gates: Tensor, size: int) -> Tensor:
        # expand, not repeat_interleave, whose gradient is a sum by atomics on a GPU
        return gates[:, None].expand(-1, self.width).flatten()[:size]


def find_gated(vlm: VLM, towers: Collection[str], units: Collection[str]) -> tuple[Gated, ...]:
    """Find what gates are to stand on in every layer of some towers.

    Args:
        vlm: the model.
        towers: names of the towers.
        units: some of "branches", "heads" and "neurons".

    Raises:
        ConfigError: `find_branches` refuses a tower, or a layer has no site of the kind that ends
            in a linear module of its own, known by its name, or normalises its branches.
    """
    found: list[Gated] = []
    if BRANCHES in units:
        found += find_branches(vlm, towers)
    for unit in _UNITS:
        if unit in units:
            sites = [site for name in towers for site in _of_tower(vlm.towers[name], unit)]
            check_own(vlm, sites, ("weight",))
            found += sites
    return tuple(found)


def _of_tower(tower: Tower, unit: str) -> Iterable[Units]:
    check_unnormalised(tower)
    kind, each = _UNITS[unit]
    for position, layer in enumerate(tower.layers):
        paths = {id(module): path for path, module in layer.named_modules()}
        sites = [site for site in find_sites(layer).values() if site.kind == kind]
        if not sites:
            raise ConfigError(
                f"The {unit} of the tower '{tower.name}' cannot be gated: no projections of a "
                f"{type(layer).__name__} are known to feed and read them (experts, adapted or "
                f"quantised modules). Heal with gate_units=('branches',) or gates='none'."
            )
        for site in sites:
            if not site.groups:
                # taken out
                continue
            yield Units(
                unit=unit,
                tower=tower.name,
                layer=tower.original[position],
                kind=site.name,
                path=f"{tower.path}.{position}.{paths[id(site.output)]}",
                count=-(-site.num_units // each),
                width=site.head_dim * each,
            )
