"""What the kernels of bridge_norm share: masked loads into fp32, and the products of a bridge.

Letters: T tokens, D hidden size, R rank of a low-rank bridge.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton 3.6 takes no bare string as a default
NO_POLICY = tl.constexpr("")


@triton.jit
def load_sum(
    x,
    residual,
    x_stride,
    residual_stride,
    rows,
    columns,
    inside,
    EVICTION: tl.constexpr = NO_POLICY,
):
    """Load x + residual, in fp32."""
    h = load_rows(x, x_stride, rows, columns, inside, EVICTION)
    if residual is not None:
        h += load_rows(residual, residual_stride, rows, columns, inside, EVICTION)
    return h


@triton.jit
def load_rows(at, stride, rows, columns, inside, EVICTION: tl.constexpr = NO_POLICY):
    place = rows[:, None] * stride + columns[None, :]
    values = tl.load(at + place, mask=inside, other=0.0, eviction_policy=EVICTION)
    return values.to(tl.float32)


@triton.jit
def load_columns(at, columns, width, EVICTION: tl.constexpr = NO_POLICY):
    values = tl.load(at + columns, mask=columns < width, other=0.0, eviction_policy=EVICTION)
    return values.to(tl.float32)[None, :]


@triton.jit
def load_scale(scale, columns, width, SCALAR: tl.constexpr, EVICTION: tl.constexpr = NO_POLICY):
    if SCALAR:
        factor = tl.load(scale).to(tl.float32)
    else:
        factor = load_columns(scale, columns, width, EVICTION)
    return factor


@triton.jit
def load_low(at, ranks, columns, rank, width):
    """A chunk of down [R, D], as it is."""
    inside = (ranks < rank)[:, None] & (columns < width)[None, :]
    return tl.load(at + ranks[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_high(at, columns, ranks, rank, width):
    """A chunk of up [D, R], as it is."""
    inside = (columns < width)[:, None] & (ranks < rank)[None, :]
    at = at + columns.to(tl.int64)[:, None] * rank + ranks[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def product(left, right, total, like, UPCAST: tl.constexpr):
    """Total + left @ right, of operands in the element type of `like`."""
    # the interpreter gets bf16 products wrong
    operand = tl.float32 if UPCAST else like.dtype.element_ty
    return tl.dot(left.to(operand), right.to(operand), total, input_precision="ieee")


@triton.jit
def inverse_root(square, eps):
    # a traced program may hand over eps in fp64; the instructions for a root and a quotient that
    # are not told to round are off by some units
    return tl.div_rn(1.0, tl.sqrt_rn((square + eps).to(tl.float32)))


@triton.jit
def mean_of(total, width):
    """A sum over a row of `width` numbers divided by it."""
    return tl.div_rn(total, tl.zeros_like(total) + width)
