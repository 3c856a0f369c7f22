"""The attention and the feed-forward part of a layer, and running the layer without one of them.

A part is taken out by what leaves it: where the layer adds the part to the hidden states, the part
gives zeros; where the part adds them itself (BLIP's text layers, Q-Former, T5: the residual and in
the first two the norm lie inside it), it hands on what it was given. Which of the two holds for a
tower is tried out: without both parts a layer must give back exactly what it was given.

Attention includes cross-attention.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import torch

from interlace.models.states import layer_input, standing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import nn

    from interlace.scores.replay import Change, Forward

Part = Literal["attention", "mlp"]

_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# What a feed-forward part ends in. BLIP and OPT have no module around it, only its last linear
# layer; BLIP's is called `output` and adds the residual itself.
_FEED_FORWARD = re.compile(r"^(mlp|ffn|feed_forward|output|output_query|fc2|ff|.*FF)$")


def _children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_children():
        if name == "layer":
            # T5 numbers its parts; their classes tell which is which.
            yield from ((type(each).__name__, each) for each in module.children())
        else:
            yield name, module


def parts(layer: nn.Module, part: Part) -> list[nn.Module]:
    """Return the modules whose outputs make up a part of a layer; empty where none is found."""
    wanted = _ATTENTION if part == "attention" else _FEED_FORWARD
    return [
        module
        for name, module in _children(layer)
        if wanted.search(name) and not _NORM.search(name)
    ]


def _zeros(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output = forward(*args, **kwargs)
    if isinstance(output, tuple | list):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _handed_on(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output = forward(*args, **kwargs)
    # A last linear layer is given the residual as its second argument.
    two = len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].is_floating_point()
    given = args[1] if two else layer_input(args, kwargs, "A part of a layer")
    return (given, *output[1:]) if isinstance(output, tuple | list) else given


_WAYS: tuple[Change, ...] = (_zeros, _handed_on)


def _changed(modules: list[nn.Module], way: Change) -> AbstractContextManager[None]:
    def stand_in(forward: Forward) -> Callable[..., Any]:
        return lambda *args, **kwargs: way(forward, args, kwargs)

    return standing_in(modules, stand_in)


def without(layer: nn.Module, part: Part, way: Change) -> Change:
    """Make what runs in the place of a layer: the layer without one of its parts."""
    modules = parts(layer, part)

    def change(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _changed(modules, way):
            return forward(*args, **kwargs)

    return change


def way_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Change | None:
    """Find how parts are taken out of a layer, by running it without any.

    Args:
        layer: a layer of the tower.
        args: what it was given, positional.
        kwargs: what it was given, by keyword.

    Returns:
        The way, or None where no way leaves the hidden states as they were.
    """
    both: list[nn.Module] = []
    for part in ("attention", "mlp"):
        found = parts(layer, part)
        if not found:
            return None
        both += found
    states = layer_input(args, kwargs, "A layer")
    for way in _WAYS:
        with _changed(both, way):
            output = layer(*args, **kwargs)
        output = output[0] if isinstance(output, tuple | list) else output
        if isinstance(output, torch.Tensor) and torch.equal(output, states):
            return way
    return None
