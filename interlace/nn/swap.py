"""Swapping the class of a module: the object, its parameters, names and hooks stay what they are.

A fused class is a subclass of the module's own, so `isinstance` holds, gradient checkpointing wraps
it, transformers records its outputs, and `super().forward` is the way back for every call that the
fused one does not serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import output_capturing

from interlace.models.attention import check_implementation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

# hooks that hear nothing: unless outputs are collected; and one that only looks at a config
_SILENT = (output_capturing.__name__, check_implementation.__module__)
STATE = "interlace_state"


class Fused(nn.Module):
    """Base of the fused classes; tells a fused module from any other."""

    interlace_state: Any

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # moving a module gives every parameter memory of its own
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        merged = getattr(self.interlace_state, "merged", None)
        if merged is not None:
            merged.lay_out()
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and files name the classes that this one is made of.

        pickle finds classes by their names, and there are none for classes made at run time; the
        stock one may be such a class as well, and says how it is made by an empty object.
        """
        original = stock_class(self)
        return _blank, (type(self).__bases__[0], original.__new__(original)), vars(self)


_CLASSES: dict[tuple[type, type], type] = {}


def _fused_class(mixin: type[Fused], original: type) -> Any:
    bases = (mixin, original)
    if bases not in _CLASSES:
        _CLASSES[bases] = type(f"Fused{original.__name__}", bases, {"__module__": __name__})
    return _CLASSES[bases]


def _blank(mixin: type[Fused], original: nn.Module) -> nn.Module:
    """Return an empty object of a fused class, for pickle to fill."""
    original.__class__ = _fused_class(mixin, type(original))
    return original


def stock_class(module: nn.Module) -> Any:
    """Return the class that a module of transformers has, fused or not."""
    return type(module).__bases__[1] if isinstance(module, Fused) else type(module)


def swap(module: nn.Module, mixin: type[Fused], state: Any) -> None:
    """Give a module the forward of `mixin`, and what it needs to know."""
    fused = _fused_class(mixin, type(module))
    # first, so that whatever is fused can be restored
    module.__dict__[STATE] = state
    module.__class__ = fused


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
        # asked at every call of a block, so that nothing is made where there are no hooks
        or (
            (module._forward_hooks or module._forward_pre_hooks)
            and any(
                hook.__module__ not in _SILENT
                for hooks in (module._forward_hooks, module._forward_pre_hooks)
                for hook in hooks.values()
            )
        )
        for module in modules
    )


def makeup(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What a recording of modules rests on: their classes, and where their weights lie.

    Modules of other packages may be switched, as adapters are; so what they say in plain words and
    numbers counts too.
    """
    return tuple(
        part
        for module in modules
        for part in (
            type(module),
            *(each.data_ptr() for each in module._parameters.values() if each is not None),
            *(_switches(module) if _is_foreign(module) else ()),
        )
    )


def _is_foreign(module: nn.Module) -> bool:
    """Tell whether the class of a module is neither ours nor of torch and transformers."""
    return type(module).__module__.partition(".")[0] not in ("interlace", "torch", "transformers")


def _switches(module: nn.Module) -> list[tuple[str, str]]:
    return [(name, repr(value)) for name, value in vars(module).items() if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def collected() -> set[str]:
    """Name the outputs of layers that transformers is collecting in this pass."""
    collector = output_capturing._active_collector.get()
    return set(collector or ()) - {"_hidden_states_layers"}


def autocasting(x: Tensor) -> bool:
    """Tell whether torch.autocast chooses dtypes, which our ops do not take part in."""
    kind = x.device.type
    # torch refuses the question for devices that it has no autocast for, such as meta
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
