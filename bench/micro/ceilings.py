"""What the device can do, measured in the same run: copying, and multiplying matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from interlace.microbenchmarks.timing import Contender, take_turns

if TYPE_CHECKING:
    from interlace.microbenchmarks.timing import Clock, Effort

_COPY_BYTES = {"cuda": 1 << 29, "cpu": 1 << 27}
_SIDE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device and dtype.

    Attributes:
        copy_gb_per_s: bytes read and written by a copy of a large tensor, in 1e9 per second.
        matmul_tflop_per_s: of a square matrix product in the dtype, in 1e12 per second.
        copy_bytes: size of the copied tensor.
        matmul_side: side of the matrices.
    """

    copy_gb_per_s: float
    matmul_tflop_per_s: float
    copy_bytes: int
    matmul_side: int


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, clock: Clock, effort: Effort
) -> Ceilings:
    """Measure both rates, medians over rounds as for everything else."""
    size, side = _COPY_BYTES[device.type], _SIDE[device.type]
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    copy = Contender("copy", False, lambda: target.copy_(source))
    product = Contender("matrix product", False, lambda: left @ right)
    for contender in (copy, product):
        contender.call()
    take_turns((copy, product), clock, effort)
    return Ceilings(
        copy_gb_per_s=2 * size / copy.median / 1e9,
        matmul_tflop_per_s=2 * side**3 / product.median / 1e12,
        copy_bytes=size,
        matmul_side=side,
    )
