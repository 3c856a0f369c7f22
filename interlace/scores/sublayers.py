"""The attention and the feed-forward part of a layer, and running the layer without one of them.

A part is taken out as surgery does it (`interlace.surgery.heads`): its output projections give
zeros, their biases included, and a norm behind the sum with the residual stays. So what is measured
is the student that a plan with this part makes.

Attention includes cross-attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from interlace.models.sites import find_sites
from interlace.models.states import hooked

if TYPE_CHECKING:
    from torch import nn

    from interlace.scores.replay import Change, Forward

Part = Literal["attention", "mlp"]

_KINDS: dict[Part, str] = {"attention": "heads", "mlp": "ffn"}


def _zeros(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def without(layer: nn.Module, part: Part) -> Change | None:
    """Make what runs in the place of a layer: the layer without one of its parts.

    Returns:
        The change, or None where the layer has no place of this kind that is known.
    """
    outputs = [site.output for site in find_sites(layer).values() if site.kind == _KINDS[part]]
    if not outputs:
        return None

    def change(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with hooked(output.register_forward_hook(_zeros) for output in outputs):
            return forward(*args, **kwargs)

    return change
