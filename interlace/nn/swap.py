"""Swapping the class of a module: the object, its parameters, names and hooks stay what they are.

A fused class is a subclass of the module's own, so `isinstance` holds, gradient checkpointing wraps
it, transformers records its outputs, and `super().forward` is the way back for every call that the
fused one does not serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import output_capturing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

_COLLECTS = output_capturing.__name__
STATE = "interlace_state"


class Fused:
    """Base of the fused classes; tells a fused module from any other."""

    interlace_state: Any


_CLASSES: dict[tuple[type, type], type] = {}


def _fused_class(mixin: type[Fused], original: type) -> Any:
    bases = (mixin, original)
    if bases not in _CLASSES:
        _CLASSES[bases] = type(f"Fused{original.__name__}", bases, {"__module__": __name__})
    return _CLASSES[bases]


def stock_class(module: nn.Module) -> Any:
    """Return the class that a module of transformers has, fused or not."""
    return type(module).__bases__[1] if isinstance(module, Fused) else type(module)


def swap(module: nn.Module, mixin: type[Fused], state: Any) -> None:
    """Give a module the forward of `mixin`, and what it needs to know."""
    module.__class__ = _fused_class(mixin, type(module))
    module.__dict__[STATE] = state


def restore(module: Any) -> None:
    """Give a module its own class back."""
    module.__class__ = stock_class(module)
    del module.__dict__[STATE]


def hooked(*modules: nn.Module) -> bool:
    """Tell whether calls of a module must not be left out: it is listened to, or runs otherwise."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        # as a bridge does with the norm behind it
        or "forward" in vars(module)
        for module in modules
    )


def listened_to(modules: Iterable[nn.Module]) -> bool:
    """Tell whether anything listens to modules that would not hear a replay.

    What transformers leaves at a module to collect outputs hears nothing unless it is collecting.
    """
    return any(
        "forward" in vars(module)
        or any(
            hook.__module__ != _COLLECTS
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
        for module in modules
    )


def collected() -> set[str]:
    """Name the outputs of layers that transformers is collecting in this pass."""
    collector = output_capturing._active_collector.get()
    return set(collector or ()) - {"_hidden_states_layers"}


def autocasting(x: Tensor) -> bool:
    """Tell whether torch.autocast chooses dtypes, which our ops do not take part in."""
    return torch.is_autocast_enabled(x.device.type)
