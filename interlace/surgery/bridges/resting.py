"""Layers that need not run: those behind what is looked at, and those whose outcome is known."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from interlace.models.states import layer_input, shift_input, standing_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import nn


@contextlib.contextmanager
def idling(layers: Iterable[nn.Module], name: str, *, read: bool = False) -> Iterator[None]:
    """Let layers hand on the hidden states that they are given.

    Each runs once as it is, to show in which form it gives its output.

    Args:
        layers: the layers.
        name: of their tower, for messages.
        read: others go by what the layers give beside hidden states (T5's position bias). If they
            give any such thing, all of them run.
    """
    shown: dict[Any, Any] = {}

    def idle(forward: Any) -> Any:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            if hand_on not in shown:
                shown[hand_on] = forward(*args, **kwargs)
                return shown[hand_on]
            if read and any(map(_gives_more, shown.values())):
                return forward(*args, **kwargs)
            states = layer_input(args, kwargs, f"A layer of the tower '{name}'")
            output = shown[hand_on]
            return (states, *output[1:]) if isinstance(output, tuple | list) else states

        return hand_on

    with standing_in(layers, idle):
        yield


def _gives_more(output: Any) -> bool:
    return isinstance(output, tuple | list) and any(each is not None for each in output[1:])


@dataclass(frozen=True)
class Start:
    """What one layer of a tower is given, so that no layer before it needs to run.

    Attributes:
        position: of the layer; 0 where nothing is known.
        given: its input in every run of the tower, in order, on the CPU.
    """

    position: int = 0
    given: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def starting(layers: Any, start: Start, name: str) -> Iterator[None]:
    """Let a tower begin with what a layer is known to be given, run by run."""
    if not start.position:
        yield
        return
    known = iter(start.given)
    with idling(layers[: start.position], name, read=True):
        hook = shift_input(
            layers[start.position], lambda hidden: next(known).to(hidden.device, copy=True)
        )
        try:
            yield
        finally:
            hook.remove()
