"""Memory of static caches that outlives them: what was recorded against one serves the next.

`generate` makes a new static cache for every call. A recording reads and writes the memory of one,
so the memory is handed on: once a cache is gone, the next one of the same form gets its memory
before the prompt fills it. Places that no attention fills, since a layer has none, have no memory.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel, StaticCache
from transformers.cache_utils import StaticLayer

# What decoders, their layers and their outputs call the cache: "cache" since transformers 5.24.
_NAMES = inspect.signature(LlamaModel.forward).parameters
_OLD = "past_key_values"
CACHE = next(name for name in ("cache", _OLD) if name in _NAMES)

# place in a cache -> keys, values and length
Memory = dict[int, tuple[Tensor, Tensor, Tensor]]


def by_new_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Call the cache by its new name, as the layers of transformers do that are called directly."""
    return {CACHE if name == _OLD else name: value for name, value in kwargs.items()}


class CacheMemory:
    """The memory of the last static cache of a decoder."""

    def __init__(self) -> None:
        """Start without any."""
        self._layers: Memory = {}
        self._num_places = 0
        self._owner: weakref.ref[Any] | None = None
        # or two threads could take it at once
        self._lock = threading.Lock()

    def lend(self, cache: Any, batch: int, like: Tensor) -> None:
        """Give a cache that has no memory yet that of the last one, if that is gone and fits.

        Args:
            cache: what a decoder was called with as its cache.
            batch: rows that it will hold.
            like: on the device and in the dtype that it will have.
        """
        with self._lock:
            if self._owner is not None and self._owner() is None and is_static(cache):
                self._hand_on(cache, batch, like)

    def _hand_on(self, cache: Any, batch: int, like: Tensor) -> None:
        layers, inference = cache.layers, torch.is_inference_mode_enabled()
        if len(layers) != self._num_places or any(each.is_initialized for each in layers):
            return
        for place, (keys, _, _) in self._layers.items():
            layer = layers[place]
            if (keys.shape[0], keys.shape[2]) != (batch, layer.max_cache_len):
                return
            if (keys.dtype, keys.device) != (like.dtype, like.device):
                return
            if keys.is_inference() != inference:
                return
        for place, (keys, values, length) in self._layers.items():
            layer = layers[place]
            # what a masked key holds must still be a number
            layer.keys, layer.values, layer.cumulative_length = keys.zero_(), values.zero_(), length
            length.zero_()
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.batch_size, layer.num_heads = keys.shape[:2]
            layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
            layer.is_initialized = True
        self._owner = weakref.ref(cache)

    def keep(self, cache: Any) -> None:
        """Remember the memory of a cache that is in use."""
        if is_static(cache) and any(each.is_initialized for each in cache.layers):
            with self._lock:
                self._layers, self._num_places = memory_of(cache), len(cache.layers)
                self._owner = weakref.ref(cache)

    def left_by(self, cache: Any) -> bool:
        """Tell whether the cache that had the memory has other memory now, as beam search does."""
        with self._lock:
            owned = self._owner is not None and self._owner() is cache
            return owned and not same_memory(self._layers, memory_of(cache))


def same_memory(one: Memory, other: Memory) -> bool:
    """Tell whether two caches lie in the same memory."""
    return one.keys() == other.keys() and all(
        mine is theirs
        for place, each in one.items()
        for mine, theirs in zip(each, other[place], strict=True)
    )


def memory_of(cache: Any) -> Memory:
    """Keys, values and length of every place of a static cache that is in use."""
    return {
        place: (each.keys, each.values, each.cumulative_length)
        for place, each in enumerate(cache.layers)
        if each.is_initialized
    }


def is_static(cache: Any) -> bool:
    """Tell whether a cache is static, with one kind of layers, and stays on its device."""
    return (
        type(cache) is StaticCache
        and not getattr(cache, "offloading", False)
        and all(type(each) is StaticLayer for each in cache.layers)
    )
