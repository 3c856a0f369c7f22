"""Launches the kernels of bridge_norm; interlace/ops/bridge_norm.py says what they compute.

Letters: T tokens, D hidden size, R rank of a low-rank bridge.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton

from interlace.triton_kernels._bridge_norm_rows import backward_rows, forward_rows, sum_partials
from interlace.triton_kernels._bridge_norm_tiles import (
    backward_columns,
    backward_sums,
    forward_tiles,
)
from interlace.triton_kernels._variants import UNFUSED, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# D rounded up to a power of two -> rows and warps of a program: 16 elements of a tensor per thread
# where that makes no more than 8 warps, so that several programs share a multiprocessor
FORWARD_ROWS = {
    **dict.fromkeys((16, 32, 64, 128, 256), (8, 4)),
    512: (4, 4),
    1024: (2, 4),
    2048: (1, 4),
    4096: (1, 8),
    8192: (1, 16),
    16384: (1, 32),
}
# D rounded up -> rows, warps, stages of the loop over rows (1 fetches nothing ahead, and reads
# again instead of keeping in registers), most parameter gradients that registers have room for
BACKWARD_ROWS = {
    **dict.fromkeys((16, 32, 64, 128, 256), (8, 4, 3, 3)),
    512: (8, 8, 3, 3),
    1024: (4, 8, 3, 3),
    2048: (2, 8, 3, 3),
    4096: (1, 8, 3, 3),
    8192: (1, 16, 1, 2),
    16384: (1, 16, 1, 1),
}
MAX_BACKWARD_ROW_BYTES = 32768
# bytes of the next rows of one tensor up to which those of four tensors are on their way twice: in
# 99 KB of shared memory
MAX_TWICE = 8192
# sort of tile (see `sort_of_tile`) -> rows, columns, warps, stages
FORWARD_TILES = {
    "long rows": (4, 1024, 4, 2),
    "R 16": (16, 128, 4, 3),
    "R 32": (32, 64, 8, 3),
    "R 64": (32, 64, 8, 3),
    "fp32": (16, 32, 4, 1),
}
SUM_TILES = {
    "long rows": (4, 1024, 4, 2),
    "R 16": (32, 64, 8, 2),
    "R 32": (32, 64, 8, 2),
    "R 64": (32, 64, 8, 2),
    "fp32": (16, 32, 8, 1),
}
COLUMN_TILES = {
    "long rows": (16, 128, 4, 2),
    "R 16": (32, 64, 8, 2),
    "R 32": (16, 64, 8, 1),
    "R 64": (16, 32, 4, 1),
    "fp32": (16, 16, 8, 1),
}
# programs per multiprocessor of the backward kernels that add up, as registers allow
ROW_PROGRAMS, COLUMN_PROGRAMS = 2, 4
# of the last sum over programs: parts and columns at a time
SUM = {"PARTS": 16, "COLUMNS": 64}
SUM_WARPS = 4


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward op; arguments and results are those of its reference."""
    num_rows, width = x.shape
    x, residual = side_by_side(x), side_by_side(residual)
    weight, bias, scale, down, up = map(contiguous, (weight, bias, scale, down, up))
    normed, new_residual = (x.new_empty(x.shape) for _ in range(2))
    rstd, mean = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    outputs = (normed, new_residual, rstd, mean)
    if num_rows == 0:
        return outputs
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    options = {"LAYER": kind == "layer", "SCALAR": is_scalar(scale)}
    padded = padded_width(width)
    with torch.cuda.device_of(x):
        if down is None and padded in FORWARD_ROWS:
            rows, warps = FORWARD_ROWS[padded]
            forward_rows[(triton.cdiv(num_rows, rows),)](
                *(x, residual, weight, bias, scale, *outputs, *strides, num_rows, width, eps),
                **options, **UNFUSED, ROWS=rows, WIDTH=padded, num_warps=warps,
            )  # fmt: skip
        else:
            rank = 0 if down is None else len(down)
            options |= tile_options(FORWARD_TILES, rank, x)
            forward_tiles[(triton.cdiv(num_rows, options["ROWS"]),)](
                *(x, residual, weight, bias, scale, down, up, *outputs, *strides),
                *(num_rows, width, rank, eps),
                **options,
            )  # fmt: skip
    return outputs


def backward(
    grad_normed: Tensor,
    grad_residual: Tensor,
    new_residual: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward op; arguments and results are those of its reference."""
    num_rows, width = grad_normed.shape
    grads = side_by_side(grad_normed), side_by_side(grad_residual)
    x, residual = side_by_side(x), side_by_side(residual)
    new_residual, rstd, mean, weight, scale, down, up = map(
        contiguous, (new_residual, rstd, mean, weight, scale, down, up)
    )
    strides = tuple(0 if each is None else each.stride(0) for each in (*grads, x, residual))
    given = (*grads, new_residual, rstd, mean, x, residual, weight, scale)
    options = {"LAYER": kind == "layer", "SCALAR": is_scalar(scale)}
    padded = padded_width(width)
    dx = grad_normed.new_empty(grad_normed.shape)
    slots = 1 + (bias is not None) + (scale is not None)
    ddown, dup = (grad_normed.new_empty(0) for _ in range(2))

    def fp32(*size: int) -> Tensor:
        return grad_normed.new_empty(size, dtype=torch.float32)

    with torch.cuda.device_of(grad_normed):
        processors = multiprocessors(dx.get_device())
        if down is None and row_fits(width, dx.element_size(), slots):
            rows, warps, _, _ = BACKWARD_ROWS[padded]
            stages = backward_stages(padded, dx.element_size(), both=residual is not None)
            parts = max(1, min(ROW_PROGRAMS * processors, triton.cdiv(num_rows, rows)))
            partials = fp32(slots, parts, width)
            backward_rows[(parts,)](
                *(*given, dx, partials, *strides, num_rows, width),
                **options, **UNFUSED, BIAS=bias is not None, ROWS=rows, WIDTH=padded,
                RELOAD=stages == 1, STAGES=stages, num_warps=warps,
            )  # fmt: skip
        else:
            rank = 0 if down is None else len(down)
            sums, z, dz = fp32(2, num_rows), fp32(num_rows, rank), fp32(num_rows, rank)
            tile = tile_options(SUM_TILES, rank, dx)
            if num_rows:
                backward_sums[(triton.cdiv(num_rows, tile["ROWS"]),)](
                    *(*given, down, up, sums, z, dz, *strides, num_rows, width, rank),
                    **options, **UNFUSED, **tile,
                )  # fmt: skip
            tile = tile_options(COLUMN_TILES, rank, dx)
            tiles = triton.cdiv(num_rows, tile["ROWS"])
            chunks = triton.cdiv(width, tile["COLUMNS"])
            parts = max(1, min(tiles, COLUMN_PROGRAMS * processors // chunks))
            partials, low = fp32(slots, parts, width), fp32(2, parts, rank, width)
            backward_columns[(chunks, parts)](
                *(*given, down, sums, z, dz, dx, partials, low, *strides),
                *(num_rows, width, rank, triton.cdiv(tiles, parts) * tile["ROWS"]),
                **options, **UNFUSED, **tile, BIAS=bias is not None,
            )  # fmt: skip
            if down is not None:
                low_sums = low.sum(1).to(down.dtype)
                ddown, dup = low_sums[0].clone(), low_sums[1].mT.contiguous()
        dweight = torch.empty_like(weight)
        dbias = None if bias is None else bias.new_empty(bias.shape)
        dscale = None
        if scale is not None:
            # the gradient of one factor for all channels is summed up over them below
            dscale = fp32(width) if is_scalar(scale) else torch.empty_like(scale)
        sum_partials[(triton.cdiv(width, SUM["COLUMNS"]), slots)](
            partials, dweight, dbias, dscale, parts, width, **SUM, num_warps=SUM_WARPS
        )
    if is_scalar(scale):
        dscale = dscale.sum()[None].to(scale.dtype)
    dbias, dscale = (dx.new_empty(0) if each is None else each for each in (dbias, dscale))
    return dx, dweight, dbias, dscale, ddown, dup


def side_by_side(tensor: Tensor | None) -> Tensor | None:
    """Rows that lie anywhere, but whose elements lie side by side."""
    if tensor is None or tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps, or None."""
    return None if tensor is None else tensor.contiguous()


def is_scalar(scale: Tensor | None) -> bool:
    """Whether a bridge has one factor for all channels."""
    return scale is not None and len(scale) == 1


def padded_width(width: int) -> int:
    """D as the kernels that keep rows in registers are compiled for."""
    return max(16, triton.next_power_of_2(width))


def row_fits(width: int, element_size: int, num_sums: int) -> bool:
    """Whether a row of the backward, and what it adds to num_sums gradients, fits in registers."""
    padded = padded_width(width)
    if padded * element_size > MAX_BACKWARD_ROW_BYTES:
        return False
    return num_sums <= BACKWARD_ROWS[padded][-1]


def backward_stages(padded: int, element_size: int, *, both: bool) -> int:
    """Stages of the loop over rows; with `both`, x and residual are read beside the gradients."""
    rows, _, stages, _ = BACKWARD_ROWS[padded]
    return min(stages, 2) if both and rows * padded * element_size > MAX_TWICE else stages


def padded_rank(rank: int) -> int:
    """R as the kernels that work by tiles are compiled for."""
    return max(16, triton.next_power_of_2(rank))


def sort_of_tile(rank: int, element_size: int) -> str:
    """What the size of a tile depends on: fp32 products take many registers."""
    if rank == 0:
        return "long rows"
    return "fp32" if element_size == 4 else f"R {padded_rank(rank)}"


def tile_options(tiles: Mapping[str, tuple[int, ...]], rank: int, x: Tensor) -> dict[str, Any]:
    """What a kernel that works by tiles is compiled with."""
    rows, columns, warps, stages = tiles[sort_of_tile(rank, x.element_size())]
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "RANK": padded_rank(rank),
        "UPCAST": interpreted(),
        "num_warps": warps,
        "num_stages": stages,
    }


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that programs have to share rows."""
    if device < 0:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def variants() -> list[Variant]:
    """Real widths without a bridge, and for every kernel and size the bridge that needs most."""
    layer = {"kind": "layer", "bias": True}
    found = [
        *(_forward_rows_variant(width) for width in (1024, 4096, 8192)),
        _forward_rows_variant(4096, **layer, scale=4096),
        _forward_rows_variant(16384, **layer, scale=16384),
        _forward_rows_variant(16384, **layer, scale=16384, element="fp32"),
        *(_backward_rows_variant(width) for width in (1024, 4096, 8192, 16384)),
        _backward_rows_variant(2048, **layer, scale=2048),
        _backward_rows_variant(4096, **layer, scale=4096),
        _backward_rows_variant(4096, **layer, scale=1, element="fp32"),
        _backward_rows_variant(1024, **layer, scale=1024, element="fp32"),
        _backward_rows_variant(8192, scale=8192),
        _backward_rows_variant(8192, **layer, element="fp32"),
        _variant("sum of partials", sum_partials, SUM, (), num_warps=SUM_WARPS),
        *_tile_variants(0, **layer, scale=2, element="fp32"),
        *_tile_variants(16),
        *_tile_variants(64, **layer, scale=2, element="fp32"),
    ]
    for rank in (16, 32, 64):
        found += _tile_variants(rank, **layer, scale=2)
    return found


def _forward_rows_variant(width: int, **options: Any) -> Variant:
    rows, warps = FORWARD_ROWS[width]
    constants = {"ROWS": rows, "WIDTH": width}
    words = f"forward, D {width}"
    return _variant(words, forward_rows, constants, ("v4.b32",), num_warps=warps, **options)


def _backward_rows_variant(width: int, **options: Any) -> Variant:
    rows, warps, _, _ = BACKWARD_ROWS[width]
    size = 4 if options.get("element") == "fp32" else 2
    stages = backward_stages(width, size, both=bool(options.get("scale")))
    constants = {"ROWS": rows, "WIDTH": width, "RELOAD": stages == 1, "STAGES": stages}
    # the next rows are on their way while one is worked on
    parts = ("v4.b32", "cp.async") if stages > 1 else ("v4.b32",)
    words = f"backward, D {width}"
    return _variant(words, backward_rows, constants, parts, num_warps=warps, **options)


def _tile_variants(rank: int, element: str = "bf16", **options: Any) -> list[Variant]:
    found = []
    sort = sort_of_tile(rank, 4 if element == "fp32" else 2)
    for kernel, tiles in (
        (forward_tiles, FORWARD_TILES),
        (backward_sums, SUM_TILES),
        (backward_columns, COLUMN_TILES),
    ):
        rows, columns, warps, stages = tiles[sort]
        constants = {"ROWS": rows, "COLUMNS": columns, "RANK": padded_rank(rank), "UPCAST": False}
        words = f"{kernel.__name__.replace('_', ' ')}, R {rank}"
        parts = ("mma",) if rank and element != "fp32" else ()
        options |= {"rank": rank, "element": element, "num_warps": warps, "num_stages": stages}
        found.append(_variant(words, kernel, constants, parts, **options))
    return found


def _variant(
    words: str,
    kernel: Any,
    constants: Mapping[str, Any],
    expects: tuple[str, ...],
    *,
    kind: str = "rms",
    bias: bool = False,
    scale: int = 0,
    rank: int = 0,
    element: str = "bf16",
    **launch: int,
) -> Variant:
    """A form of a kernel, with the types of its arguments told by their names."""
    names = kernel.arg_names
    given = {"bias": bias, "dbias": bias, "scale": scale, "dscale": scale, "down": rank, "up": rank}
    if kernel in (backward_rows, backward_sums, backward_columns):
        given |= dict.fromkeys(("x", "residual"), scale or rank)
        given |= {"new_residual": rank or not scale}
    known = {"LAYER": kind == "layer", "SCALAR": scale == 1, "BIAS": bias}
    known |= {name: None for name, there in given.items() if not there}
    constants = {**constants, **{name: known[name] for name in names if name in known}}
    fp32 = {"rstd", "mean", "partials", "sums", "z_out", "dz_out", "z_in", "dz_in", "low_partials"}
    types = {"eps": "fp32", **dict.fromkeys(fp32, "*fp32")}
    whole = ("num_rows", "num_parts", "width", "rank", "rows_per_part")
    types |= dict.fromkeys((*whole, *(n for n in names if n.endswith("_stride"))), "i32")
    types = {n: types.get(n, f"*{element}") for n in names if n not in constants}
    unaligned = {"eps", "num_rows", "num_parts", "rank"}
    return Variant(
        f"{words}, {kind}{', bias' * bias}{f', scale {scale}' if scale else ''}, {element}",
        kernel,
        types,
        constants,
        aligned=tuple(name for name in types if name not in unaligned),
        expects=dict.fromkeys((80, 90, 100), expects),
        # without, the registers of the widest of them do not suffice
        fp_fusion=kernel is forward_tiles,
        **launch,
    )
