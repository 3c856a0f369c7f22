"""skinny_linear in Triton: a few rows times a weight matrix, bound by reading the weights.

Letters: M rows of x, N rows of the weight, K columns of it, P elements in 16 bytes.

A program owns a few rows of the weight and goes through all of K, and asks for tiles of the weight
a step ahead. Compilers move that to the end of a step, where it takes no registers beside those of
the current tile; then more programs fit on a multiprocessor, and what is on its way is theirs
together. The P elements of one load are summed up within a thread, so threads keep one sum for each
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
# programs up to which all run at once, with registers for long steps: five on each of Hopper's 132
# multiprocessors
_FEW = 660
_EVICTION = {False: "", True: "evict_first"}


@triton.jit
def _tile(rows, first, k, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVICTION: tl.constexpr):
    """Elements first..first + BLOCK_K - 1 of rows [.., .., 1], as [.., .., BLOCK_K]."""
    step = tl.arange(0, BLOCK_K)[None, None, :]
    at = first + step
    if EVEN_K:
        tile = tl.load(rows + at, eviction_policy=EVICTION)
    else:
        # compared with what is left of K, which costs fewer registers than `at < k`
        tile = tl.load(rows + at, mask=step < k - first, other=0.0, eviction_policy=EVICTION)
    return tile


@triton.jit
def _products(tile, values, PACK: tl.constexpr):
    """Weights [1, N, BLOCK_K] and x [M, 1, BLOCK_K]: sums over P neighbours [M, N, BLOCK_K / P]."""
    products = tile.to(tl.float32) * values.to(tl.float32)
    # neighbours are those of one load, so a thread has them all
    shape: tl.constexpr = (
        products.shape[0],
        products.shape[1],
        products.shape[2] // PACK,
        PACK,
    )
    return tl.sum(tl.reshape(products, shape), 3)


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
    weight_rows = weight + (n.to(tl.int64) * weight_stride)[None, :, None]
    tile = _tile(weight_rows, 0, k, BLOCK_K, EVEN_K, EVICTION)
    if bias is not None:
        shift = tl.load(bias + n.to(tl.int64) * bias_stride).to(tl.float32)
    if OVERLAP:
        # nothing but weights is read before, and nothing is written
        gdc_wait()
    m = tl.arange(0, ROWS)
    x_rows = x + (tl.minimum(m, num_rows - 1).to(tl.int64) * x_stride)[:, None, None]

    sums = tl.zeros([ROWS, n.shape[0], BLOCK_K // PACK], tl.float32)
    for first in range(BLOCK_K, k, BLOCK_K):
        following = _tile(weight_rows, first, k, BLOCK_K, EVEN_K, EVICTION)
        values = _tile(x_rows, first - BLOCK_K, k, BLOCK_K, EVEN_K, "")
        sums += _products(tile, values, PACK)
        tile = following
    values = _tile(x_rows, (k - 1) // BLOCK_K * BLOCK_K, k, BLOCK_K, EVEN_K, "")
    sums += _products(tile, values, PACK)

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
    """Choose the sizes for M, N, K, and bytes of an element.

    A step is a multiple of what the threads of all warps take with one load each: then no element
    of x has to go from one thread to another. What hides the latency of memory is bytes asked for
    and not yet there: tiles of all programs of a multiprocessor, 64 KB or so.
    """
    block_n = 2 if gated else 4
    step = 32 * _LOAD // element_size
    num_programs = triton.cdiv(n, 4)
    if rows == 1 and num_programs <= _FEW and k > 4 * step:
        # all of them run at once, and have registers to spare
        return Config(block_n, 8 * step, 4)
    num_warps = 2 if k % (4 * step) and k % (2 * step) == 0 else 4
    return Config(block_n, num_warps * step, num_warps)


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, launch: Config | None = None
) -> Tensor:
    """Run the kernel; arguments as those of the op's reference, and sizes other than the chosen."""
    n, k = weight.shape
    outputs = n // 2 if gated else n
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # a copy of x is made in front of this kernel, which waits for it; one of a weight would not do
    x = x.reshape(-1, k)
    x = x if x.stride(1) == 1 or k == 1 else x.contiguous()
    size = x.element_size()
    sizes = launch or config(len(x), n, k, gated=gated, element_size=size)
    with torch.cuda.device_of(x):
        skinny_linear_kernel[(triton.cdiv(outputs, sizes.block_n),)](
            out,
            x,
            weight,
            bias,
            len(x),
            outputs,
            k,
            x.stride(0),
            weight.stride(0),
            0 if bias is None else bias.stride(0),
            ROWS=triton.next_power_of_2(len(x)),
            GATED=gated,
            EVEN_K=k % sizes.block_k == 0,
            PACK=_LOAD // size,
            BLOCK_N=sizes.block_n,
            BLOCK_K=sizes.block_k,
            EVICTION=_EVICTION[sizes.evict_first],
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
            enable_fp_fusion=True,
            **_overlap.options(x.device),
        )
    return out


def variants() -> list[Variant]:
    """What a token of decoding compiles to in models of 4096 and 2560 dimensions, and more rows."""
    names = {False: "", True: ", overlapping"}
    found = [_variant(f"bf16, 1 row{name}", overlap=overlap) for overlap, name in names.items()]
    found += [
        _variant(f"bf16, 1 row, gated{name}", n=24576, gated=True, overlap=overlap)
        for overlap, name in names.items()
    ]
    found += [
        _variant(f"bf16, 4 rows, bias{name}", rows=4, biased=True, overlap=overlap)
        for overlap, name in names.items()
    ]
    return [
        *found,
        _variant("bf16, 1 row, few outputs", n=2560),
        _variant("bf16, 1 row, few outputs, odd steps", n=2560, k=9728),
        _variant("bf16, 1 row, half steps", k=2560),
        _variant("bf16, 1 row, half steps, gated", n=19456, k=2560, gated=True),
        _variant("bf16, 1 row, odd steps", k=11008),
        _variant("bf16, 2 rows", rows=2),
        _variant("bf16, 2 rows, gated", n=24576, rows=2, gated=True),
        _variant("bf16, 4 rows, gated, bias", n=24576, rows=4, gated=True, biased=True),
        _variant("fp16, 1 row", element="fp16"),
        _variant("fp32, 1 row", element="fp32"),
    ]


def _variant(
    name: str,
    *,
    rows: int = 1,
    n: int = 6144,
    k: int = 4096,
    gated: bool = False,
    biased: bool = False,
    element: str = "bf16",
    overlap: bool = False,
) -> Variant:
    size = 4 if element == "fp32" else 2
    sizes = config(rows, n, k, gated=gated, element_size=size)
    counts = ("outputs", "k", "x_stride", "weight_stride")
    types = dict.fromkeys(("out", "x", "weight"), f"*{element}") | dict.fromkeys(counts, "i32")
    constants = {
        "ROWS": triton.next_power_of_2(rows),
        "GATED": gated,
        "EVEN_K": k % sizes.block_k == 0,
        "PACK": _LOAD // size,
        "BLOCK_N": sizes.block_n,
        "BLOCK_K": sizes.block_k,
        "EVICTION": _EVICTION[sizes.evict_first],
        "OVERLAP": overlap,
        # Triton takes a 1 as a constant by itself, and so do we
        "bias_stride": 1,
    }
    if rows == 1:
        constants["num_rows"] = 1
    else:
        types["num_rows"] = "i32"
    if biased:
        types["bias"] = f"*{element}"
    else:
        constants["bias"] = None
    # 16 bytes of the weight to a thread, and of x, whose loads have no policy
    expects = ["L2::cache_hint.v4.b32", "ld.global.v4.b32"]
    if overlap:
        expects += ["griddepcontrol.launch_dependents", "griddepcontrol.wait"]
    return Variant(
        name,
        skinny_linear_kernel,
        types,
        constants,
        aligned=("out", "x", "weight", *counts),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        capabilities=(90, 100) if overlap else (80, 90, 100),
        expects=dict.fromkeys((80, 90, 100), tuple(expects)),
    )
