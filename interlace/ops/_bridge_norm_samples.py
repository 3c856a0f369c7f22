"""What bridge_norm is tested with.

Letters: T tokens, D hidden size, R rank of a low-rank bridge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interlace.ops import _bridge_norm_reference as meaning
from interlace.ops._registry import OpSample


@dataclass
class _Draw:
    """Makes arguments of the forward op on a device, in a dtype."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *size: int, factor: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*size, generator=self.generator) * factor
        return values.to(self.device, dtype or self.dtype)

    def args(
        self,
        tokens: int,
        width: int,
        *,
        kind: str = "rms",
        residual: bool = True,
        bias: bool = False,
        scale: int = 0,
        rank: int = 0,
        factor: float = 1.0,
        eps: float = 1e-6,
        wide: bool = False,
    ) -> tuple[Any, ...]:
        """Arguments; scale has as many elements as asked for, wide parameters are fp32 or more."""
        wider = torch.promote_types(self.dtype, torch.float32) if wide else self.dtype
        around_one = 1 + self.normal(3, width, factor=0.2, dtype=torch.float32)
        weight, scales, biases = around_one.to(wider).unbind(0)
        return (
            self.normal(tokens, width, factor=factor),
            self.normal(tokens, width, factor=factor) if residual else None,
            weight,
            biases - 1 if bias else None,
            eps,
            kind,
            scales[:scale].clone() if scale else None,
            self.normal(rank, width, factor=width**-0.5) if rank else None,
            self.normal(width, rank, factor=rank**-0.5) if rank else None,
        )


def forward(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Every bridge with every norm; odd sizes, nothing, one; strides, magnitudes, NaN."""
    draw = _Draw(device, dtype, torch.Generator().manual_seed(0))

    def strided(*args: Any) -> tuple[Any, ...]:
        x, residual, *others = args
        spread = torch.zeros(2 * len(x), x.shape[1] + 16, dtype=dtype, device=device)
        spread[::2, 8:-8] = x
        return (spread[::2, 8:-8], residual.mT.contiguous().mT, *others)

    broken = draw.args(6, 40, scale=1)
    broken[0][1, 3], broken[0][4, 39] = float("nan"), float("inf")
    broken_layer = draw.args(5, 72, kind="layer", bias=True)
    broken_layer[1][2, 71] = float("-inf")
    offset = draw.args(7, 96, kind="layer", bias=True, wide=True)
    offset[1].add_(100)
    tied = draw.args(5, 24)
    found = {
        "plain": draw.args(5, 48),
        "layer": draw.args(6, 136, kind="layer", bias=True, eps=1e-5),
        "layer_without_bias": draw.args(3, 64, kind="layer"),
        "no_residual": draw.args(9, 80, residual=False),
        "alone_scaled": draw.args(4, 24, residual=False, scale=24),
        "odd": draw.args(13, 259, bias=True, wide=True),
        "scalar": draw.args(11, 128, scale=1, wide=True),
        "diagonal": draw.args(7, 200, scale=200),
        "diagonal_layer_odd": draw.args(10, 37, kind="layer", bias=True, scale=37, wide=True),
        "low_rank": draw.args(21, 144, rank=8),
        "low_rank_layer": draw.args(33, 104, kind="layer", bias=True, rank=17, wide=True),
        "low_rank_scaled": draw.args(18, 300, rank=5, scale=300),
        "low_rank_scalar_alone": draw.args(5, 130, rank=1, scale=1, residual=False),
        "long": draw.args(150, 16, scale=16, kind="layer", bias=True),
        "wide": draw.args(3, 1500, wide=True),
        "strided": strided(*draw.args(6, 56)),
        "strided_low_rank": strided(*draw.args(6, 72, rank=3, scale=1)),
        "one": draw.args(1, 1),
        "one_layer": draw.args(1, 1, kind="layer", bias=True, scale=1),
        "narrow": draw.args(5, 1, scale=1),
        "small": draw.args(3, 6, kind="layer", bias=True, scale=6, rank=2),
        "no_token": draw.args(0, 32, scale=32),
        "no_token_low_rank": draw.args(0, 32, rank=4),
        "zeros": draw.args(3, 16, factor=0.0, eps=1e-5),
        "off_centre": offset,
        "same_tensor_twice": (tied[0], tied[0], *tied[2:]),
        "not_finite": broken,
        "not_finite_layer": broken_layer,
        "huge": draw.args(4, 64, factor=5e3, wide=True),
        "huge_layer": draw.args(4, 64, factor=5e3, kind="layer", bias=True, scale=1),
        "tiny": draw.args(4, 64, factor=1e-5, eps=1e-12, wide=True),
        "tiny_beside_eps": draw.args(4, 64, factor=1e-6, eps=1e-5),
    }
    return [OpSample(name, args) for name, args in found.items()]


def backward(
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]],
) -> list[OpSample]:
    """The samples of the forward op with gradients, of which some are expanded or strided."""
    draw = _Draw(device, dtype, torch.Generator().manual_seed(1))
    found = []
    for sample in forward(device, dtype):
        x = sample.args[0]
        # what is tiny has gradients beyond the range of fp16
        factor = 1e-4 if sample.name.startswith("tiny") else 1.0
        grads = [draw.normal(*x.shape, factor=factor), draw.normal(*x.shape)]
        if sample.name == "no_residual":
            # what comes from a sum over tokens and channels
            grads[0] = draw.normal(1, 1).expand(x.shape)
        if sample.name.startswith("strided"):
            grads[1] = grads[1].mT.contiguous().mT
        results = meaning.reference(*sample.args)
        scale = sample.args[6]
        if scale is not None and scale.numel() == 1:
            # along the output, so that the gradient of a factor is no sum of numbers that cancel
            grads[1] = grads[1] + 4 * results[1]
        kept = keep(results, sample.args)
        found.append(OpSample(sample.name, (*grads, *kept)))
    return found
