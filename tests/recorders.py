"""A recorder for the CPU that keeps to the rules of CUDA graphs.

As a graph does, it reads nothing but the memory it was recorded with, that of a cache included,
fills one result and the norm that this bears, changes nothing while it records, and counts up no
version of what it fills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers.cache_utils import StaticLayer

from interlace.nn import layers
from interlace.nn.norms import bear, borne_by

if TYPE_CHECKING:
    from collections.abc import Callable


class Replayer:
    """Records a function by keeping it."""

    device = torch.device("cpu")

    def warm_up(self, step: Callable[[], torch.Tensor]) -> None:
        step()

    def record(self, step: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
        lengths = []
        # keys and values of a cache by the number of the layer
        memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
            lengths.append((layer.cumulative_length, layer.cumulative_length.clone()))
            return stock(layer, *args, **kwargs)

        def cached(cache: Any, key: Any, value: Any, number: int) -> Any:
            layer = cache.layers[number]
            now = layer.keys, layer.values
            layer.keys, layer.values = memory.setdefault(number, now)
            try:
                return stock_cached(cache, key, value, number)
            finally:
                layer.keys, layer.values = now

        stock, stock_cached = StaticLayer.update, layers.cached
        with (
            mock.patch.object(StaticLayer, "update", update),
            mock.patch.object(layers, "cached", cached),
        ):
            made = step()
        for length, before in lengths:
            length.copy_(before)
        # a recording holds no numbers before it is replayed
        result = torch.full_like(made, float("nan"))
        norm = borne_by(made)
        if norm is not None:
            bear(result, norm[0], torch.full_like(norm[1], float("nan")))

        def replay() -> None:
            with mock.patch.object(layers, "cached", cached):
                made = step()
            result.data.copy_(made)
            normed, own = borne_by(made), borne_by(result)
            if normed is not None and own is not None:
                own[1].data.copy_(normed[1])

        return replay, result
