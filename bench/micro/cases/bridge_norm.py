"""bridge_norm between two blocks: plain, and with each kind of bridge.

Letters: T tokens, D hidden size, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional

from micro.case import Case, Setup, compiled, installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from micro.shapes import ModelShape, Tower

RANK = 16


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield the plain step for growing numbers of tokens, then the bridges."""
    tower = shape.text
    sizes = _tokens(shape, setup)
    for num_tokens in sizes:
        yield _case(f"plain-t{num_tokens}", tower, setup, num_tokens, None)
    if not setup.quick:
        for bridge in ("diagonal", "lowrank"):
            yield _case(f"{bridge}-t{sizes[0]}", tower, setup, sizes[0], bridge)


def _tokens(shape: ModelShape, setup: Setup) -> tuple[int, ...]:
    if shape.name == "tiny":
        return (48,)
    if setup.is_cuda:
        return (4096, 1) if setup.quick else (4096, 16384, 1024, 32, 1)
    return (64, 1) if setup.quick else (512, 64, 1)


def _case(name: str, tower: Tower, setup: Setup, num_tokens: int, bridge: str | None) -> Case:
    width = tower.hidden
    x, residual = setup.randn(num_tokens, width), setup.randn(num_tokens, width)
    weight = setup.rand(width) + 0.5
    bias = setup.randn(width) if tower.norm == "layer" else None
    scale = setup.rand(width) + 0.5 if bridge == "diagonal" else None
    down = setup.randn(RANK, width) * width**-0.5 if bridge == "lowrank" else None
    up = setup.randn(width, RANK) if bridge == "lowrank" else None
    tensors = (x, residual, weight, bias, scale, down, up)

    def eager() -> tuple[Tensor, Tensor]:
        return step(*tensors, tower.norm_eps, tower.norm)

    baselines: dict[str, Callable[[], Any] | str] = {
        "add + torch norm": eager,
        "torch.compile of it": compiled(step, *tensors, tower.norm_eps, tower.norm),
    }
    if bridge is None and tower.norm == "rms":
        baselines["Liger-Kernel, fused add + RMSNorm"] = _liger(x, residual, weight, tower.norm_eps)
    return Case(
        name,
        args=(x, residual, weight, bias, tower.norm_eps, tower.norm, scale, down, up),
        baselines=baselines,
        backward=True,
    )


def _liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Callable[[], Any] | str:
    missing = installed("liger_kernel")
    if missing is not None or not x.is_cuda:
        return missing or "works on GPU tensors"
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def step(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """What a model without the op does, in the op's order."""
    h = x + residual
    if scale is not None:
        h = h * scale
    if down is not None and up is not None:
        h = h + (h @ down.T) @ up.T
    if norm == "rms":
        return functional.rms_norm(h, weight.shape, weight, eps), h
    return functional.layer_norm(h, weight.shape, weight, bias, eps), h
