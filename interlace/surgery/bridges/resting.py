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


# Layer -> what it gives beside hidden states, in a tuple; None where it gives a tensor alone.
Forms = dict[Any, tuple[Any, ...] | None]


@contextlib.contextmanager
def idling(
    layers: Iterable[nn.Module], name: str, forms: Forms, *, read: bool = False
) -> Iterator[None]:
    """Let layers return their input instead of running, inside the block.

    Args:
        layers: the layers.
        name: of their tower, for messages.
        forms: what layers return beside hidden states. Layers that are missing run once as they
            are, and are added.
        read: later layers read what these return beside hidden states (T5's position bias). If
            they return any such thing, all of them run.
    """

    def idle(forward: Any) -> Any:
        def hand_on(*args: Any, **kwargs: Any) -> Any:
            if forward not in forms:
                output = forward(*args, **kwargs)
                forms[forward] = tuple(output[1:]) if isinstance(output, tuple | list) else None
                return output
            if read and any(map(_gives_more, forms.values())):
                return forward(*args, **kwargs)
            states = layer_input(args, kwargs, f"A layer of the tower '{name}'")
            more = forms[forward]
            return states if more is None else (states, *more)

        return hand_on

    with standing_in(layers, idle):
        yield


def _gives_more(form: tuple[Any, ...] | None) -> bool:
    return form is not None and any(each is not None for each in form)


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
def starting(layers: Any, start: Start, name: str, forms: Forms) -> Iterator[None]:
    """Start a tower at a layer whose input is known, run by run, inside the block.

    Args:
        layers: of the tower.
        start: where to begin.
        name: of the tower.
        forms: as of `idling`.
    """
    if not start.position:
        yield
        return
    known = iter(start.given)

    def put(hidden: torch.Tensor) -> torch.Tensor:
        return next(known).to(hidden.device, copy=True)

    before = layers[: start.position]
    with idling(before, name, forms, read=True), shift_input(layers[start.position], put):
        yield
