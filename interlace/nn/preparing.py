"""Preparing the inputs of a step for `generate`, without a mask that the recorded step has already.

transformers makes the mask of every step anew, some twenty small kernels and a wait for the device
between two tokens. A recorded step moves its own mask on by the token that it added. `generate`
only ever appends a one to its mask, so where a mask is what `generate` itself made of the mask of
the step before, the recorded one says the same.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interlace.nn.cache_memory import CACHE

if TYPE_CHECKING:
    from torch import nn

    from interlace.nn.graphs import GraphedForward

_PREPARE = "prepare_inputs_for_generation"
_UPDATE = "_update_model_kwargs_for_generation"


class Preparation:
    """What stands between `generate` and a decoder that replays its steps."""

    def __init__(self, target: Any, forward: GraphedForward) -> None:
        """Start with no text.

        Args:
            target: the model that generates.
            forward: that of its text decoder.
        """
        self._target, self._forward = target, forward
        self._given: weakref.ref[Tensor] | None = None
        self._grown: weakref.ref[Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy of the model start with no text."""
        return Preparation, (self._target, self._forward)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the model does, but hand the recorded step its own mask."""
        mask, masks = kwargs.get("attention_mask"), None
        if isinstance(mask, Tensor) and self._grown is not None and self._grown() is mask:
            masks = self._forward.masks_ahead(kwargs.get(CACHE))
        self._given = weakref.ref(mask) if isinstance(mask, Tensor) else None
        self._grown = None
        stock = getattr(type(self._target), _PREPARE)
        if masks is None:
            return stock(self._target, *args, **kwargs)
        # a mask of four axes is passed on as it is
        kwargs["attention_mask"] = next(iter(masks.values()))
        inputs = stock(self._target, *args, **kwargs)
        if len(masks) > 1 or "" not in masks:
            inputs["attention_mask"] = masks
        return inputs

    def update(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Do what the model does, and remember which mask it made."""
        before = model_kwargs.get("attention_mask")
        stock = getattr(type(self._target), _UPDATE)
        updated: dict[str, Any] = stock(self._target, outputs, model_kwargs, *args, **kwargs)
        after = updated.get("attention_mask")
        if not isinstance(before, Tensor) or self._given is None or self._given() is not before:
            return updated
        if isinstance(after, Tensor) and after.shape[1] == before.shape[1] + 1:
            self._grown = weakref.ref(after)
        return updated


def install(target: nn.Module, forward: GraphedForward) -> None:
    """Let a model that generates prepare its steps in this way."""
    preparation = Preparation(target, forward)
    for name, method in ((_PREPARE, preparation.prepare), (_UPDATE, preparation.update)):
        bound: Any = functools.partial(method)
        # generate reads from it what a model takes
        bound.__signature__ = inspect.signature(getattr(type(target), name).__get__(target))
        target.__dict__[name] = bound


def remove(target: nn.Module) -> None:
    """Undo `install`."""
    for name in (_PREPARE, _UPDATE):
        target.__dict__.pop(name, None)
