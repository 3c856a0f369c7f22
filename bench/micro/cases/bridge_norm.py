"""bridge_norm on the residual stream of a model, for prompts and for steps of decoding.

Letters: T tokens, D hidden size, R rank of a low-rank bridge.

The baselines add, bridge and normalise as a transformer does, with a rounding after each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional

from interlace.microbenchmarks.case import Case, Setup, compiled, installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape

RANK = 32
WIDTHS = (1024, 2048, 8192, 16384)


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield the text tower without a bridge and with each, the vision tower, and other widths."""
    text, vision = shape.text, shape.vision
    tokens = _tokens(shape, setup)
    for num_tokens in tokens:
        yield _case(setup, text.norm, text.norm_eps, num_tokens, text.hidden)
    for bridge in ("diagonal", "low-rank") if setup.quick else ("diagonal", "scalar", "low-rank"):
        yield _case(setup, text.norm, text.norm_eps, tokens[0], text.hidden, bridge)
    if setup.quick or shape.name == "tiny":
        return
    yield _case(setup, vision.norm, vision.norm_eps, tokens[0], vision.hidden)
    for bridge in ("diagonal", "low-rank"):
        for num_tokens in (16, 1):
            yield _case(setup, text.norm, text.norm_eps, num_tokens, text.hidden, bridge)
    for width in WIDTHS if setup.is_cuda else ():
        yield _case(setup, text.norm, text.norm_eps, tokens[0], width)


def _tokens(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    if shape.name == "tiny":
        return (64, 1)
    if setup.is_cuda:
        return (4096, 1) if setup.quick else (4096, 16384, 1, 16, 256, 1024)
    return (256, 1) if setup.quick else (512, 64, 16, 1)


def _case(
    setup: Setup, kind: str, eps: float, num_tokens: int, width: int, bridge: str = "none"
) -> Case:
    x, residual = (setup.randn(num_tokens, width) for _ in range(2))
    weight, factors = ((1 + 0.1 * setup.randn(width)) for _ in range(2))
    bias = setup.randn(width) if kind == "layer" else None
    scale = {"diagonal": factors, "scalar": factors[:1].clone()}.get(bridge)
    down = up = None
    if bridge == "low-rank":
        down, up = setup.randn(RANK, width) / width**0.5, setup.randn(width, RANK) / RANK**0.5
    args = (x, residual, weight, bias, eps, kind, scale, down, up)
    name = bridge if bridge != "low-rank" else f"low-rank{RANK}"
    return Case(
        f"{kind}-d{width}-{name}-t{num_tokens}",
        args=args,
        baselines=_baselines(*args),
        # below, a step is all overhead, and nobody trains with it
        backward=num_tokens >= 64,
    )


def _baselines(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> dict[str, Callable[[], object] | str]:
    bridge = (x, residual, scale, down, up)

    def layer(x: Tensor, residual: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        h = crossed(x, residual, *others)
        return functional.layer_norm(h, h.shape[-1:], weight, bias, eps), h

    def rms(x: Tensor, residual: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        h = crossed(x, residual, *others)
        return functional.rms_norm(h, h.shape[-1:], weight, eps), h

    def eager(x: Tensor, residual: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        h = crossed(x, residual, *others)
        wide = h.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(h.dtype), h

    if kind == "layer":
        return {
            "add, F.layer_norm": lambda: layer(*bridge),
            "torch.compile of add, F.layer_norm": compiled(layer, *bridge),
        }
    made: dict[str, Callable[[], object] | str] = {
        "transformers": lambda: eager(*bridge),
        "torch.compile of transformers": compiled(eager, *bridge),
        "add, F.rms_norm": lambda: rms(*bridge),
        "torch.compile of add, F.rms_norm": compiled(rms, *bridge),
    }
    if scale is None and down is None:
        made["Liger-Kernel fused add, RMSNorm"] = _liger(x, residual, weight, eps)
    return made


def crossed(
    x: Tensor, residual: Tensor, scale: Tensor | None, down: Tensor | None, up: Tensor | None
) -> Tensor:
    """The residual stream behind the bridge, in modules of their own."""
    h = x + residual
    if scale is not None:
        h = h * scale
    if down is not None and up is not None:
        h = h + functional.linear(functional.linear(h, down), up)
    return h


def _liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Callable[[], object] | str:
    if not x.is_cuda:
        return "works on GPU tensors"
    missing = installed("liger_kernel")
    if missing:
        return missing
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    # not in place: a gradient that is timed again and again must stay as it is
    return lambda: liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)
