"""The sizes of a model that planning needs to know, without the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interlace._coerce import Checked
from interlace.errors import ShapeError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class TowerShape(Checked):
    """The sizes of one stack of transformer layers.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: query heads per layer.
        num_kv_heads: key and value heads per layer; equal to `num_heads` without grouping.
        head_dim: width of one head.
        intermediate_size: width of the feed-forward part.
        layer_parameters: parameters of every layer, in order.
        causal: tokens see only earlier ones, so generation keeps a KV cache.
        cross_attention: layers also attend to another tower.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    layer_parameters: tuple[int, ...]
    causal: bool
    cross_attention: bool = False

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_parameters)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache of all layers holds per token; 0 without a cache."""
        return 2 * self.num_kv_heads * self.head_dim * self.num_layers if self.causal else 0

    def without(self, layers: Iterable[int]) -> TowerShape:
        """Return the shape with these layers gone."""
        gone = set(layers)
        outside = sorted(layer for layer in gone if not 0 <= layer < self.num_layers)
        if outside:
            raise ShapeError(f"The tower has layers 0..{self.num_layers - 1}, not {outside}.")
        kept = tuple(p for i, p in enumerate(self.layer_parameters) if i not in gone)
        return dataclasses.replace(self, layer_parameters=kept)


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

    def without(self, dropped: Mapping[str, Iterable[int]]) -> ModelShape:
        """Return the shape after the given layers of each tower are removed."""
        towers, total = dict(self.towers), self.total_parameters
        for name, layers in dropped.items():
            if name not in towers:
                raise ShapeError(unknown_name("tower", name, towers))
            towers[name] = self.towers[name].without(layers)
            total -= sum(self.towers[name].layer_parameters) - sum(towers[name].layer_parameters)
        return dataclasses.replace(self, towers=towers, total_parameters=total)
