"""The sizes of a model that planning needs to know, without the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from interlace._coerce import Checked
from interlace.errors import ShapeError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from interlace._records.plan import TowerPlan

# Neurons that are cut together: matrix units want widths that are multiples of it.
FFN_MULTIPLE = 8


@dataclass(frozen=True)
class SiteShape(Checked):
    """The width of one place in every layer of a tower: an attention, or a feed-forward part.

    Attributes:
        kind: "heads", whose units are query heads, or "ffn", whose units are neurons.
        groups: per layer the query heads of every KV head, or the neurons as one number; empty
            where a layer lacks the place, or what was there.
        unit_parameters: parameters of one query head, or of one neuron.
        kv_parameters: parameters of one key and value head; 0 for "ffn".
        cross: attends to another tower.
        shared_parameters: what a layer has beside its units, and loses only with all of them.
    """

    kind: Literal["heads", "ffn"]
    groups: tuple[tuple[int, ...], ...]
    unit_parameters: int
    kv_parameters: int = 0
    cross: bool = False
    shared_parameters: int = 0

    def num_units(self, layer: int) -> int:
        """Return the query heads or neurons of a layer."""
        return sum(self.groups[layer])

    def parameters(self, layer: int) -> int:
        """Return the parameters of a layer in this place."""
        if not self.groups[layer]:
            return 0
        count = self.num_units(layer) * self.unit_parameters + self.shared_parameters
        return count + len(self.groups[layer]) * self.kv_parameters

    def kv_of(self, layer: int) -> tuple[int, ...]:
        """Return the KV head of every query head of a layer."""
        return tuple(kv for kv, count in enumerate(self.groups[layer]) for _ in range(count))

    def groups_without(self, layer: int, units: Iterable[int]) -> tuple[int, ...]:
        """Return a layer's groups when units are gone; a KV head goes with its last query head.

        Raises:
            ShapeError: the layer has no such units.
        """
        gone = set(units)
        outside = sorted(unit for unit in gone if not 0 <= unit < self.num_units(layer))
        if outside:
            raise ShapeError(
                f"Layer {layer} has the units 0..{self.num_units(layer) - 1}, not {outside[:4]}."
            )
        kv_of = self.kv_of(layer) if self.kind == "heads" else (0,) * self.num_units(layer)
        left = list(self.groups[layer])
        for unit in gone:
            left[kv_of[unit]] -= 1
        return tuple(count for count in left if count)


@dataclass(frozen=True)
class TowerShape(Checked):
    """The sizes of one stack of transformer layers.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: query heads per layer, as the config states them.
        num_kv_heads: key and value heads per layer; equal to `num_heads` without grouping.
        head_dim: width of one head.
        layer_parameters: parameters of every layer, in order.
        causal: tokens see only earlier ones, so generation keeps a KV cache.
        cross_attention: layers also attend to another tower.
        sites: places whose width can be cut, by their path in a layer, with their width in every
            layer; empty where the layers are of an unknown make.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_parameters: tuple[int, ...]
    causal: bool
    cross_attention: bool = False
    sites: dict[str, SiteShape] = field(default_factory=dict)

    def _check(self) -> None:
        for name, site in self.sites.items():
            if len(site.groups) != self.num_layers:
                raise ShapeError(
                    f"The site '{name}' has {len(site.groups)} widths for {self.num_layers} layers."
                )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_parameters)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache of all layers holds per token; 0 without a cache."""
        return 2 * self.total_heads(cross=False)[1] * self.head_dim if self.causal else 0

    def total_heads(self, *, cross: bool) -> tuple[int, int]:
        """Return the query heads and the KV heads of all layers together.

        Args:
            cross: those that attend to another tower, instead of those of self-attention.
        """
        sites = [site for site in self.sites.values() if site.kind == "heads"]
        if not sites:
            counted = self.num_layers if self.cross_attention or not cross else 0
            return self.num_heads * counted, self.num_kv_heads * counted
        groups = [layer for site in sites if site.cross == cross for layer in site.groups]
        return sum(map(sum, groups)), sum(map(len, groups))

    def without(self, layers: Iterable[int]) -> TowerShape:
        """Return the shape with these layers gone."""
        gone = set(layers)
        outside = sorted(layer for layer in gone if not 0 <= layer < self.num_layers)
        if outside:
            raise ShapeError(f"The tower has layers 0..{self.num_layers - 1}, not {outside}.")
        kept = [i for i in range(self.num_layers) if i not in gone]
        sites = {
            name: dataclasses.replace(site, groups=tuple(site.groups[i] for i in kept))
            for name, site in self.sites.items()
        }
        parameters = tuple(self.layer_parameters[i] for i in kept)
        return dataclasses.replace(self, layer_parameters=parameters, sites=sites)

    def narrowed(self, cut: Mapping[str, Mapping[int, Iterable[int]]]) -> TowerShape:
        """Return the shape without some units: site -> layer -> units."""
        sites, parameters = dict(self.sites), list(self.layer_parameters)
        for name, by_layer in cut.items():
            if name not in sites:
                raise ShapeError(unknown_name("place of a layer", name, sites))
            groups = list(sites[name].groups)
            for layer, units in by_layer.items():
                groups[layer] = sites[name].groups_without(layer, units)
            after = dataclasses.replace(sites[name], groups=tuple(groups))
            for layer in by_layer:
                parameters[layer] -= sites[name].parameters(layer) - after.parameters(layer)
            sites[name] = after
        return dataclasses.replace(self, sites=sites, layer_parameters=tuple(parameters))

    def without_parts(self, parts: Mapping[str, Iterable[int]]) -> TowerShape:
        """Return the shape without some places of some layers: place -> layers."""
        units: dict[str, dict[int, Iterable[int]]] = {}
        for name, layers in parts.items():
            if name not in self.sites:
                raise ShapeError(unknown_name("place of a layer", name, self.sites))
            site = self.sites[name]
            units[name] = {layer: range(site.num_units(layer)) for layer in layers}
        return self.narrowed(units)

    def grafted(
        self, graft: Mapping[int, Mapping[int, Iterable[int]]], whole: TowerShape
    ) -> TowerShape:
        """Return the shape with KV groups of some layers added to others.

        Args:
            graft: layer that takes -> layer that gives -> KV groups.
            whole: the shape that the groups are counted in.
        """
        if not graft:
            return self
        name = next(name for name, site in self.sites.items() if site.kind == "heads")
        groups, parameters = list(self.sites[name].groups), list(self.layer_parameters)
        for target, sources in graft.items():
            for source, taken in sources.items():
                groups[target] += tuple(whole.sites[name].groups[source][kv] for kv in taken)
        site = dataclasses.replace(self.sites[name], groups=tuple(groups))
        for target in graft:
            parameters[target] += site.parameters(target) - self.sites[name].parameters(target)
        sites = self.sites | {name: site}
        return dataclasses.replace(self, sites=sites, layer_parameters=tuple(parameters))


@dataclass(frozen=True)
class ModelShape(Checked):
    """The sizes of a whole model.

    Attributes:
        towers: the stacks by name.
        total_parameters: all parameters, embeddings and heads included, shared ones once.
        bytes_per_parameter: 2 for bfloat16 and float16, 4 for float32.
    """

    towers: dict[str, TowerShape]
    total_parameters: int
    bytes_per_parameter: int = 2

    def after(self, plans: Mapping[str, TowerPlan]) -> ModelShape:
        """Return the shape once these plans, by tower, are carried out."""
        towers, total = dict(self.towers), self.total_parameters
        for name, plan in plans.items():
            if name not in towers:
                raise ShapeError(unknown_name("tower", name, towers))
            whole = self.towers[name]
            smaller = whole.narrowed(plan.cut).without_parts(plan.parts)
            towers[name] = smaller.grafted(plan.graft, whole).without(plan.drop)
            total -= sum(self.towers[name].layer_parameters) - sum(towers[name].layer_parameters)
        return dataclasses.replace(self, towers=towers, total_parameters=total)
