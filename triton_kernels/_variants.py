"""What a Triton kernel is compiled for, as data: for launching, and for compiling ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# bytes of shared memory that one block may use, by compute capability; what is compiled for 8.0
# runs on GPUs of 8.6, 8.9 and 12.0 too, which have least
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
# for kernels that wait for memory: with every product rounded as torch rounds it, differences that
# are exactly zero there are zero here
UNFUSED = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Every kernel module has a function `variants()` that lists the forms its launcher uses on real
    model shapes. `python -m interlace.triton_kernels.aot` compiles them without a GPU.

    Attributes:
        name: what it is for, such as "causal, head 128, bf16".
        kernel: the `@triton.jit` function.
        types: Triton type of every argument that is not a constant, such as "*bf16" or "i32".
        constants: value of every `tl.constexpr` argument.
        aligned: arguments (pointers, strides, sizes) that are multiples of 16, as the launcher's
            arguments on real shapes are; Triton finds that out by itself when it launches.
        num_warps: warps of a block.
        num_stages: depth of the software pipeline.
        fp_fusion: whether products may be rounded together with a sum.
        capabilities: compute capabilities it is used on, 80, 90 or 100.
        expects: per capability, parts of instructions that its PTX must have, such as
            "wgmma.mma_async".
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
    capabilities: tuple[int, ...] = (80, 90, 100)
    expects: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
