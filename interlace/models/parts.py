"""What stands where attention or the feed-forward part of a layer was: it adds nothing there.

Legend: B batch, T tokens, W width of what the part hands on.

The projections stay in the tree, with no rows or no columns and without the bias of the last one.
So names, records and files know the part and that it has no width, and stock transformers, which
builds whole ones, refuses the weights. What computed with them gives zeros instead.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn


class Absent:
    """Gives zeros, which take neither memory nor time, in the form that the layer expects.

    Attributes:
        width: W; 0 where the last projection lies outside and makes the zeros that are added.
        packed: how many values a tuple has that they are the first of; 0 for the bare tensor.
    """

    width: int
    packed: int

    def forward(self, hidden_states: torch.Tensor, *_: Any, **others: Any) -> Any:
        """Return zeros [B, T, W] for [B, T, ...]."""
        self.hold_place(hidden_states, others)
        nothing = hidden_states.new_zeros(()).expand(*hidden_states.shape[:-1], self.width)
        # T5 hands its position bias on from layer to layer
        given = (nothing, others.get("position_bias"), None)
        return given[: self.packed] if self.packed else nothing

    def hold_place(self, hidden_states: torch.Tensor, given: Mapping[str, Any]) -> None:
        """Let the place of an attention in a cache hold no tokens, where it would hold nothing.

        Assisted decoding takes tokens back from all places, and transformers fails at one with a
        window that was never filled.

        Args:
            hidden_states: [B, T, ...].
            given: what the attention is called with by name, perhaps a cache.
        """
        place: int | None = getattr(self, "layer_idx", None)
        for cache in given.values():
            if place is None or not isinstance(cache, Cache):
                continue
            for layer in getattr(cache, "layers", ())[place : place + 1]:
                if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
                    nothing = hidden_states.new_zeros(len(hidden_states), 1, 0, 1)
                    layer.update(nothing, nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and files name the class that this one is made of."""
        return blank, (_absent, type(self).__bases__[-1]), vars(self)


def blank(make: Callable[[Any], Any], kind: Any) -> Any:
    """Return an object of the class that `make` makes of `kind`, for pickle to fill.

    pickle finds classes by their names, and there are none for classes made at run time.
    """
    made: Any = make(kind)
    return made.__new__(made)


@functools.cache
def _absent(kind: Any) -> Any:
    return type(f"Absent{kind.__name__}", (Absent, kind), {"__module__": __name__})


def is_absent(module: object) -> bool:
    """Tell whether a module stands for a part that was taken out."""
    return isinstance(module, Absent)


def take_out(module: Any, width: int, *, heads: bool) -> None:
    """Let a module give zeros, and drop what it held beside its projections.

    Args:
        module: an attention or a feed-forward part; its projections are empty already.
        width: W.
        heads: it is an attention.
    """
    for name, child in list(module.named_children()):
        # norms of queries and keys; projections have no values left
        if any(parameter.numel() for parameter in child.parameters()):
            delattr(module, name)
    kind: Any = type(module)
    if kind.__name__.startswith("Narrow"):
        # given a width that its config cannot state before it was taken out
        kind = kind.__bases__[-1]
    module.width, module.packed = width, _packed(kind) if heads else 0
    module.__class__ = _absent(kind)


def _packed(kind: type[nn.Module]) -> int:
    """Return how many values an attention gives; 0 for a bare tensor."""
    stated = inspect.signature(kind.forward).return_annotation
    if stated in (torch.Tensor, "torch.Tensor"):
        return 0
    return 3 if kind.__name__.startswith("T5") else 2
