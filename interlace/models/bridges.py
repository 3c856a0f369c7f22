"""Run-time bridges: modules that change the hidden states at a cut, and where they sit.

A student with them is no standard checkpoint: its manifest lists them, and `open_model` builds them
in. They are submodules of the layer beside the cut and act through its hooks.

    s = scale * h        r = s + up (down s)

where h is what the layer behind the cut would be given, and r what it is given. Where that layer
begins with a norm, `interlace.ops.bridge_norm` gives r and its norm in one pass.

Legend: B batch, T tokens, D width, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.errors import CheckpointError
from interlace.models.states import layer_input, layer_output, replaced
from interlace.ops import bridge_norm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from interlace.records import Bridge

DIAGONAL, LOWRANK = "diagonal", "lowrank"
INPUT, OUTPUT = "input", "output"


class RunTimeBridge(nn.Module):
    """A diagonal or low-rank map of the residual stream; begins as the identity.

    Attributes:
        scale: one factor per channel [D]; None in a low-rank bridge.
        down: into R dimensions [R, D]; None in a diagonal bridge.
        up: and back [D, R]; None in a diagonal bridge.
    """

    def __init__(self, width: int, rank: int | None, dtype: torch.dtype) -> None:
        """Make the parameters.

        Args:
            width: D.
            rank: R of a low-rank bridge; None makes a diagonal one.
            dtype: of the parameters.
        """
        super().__init__()
        self.scale: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if rank is None:
            self.scale = nn.Parameter(torch.ones(width, dtype=dtype))
        else:
            self.down = nn.Parameter(torch.zeros(rank, width, dtype=dtype))
            self.up = nn.Parameter(torch.zeros(width, rank, dtype=dtype))
        # in a tuple, so that the norm stays the layer's own submodule
        self._norm: tuple[nn.Module, str] | None = None
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def _parts(self, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        # healing trains them in fp32 beside activations of another dtype
        parts = {"scale": self.scale, "down": self.down, "up": self.up}
        return {name: None if part is None else part.to(dtype) for name, part in parts.items()}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Cross the bridge: [..., D] -> [..., D]."""
        parts = self._parts(hidden.dtype)
        scale, down, up = parts["scale"], parts["down"], parts["up"]
        if scale is not None:
            hidden = hidden * scale
        if down is not None and up is not None:
            hidden = hidden + (hidden @ down.T) @ up.T
        return hidden

    def join(self, norm: nn.Module, kind: str) -> None:
        """Compute a norm together with the bridge; the norm then hands on what was computed.

        Args:
            norm: the norm that the layer behind the bridge applies to its input.
            kind: "rms" or "layer".
        """
        self._norm = (norm, kind)
        joined: Any = norm
        joined.forward = self._hand_on

    def _hand_on(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._ready is not None and hidden is self._ready[0]:
            normed, self._ready = self._ready[1], None
            return normed
        joined: Any = self._norm
        plain: torch.Tensor = type(joined[0]).forward(joined[0], hidden)
        return plain

    def _cross(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        # when its activations are recomputed, a layer runs again without its hooks, so its norm
        # has to be its own both times
        recomputed = layer.training and getattr(layer, "gradient_checkpointing", False)
        if self._norm is None or recomputed:
            crossed: torch.Tensor = self(hidden)
            return crossed
        norm, kind = self._norm
        parts: dict[str, Any] = self._parts(hidden.dtype)
        normed, crossed = bridge_norm(
            hidden, None, **norm_arguments(norm, kind, hidden.dtype), **parts
        )
        self._ready = (crossed, normed)
        return crossed

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the layer behind the cut."""
        hidden = layer_input(args, kwargs, type(layer).__name__)
        return replaced(args, kwargs, hidden, self._cross(layer, hidden))

    def after(self, layer: nn.Module, _: Any, output: Any) -> Any:
        """Forward hook of the layer before the cut."""
        crossed = self(layer_output(output, type(layer).__name__))
        if isinstance(output, torch.Tensor):
            return crossed
        return type(output)((crossed, *output[1:]))


def norm_arguments(norm: Any, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `bridge_norm` needs to know of a norm module, beside activations of a dtype."""

    def fitting(parameter: torch.Tensor | None) -> torch.Tensor | None:
        if parameter is None or parameter.dtype in (dtype, torch.float32):
            return parameter
        return parameter.to(dtype)

    eps = getattr(norm, "eps", None)
    return {
        "weight": fitting(norm.weight),
        "bias": fitting(getattr(norm, "bias", None)),
        "eps": norm.variance_epsilon if eps is None else eps,
        "kind": kind,
    }


def run_time(bridges: Iterable[Bridge]) -> tuple[Bridge, ...]:
    """Return those of the bridges that are modules and not weights of the model."""
    return tuple(bridge for bridge in bridges if bridge.kind in (DIAGONAL, LOWRANK))


def attach(model: nn.Module, settings: Mapping[str, Any], dtype: torch.dtype) -> RunTimeBridge:
    """Build a run-time bridge into a model.

    Args:
        model: changed in place.
        settings: of the bridge's record: "module" (path of the layer), "side" ("input" or
            "output"), "width", "rank" (None for a diagonal one), "norm" (path of the norm in the
            layer that is computed along, or None) and "norm_kind".
        dtype: of its parameters.

    Raises:
        CheckpointError: the model has no such place.
    """
    try:
        layer = model.get_submodule(settings["module"])
        norm = layer.get_submodule(settings["norm"]) if settings["norm"] else None
    except (AttributeError, KeyError) as error:
        raise CheckpointError(
            f"The manifest names a run-time bridge at {settings.get('module')!r}, but "
            f"{type(model).__name__} has no such place ({error}). The manifest and the weights are "
            "not of the same checkpoint."
        ) from error
    # first of all hooks: transformers collects hidden states by hooks that it sets at the first run
    bridge = RunTimeBridge(settings["width"], settings["rank"], dtype)
    layer.add_module(f"bridge_{settings['side']}", bridge)
    if settings["side"] == INPUT:
        layer.register_forward_pre_hook(bridge.before, prepend=True, with_kwargs=True)
        if norm is not None:
            bridge.join(norm, settings["norm_kind"])
    else:
        layer.register_forward_hook(bridge.after, prepend=True)
    return bridge


def bridged_class(model_class: Any, bridges: Iterable[Bridge]) -> Any:
    """Return a class of the same name whose models are built with run-time bridges.

    So their weights are read, and missing ones noticed, as those of any other module.
    """
    places = [bridge.settings for bridge in run_time(bridges)]
    if not places:
        return model_class

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for settings in places:
            attach(self, settings, torch.get_default_dtype())

    # transformers renames weights of its own classes only, which it knows by their module
    names = {"__init__": build, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), names)
