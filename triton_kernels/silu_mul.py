"""Kernels of silu_mul and their launchers; interlace/ops/silu_mul.py says what they compute.

Letters: N rows, F elements of a row.

A program takes one block of one row. Programs are counted along the blocks of a row, then along
the rows, so that a row may be as long and rows as many as memory allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from interlace.triton_kernels._overlap import enter, options
from interlace.triton_kernels._variants import UNFUSED, Variant

if TYPE_CHECKING:
    from torch import Tensor

# of bf16 one access of 16 bytes per thread and tensor
_BLOCK = 1024
_WARPS = 4

_LOG2_E = tl.constexpr(1.4426950408889634)
# log(2) in two parts: products of the first with whole numbers up to 128 are exact
_LN_2_HIGH = tl.constexpr(0.693359375)
_LN_2_LOW = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def _place(width, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Row of a program, where its block begins in it, columns from there, and which exist."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    # the compiler drops a mask that is true throughout
    mask = tl.full((BLOCK,), True, tl.int1) if EVEN else column < width - start
    return row, start, column, mask


@triton.jit
def _load(ptr, offset, column, mask):
    return tl.load(ptr + offset + column, mask=mask).to(tl.float32)


@triton.jit
def _store(ptr, value, offset, column, mask):
    tl.store(ptr + offset + column, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _one_plus_exp(x, EXACT: tl.constexpr):
    """1 + exp(x), to a few units in the last place of fp32 if EXACT."""
    if EXACT:
        # the GPU's exponential is one of base 2, and rounding its argument costs 40 units at 80.
        # Split off a power of two; beyond these bounds the sum is 1 or infinite
        x = tl.minimum(tl.maximum(x, -87.0), 89.0)
        power = tl.floor(x * _LOG2_E)
        rest = x - power * _LN_2_HIGH - power * _LN_2_LOW
        # made of its bits; 2^128 is infinite
        scale = ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return 1.0 + tl.exp(rest) * scale
    return 1.0 + tl.exp(x)


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write silu(gate) * up."""
    enter(OVERLAP)
    row, start, column, mask = _place(width, BLOCK, EVEN)
    gate = _load(gate_ptr, row * gate_stride + start, column, mask)
    up = _load(up_ptr, row * up_stride + start, column, mask)
    silu = tl.div_rn(gate, _one_plus_exp(-gate, gate_ptr.dtype.element_ty == tl.float32))
    _store(out_ptr, silu * up, row * width + start, column, mask)


@triton.jit
def backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    dout_stride,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Write the gradients of gate and up."""
    row, start, column, mask = _place(width, BLOCK, EVEN)
    dout = _load(dout_ptr, row * dout_stride + start, column, mask)
    gate = _load(gate_ptr, row * gate_stride + start, column, mask)
    up = _load(up_ptr, row * up_stride + start, column, mask)
    sigmoid = tl.div_rn(1.0, _one_plus_exp(-gate, gate_ptr.dtype.element_ty == tl.float32))
    dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    _store(dgate_ptr, dgate, row * width + start, column, mask)
    _store(dup_ptr, dout * (gate * sigmoid), row * width + start, column, mask)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Run the op on GPU tensors."""
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    gate, up = as_rows(gate, up)
    programs, constants = _blocks(gate)
    with torch.cuda.device_of(gate):
        forward_kernel[(programs,)](
            *(gate, up, out, gate.shape[1], *map(_stride, (gate, up))),
            **constants, **UNFUSED, **options(gate.device), num_warps=_WARPS,
        )  # fmt: skip
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backward op on GPU tensors."""
    dgate, dup = (gate.new_empty(gate.shape) for _ in range(2))
    if dgate.numel() == 0:
        return dgate, dup
    dout, gate, up = as_rows(dout, gate, up)
    programs, constants = _blocks(gate)
    with torch.cuda.device_of(gate):
        backward_kernel[(programs,)](
            *(dout, gate, up, dgate, dup, gate.shape[1], *map(_stride, (dout, gate, up))),
            **constants, **UNFUSED, num_warps=_WARPS,
        )  # fmt: skip
    return dgate, dup


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """See tensors of one shape [..., F] as rows [N, F], copied only where rows lie irregularly.

    Where no tensor has gaps, all of it is one row: fewer blocks are cut short.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)
    return [each if each.stride(1) == 1 else each.contiguous() for each in rows]


def _stride(rows: Tensor) -> int:
    # of one row any would do, and 0 is a multiple of 16
    return rows.stride(0) if len(rows) > 1 else 0


def _blocks(rows: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of programs, and what the kernels are compiled with."""
    num_rows, width = rows.shape
    constants = _constants(width)
    return num_rows * triton.cdiv(width, constants["BLOCK"]), constants


def _constants(width: int) -> dict[str, Any]:
    block = min(_BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": block, "EVEN": width % block == 0}


def variants() -> list[Variant]:
    """Halves of merged projections: a width that blocks divide, and one that they do not."""
    return [
        *(
            _variant(kernel, width, element)
            for kernel in (forward_kernel, backward_kernel)
            for width, element in ((12288, "bf16"), (4304, "bf16"), (12288, "fp32"))
        ),
        _variant(forward_kernel, 12288, "bf16", overlap=True),
    ]


def _variant(kernel: Any, width: int, element: str, *, overlap: bool = False) -> Variant:
    direction = "forward" if kernel is forward_kernel else "backward"
    constants = _constants(width)
    if "OVERLAP" in kernel.arg_names:
        constants["OVERLAP"] = overlap
    names = [name for name in kernel.arg_names if name not in constants]
    expects = ("ld.global.v4", "st.global.v4", *(("griddepcontrol.wait",) if overlap else ()))
    capabilities = (90,) if overlap else (80, 90, 100)
    return Variant(
        f"{direction}, F {width}, {element}{', overlapping' * overlap}",
        kernel,
        types={name: f"*{element}" if name.endswith("_ptr") else "i32" for name in names},
        constants=constants,
        aligned=tuple(names),
        num_warps=_WARPS,
        fp_fusion=False,
        capabilities=capabilities,
        expects=dict.fromkeys(capabilities, expects),
    )
