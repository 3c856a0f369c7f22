"""Hidden states at a layer's two ends, out of what its forward hooks are given.

Legend: B batch, T tokens, D width.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> torch.Tensor:
    """Return the hidden states that a layer was called with, [B, T, D] or [R, D].

    Args:
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        where: which layer of which tower, for the message.

    Raises:
        ShapeError: none of the arguments looks like hidden states.
    """
    candidates = (*args[:1], kwargs.get("hidden_states"), *kwargs.values())
    for each in candidates:
        if isinstance(each, torch.Tensor) and each.is_floating_point() and each.dim() >= 2:
            return each
    raise ShapeError(
        f"{where} was called without hidden states as its first argument or as hidden_states; its "
        "family needs a description of its own."
    )


def layer_output(output: Any, name: str) -> torch.Tensor:
    """Return the hidden states that a layer gave, alone or first in a tuple.

    Raises:
        ShapeError: the output is something else.
    """
    if isinstance(output, torch.Tensor):
        return output
    first = output[0] if isinstance(output, tuple | list) and output else None
    if isinstance(first, torch.Tensor):
        return first
    raise ShapeError(
        f"A layer of the tower '{name}' gives {type(output).__name__}; a tensor or a tuple that "
        "begins with one is expected."
    )


def replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: torch.Tensor, by: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with other hidden states wherever these very ones stand."""
    return (
        tuple(by if each is hidden else each for each in args),
        {key: by if each is hidden else each for key, each in kwargs.items()},
    )


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for a block and remove them after it.

    Args:
        handles: what setting the hooks returned; a generator sets them as the block begins.
    """
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def watch_state(
    layers: nn.ModuleList, position: int, tower: str, take: Callable[[torch.Tensor], None]
) -> RemovableHandle:
    """Set a hook that hands on h_position in every run of a tower; returns its handle.

    Args:
        layers: of the tower, L of them.
        position: 0..L; h_i is the input of layer i, h_L the output of the last layer.
        tower: its name, for messages.
        take: called with h_position.
    """

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        take(layer_input(args, kwargs, f"Layer {position} of the tower '{tower}'"))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        take(layer_output(output, tower))

    if position == len(layers):
        return layers[-1].register_forward_hook(after)
    return layers[position].register_forward_pre_hook(before, with_kwargs=True)


def shift_input(
    layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> RemovableHandle:
    """Set a hook that replaces the hidden states a layer is given; returns its handle."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = layer_input(args, kwargs, type(module).__name__)
        return replaced(args, kwargs, hidden, change(hidden))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


@contextlib.contextmanager
def standing_in(
    modules: Iterable[nn.Module], make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let something else run in the place of modules.

    Args:
        modules: the modules; each gets its own forward back.
        make: makes what runs in the place of a forward.
    """
    own = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, _ in own:
            module.forward = make(module.forward)
        yield
    finally:
        for module, forward in own:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
