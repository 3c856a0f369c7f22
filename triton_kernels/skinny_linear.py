"""skinny_linear in Triton: a few rows times a weight matrix, bound by reading the weights.

Letters: M rows of x, N rows of the weight, K columns of it, P elements in 16 bytes.

A program owns a few rows of the weight and goes through all of K; the next tile of the weight is on
its way, in registers, while the current one is worked on. Tiles are [M, N, K / P, P], and the
last axis, the 16 bytes of one load, is summed up within a thread. So threads keep one sum for each
pair of rows, and only the end of a program adds up over threads.

Weights do not change while decoding: the first tile is asked for before the kernel waits for those
before it (`interlace/ops/_overlap.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from interlace.triton_kernels import _overlap
from interlace.triton_kernels._variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

# bytes of one load of a thread
_LOAD = 16


@triton.jit
def _tile(
    rows,
    first,
    k,
    PACK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Elements first..first + BLOCK_K - 1 of rows [.., .., 1, 1], as [.., .., BLOCK_K / P, P]."""
    packs = tl.arange(0, BLOCK_K // PACK)[None, None, :, None]
    at = first + packs * PACK + tl.arange(0, PACK)[None, None, None, :]
    if EVEN_K:
        tile = tl.load(rows + at, eviction_policy=EVICTION)
    else:
        tile = tl.load(rows + at, mask=at < k, other=0.0, eviction_policy=EVICTION)
    return tile


@triton.jit
def skinny_linear_kernel(
    # [M, outputs]
    out,
    # [M, K], rows x_stride apart
    x,
    # [N, K], rows weight_stride apart
    weight,
    # [N], elements bias_stride apart, or None
    bias,
    num_rows,
    outputs,
    k,
    x_stride,
    weight_stride,
    bias_stride,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVICTION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_N outputs of every row; with a gate, from twice as many rows of the weight."""
    if OVERLAP:
        gdc_launch_dependents()
    first_output = tl.program_id(0) * BLOCK_N
    if GATED:
        # a row of the gate and its row of the up projection side by side
        pair = tl.arange(0, 2 * BLOCK_N)
        n = tl.minimum(first_output + pair // 2, outputs - 1) + pair % 2 * outputs
    else:
        n = tl.minimum(first_output + tl.arange(0, BLOCK_N), outputs - 1)
    # rows beyond the last are the last once more: they cost no mask, and are not stored
    weight_rows = weight + (n.to(tl.int64) * weight_stride)[None, :, None, None]
    tile = _tile(weight_rows, 0, k, PACK, BLOCK_K, EVEN_K, EVICTION)
    if bias is not None:
        shift = tl.load(bias + n.to(tl.int64) * bias_stride).to(tl.float32)
    if OVERLAP:
        # nothing but weights is read before, and nothing is written
        gdc_wait()
    m = tl.arange(0, ROWS)
    x_rows = x + (tl.minimum(m, num_rows - 1).to(tl.int64) * x_stride)[:, None, None, None]

    sums = tl.zeros([ROWS, n.shape[0], BLOCK_K // PACK], tl.float32)
    for first in range(BLOCK_K, k, BLOCK_K):
        following = _tile(weight_rows, first, k, PACK, BLOCK_K, EVEN_K, EVICTION)
        values = _tile(x_rows, first - BLOCK_K, k, PACK, BLOCK_K, EVEN_K, "")
        sums += tl.sum(tile.to(tl.float32) * values.to(tl.float32), 3)
        tile = following
    values = _tile(x_rows, (k - 1) // BLOCK_K * BLOCK_K, k, PACK, BLOCK_K, EVEN_K, "")
    sums += tl.sum(tile.to(tl.float32) * values.to(tl.float32), 3)

    result = tl.sum(sums, 2)
    if bias is not None:
        result += shift[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(result, (ROWS, BLOCK_N, 2)))
        result = gate / (1.0 + tl.exp(-gate)) * up
    output = first_output + tl.arange(0, BLOCK_N)
    tl.store(
        out + m[:, None] * outputs + output[None, :],
        result.to(out.dtype.element_ty),
        mask=(m < num_rows)[:, None] & (output < outputs)[None, :],
    )


@dataclass(frozen=True)
class Config:
    """Sizes of a program.

    Attributes:
        block_n: outputs; with a gate, each takes two rows of the weight.
        block_k: elements of a row in one step.
        num_warps: warps.
        num_stages: depth of the compiler's software pipeline; the kernel has its own.
        evict_first: weights make room in the L2 cache first.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    evict_first: bool = True


def config(rows: int, n: int, k: int, *, gated: bool, element_size: int) -> Config:
    """Choose the sizes for M, N, K, and bytes of an element."""
    return Config(2 if gated else 4, 2048 // element_size, 4)
