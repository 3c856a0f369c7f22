"""Launches the kernels of qk_norm_rope: queries and keys together, forward and backward."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import triton

from interlace.triton_kernels._overlap import options
from interlace.triton_kernels._qk_norm_rope import (
    PROGRAMS,
    add_partials_kernel,
    backward_kernel,
    forward_kernel,
)
from interlace.triton_kernels._variants import UNFUSED, Variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# elements of a tile: per thread four 16-byte accesses of bf16; half of it in the backward, which
# holds x, its gradient and the sums of the weight's gradient
_FORWARD_TILE = 4096
_BACKWARD_TILE = 2048
_MOST_ROWS = 64
_WARPS = 4
# enough blocks of the backward to fill a multiprocessor
_PROGRAMS_PER_MULTIPROCESSOR = 4
# few, so that every program of the interpreter takes several tiles
_PROGRAMS_WITHOUT_GPU = 3
_REDUCED_ROWS = 128
_REDUCED_COLUMNS = 16


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    sections: Sequence[int] | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Run the op on GPU tensors."""
    q, k = _elements_together(q), _elements_together(k)
    cos, sin = _tables_alike(cos, sin)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    num_tokens = math.prod(q.shape[:-2])
    tiling = _tiling(q, k, cos, q_weight, k_weight, _FORWARD_TILE)
    q_tile, k_tile = tiling["Q_TILE"], tiling["K_TILE"]
    group = max(q_tile[1], k_tile[1])
    parts = group // q_tile[1] * q_tile[3] + group // k_tile[1] * k_tile[3]
    programs = triton.cdiv(num_tokens, group) * parts
    if programs == 0:
        return q_out, k_out
    strides = (*_strides(q), *_strides(k))
    table_strides = _table_strides(cos, sections)
    with _on(q.device):
        forward_kernel[(programs,)](
            q,
            k,
            cos,
            sin,
            _or_any(q_weight, q),
            _or_any(k_weight, q),
            q_out,
            k_out,
            num_tokens,
            q.shape[-3],
            q.shape[-2],
            k.shape[-2],
            *strides,
            *table_strides,
            eps,
            **tiling,
            LAYOUT=_layout(sections, interleaved),
            ALIGN=_align(strides, table_strides),
            num_warps=_WARPS,
            **UNFUSED,
            **options(q.device),
        )
    return q_out, k_out


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    sections: Sequence[int] | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward op on GPU tensors."""
    dq_out, dk_out, q, k = (_elements_together(each) for each in (dq_out, dk_out, q, k))
    cos, sin = _tables_alike(cos, sin)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_weight, dk_weight = (
        q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for weight in (q_weight, k_weight)
    )
    num_tokens = math.prod(q.shape[:-2])
    tiling = _tiling(q, k, cos, q_weight, k_weight, _BACKWARD_TILE)
    q_programs, k_programs = _programs(num_tokens, tiling, q.device)
    partials = q.new_empty((q_programs + k_programs, q.shape[-1]), dtype=torch.float32)
    strides = (*_strides(dq_out), *_strides(dk_out), *_strides(q), *_strides(k))
    table_strides = _table_strides(cos, sections)
    with _on(q.device):
        if q_programs + k_programs > 0:
            backward_kernel[(q_programs + k_programs,)](
                dq_out,
                dk_out,
                q,
                k,
                cos,
                sin,
                _or_any(q_weight, q),
                _or_any(k_weight, q),
                dq,
                dk,
                partials,
                q_programs,
                k_programs,
                num_tokens,
                q.shape[-3],
                q.shape[-2],
                k.shape[-2],
                *strides,
                *table_strides,
                eps,
                **tiling,
                LAYOUT=_layout(sections, interleaved),
                ALIGN=_align(strides, table_strides),
                num_warps=_WARPS,
                **UNFUSED,
            )
        if q_weight is not None or k_weight is not None:
            add_partials_kernel[(2 * triton.cdiv(q.shape[-1], _REDUCED_COLUMNS),)](
                partials,
                dq_weight,
                dk_weight,
                q_programs,
                k_programs,
                D=q.shape[-1],
                Q_NORM=q_weight is not None,
                K_NORM=k_weight is not None,
                ROWS=_REDUCED_ROWS,
                COLUMNS=_REDUCED_COLUMNS,
                num_warps=_WARPS,
            )
    return dq, dk, dq_weight, dk_weight


def _tiling(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    elements: int,
) -> dict[str, tuple[int, ...]]:
    norms = (q_weight is not None, k_weight is not None)
    return _tiling_of(norms, (q.shape[-2], k.shape[-2]), q.shape[-1], cos.shape[-1], elements)


@functools.cache
def _tiling_of(
    norms: tuple[bool, bool], num_heads: tuple[int, int], width: int, half: int, elements: int
) -> dict[str, tuple[int, ...]]:
    """Compile-time constants of a tile of about so many elements."""
    rest = width - 2 * half
    block, rest_block = triton.next_power_of_2(half), triton.next_power_of_2(rest) if rest else 0
    most = max(1, elements // (2 * block + rest_block))
    # the largest power of two within it
    rows = min(_MOST_ROWS, 1 << (most.bit_length() - 1))
    q_tile, k_tile = (
        (norm, *_tile_of(count, rows)) for norm, count in zip(norms, num_heads, strict=True)
    )
    return {"Q_TILE": q_tile, "K_TILE": k_tile, "SHAPE": (width, half, block, rest_block)}


def _tile_of(num_heads: int, rows: int) -> tuple[int, int, int]:
    """Tokens and heads of a tile, and tiles per token: little padding, then many heads."""
    # kernels divide by the tiles per token, so heads that are not there have one, of nothing
    num_heads = max(1, num_heads)
    if num_heads <= 8:
        heads = min(rows, triton.next_power_of_2(num_heads))
    else:
        # no less than 8 heads share a table
        choices = [heads for heads in (8, 16, 32, 64) if heads <= rows] or [rows]
        heads = min(choices, key=lambda heads: (triton.cdiv(num_heads, heads) * heads, -heads))
    return rows // heads, heads, triton.cdiv(num_heads, heads)


def _programs(
    num_tokens: int, tiling: dict[str, tuple[int, ...]], device: torch.device
) -> tuple[int, int]:
    """Programs of the backward that walk over queries and over keys, shared out by tiles."""
    tiles = [triton.cdiv(num_tokens, t[1]) * t[3] for t in (tiling["Q_TILE"], tiling["K_TILE"])]
    most = _PROGRAMS_WITHOUT_GPU
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        most = _PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
    q_programs, k_programs = (
        min(each, max(1, round(most * each / max(1, sum(tiles))))) for each in tiles
    )
    return q_programs, k_programs


def _strides(x: Tensor) -> tuple[int, int, int]:
    batch, token, head = (0, *x.stride())[-4:-1]
    return batch, token, head


def _table_strides(table: Tensor, sections: Sequence[int] | None) -> tuple[int, int, int]:
    shape, strides = table.shape[:-1], table.stride()[:-1]
    axis = 0
    if sections is not None:
        axis, shape, strides = strides[0], shape[1:], strides[1:]
    # without a batch, or with a batch of one, every sample reads the same rows
    batch = strides[0] if len(shape) == 2 and shape[0] > 1 else 0
    return axis, batch, strides[-1]


def _layout(sections: Sequence[int] | None, interleaved: bool) -> tuple[Any, ...]:
    if sections is None:
        return ("one axis", 0, 0, 0)
    return ("interleaved" if interleaved else "chunked", *sections)


def _align(strides: Sequence[int], table_strides: Sequence[int]) -> tuple[int, int]:
    return math.gcd(16, *strides), math.gcd(16, *table_strides[1:])


def _elements_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables_alike(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if cos.stride(-1) == 1 and cos.stride() == sin.stride():
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def _or_any(weight: Tensor | None, other: Tensor) -> Tensor:
    # a pointer that nothing is read from
    return other if weight is None else weight.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launch on a device other than the current one; costs nothing where they are the same."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def variants() -> list[Variant]:
    """The forms used on the heads of real models."""
    one, axes = _layout(None, True), _layout((24, 20, 20), True)
    vectors, halves = ("ld.global.v4", "st.global.v4"), ("ld.global.v2", "st.global.v2")
    hopper = (90,)
    forms: tuple[tuple[Any, ...], ...] = (
        ("one axis", (32, 8), 128, 64, True, one, vectors),
        ("three axes", (32, 8), 128, 64, True, axes, vectors),
        ("no norm", (32, 32), 128, 64, False, one, vectors, hopper),
        ("partial", (32, 8), 128, 32, True, one, vectors, hopper),
        ("one axis", (32, 8), 80, 40, True, one, vectors, hopper),
        ("one axis", (20, 5), 64, 32, True, one, vectors, hopper),
        # its halves begin at multiples of 8 bytes
        ("no norm", (16, 16), 72, 36, False, one, halves, hopper),
        ("fp32", (32, 8), 128, 64, True, one, vectors, hopper, "fp32"),
    )
    return [
        *(_variant(forward_kernel, *form) for form in forms),
        *(_variant(backward_kernel, *form) for form in forms),
        Variant(
            name="sums of the weights' gradients, head 128",
            kernel=add_partials_kernel,
            types={
                "partial_ptr": "*fp32",
                "dq_weight_ptr": "*bf16",
                "dk_weight_ptr": "*bf16",
                **dict.fromkeys(PROGRAMS, "i32"),
            },
            constants={
                "D": 128,
                "Q_NORM": True,
                "K_NORM": True,
                "ROWS": _REDUCED_ROWS,
                "COLUMNS": _REDUCED_COLUMNS,
            },
            aligned=("partial_ptr", "dq_weight_ptr", "dk_weight_ptr"),
            num_warps=_WARPS,
        ),
    ]


def _variant(
    kernel: Any,
    what: str,
    num_heads: tuple[int, int],
    width: int,
    half: int,
    norm: bool,
    layout: tuple[Any, ...],
    expects: tuple[str, ...],
    capabilities: tuple[int, ...] = (80, 90, 100),
    dtype: str = "bf16",
) -> Variant:
    """A kernel on packed heads: strides are multiples of D, those of the tables of F."""
    is_forward = kernel is forward_kernel
    tile = _FORWARD_TILE if is_forward else _BACKWARD_TILE
    align = (math.gcd(16, width), math.gcd(16, half))
    constants = _tiling_of((norm, norm), num_heads, width, half, tile)
    constants = {**constants, "LAYOUT": layout, "ALIGN": align}
    if is_forward:
        constants["OVERLAP"] = False
    types = {}
    for name in kernel.arg_names:
        if name in ("cos_ptr", "sin_ptr", "partial_ptr"):
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype}"
        elif name not in constants:
            types[name] = "fp32" if name == "eps" else "i32"
    table_strides = ("axis_stride", "table_batch_stride", "table_token_stride")
    aligned = [name for name in types if name.endswith("_ptr")]
    aligned += [name for name in table_strides if align[1] == 16]
    aligned += [
        name
        for name in types
        if name.endswith("_stride") and name not in table_strides and align[0] == 16
    ]
    direction = "forward" if is_forward else "backward"
    return Variant(
        name=f"{direction}, {what}, {num_heads[0]} + {num_heads[1]} heads of {width}",
        kernel=kernel,
        types=types,
        constants=constants,
        aligned=tuple(aligned),
        num_warps=_WARPS,
        fp_fusion=False,
        capabilities=capabilities,
        expects=dict.fromkeys(capabilities, expects),
    )
