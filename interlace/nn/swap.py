"""Swapping the class of a module: the object, its parameters, names and hooks stay what they are.

A fused class is a subclass of the module's own, so `isinstance` holds, gradient checkpointing wraps
it, transformers records its outputs, and `super().forward` is the way back for every call that the
fused one does not serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

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


def autocasting(x: Tensor) -> bool:
    """Tell whether torch.autocast chooses dtypes, which our ops do not take part in."""
    return torch.is_autocast_enabled(x.device.type)
