"""bridge_norm without a low-rank bridge: a row stays in registers from load to store.

Letters: T tokens, D hidden size.

So memory is read and written once. `forward_rows` has a program per row, or per few short rows.
`backward_rows` has a program per multiprocessor, which walks over rows, fetches the next while it
works on one, and keeps its share of the parameters' gradients in registers; `sum_partials` adds up
these shares in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interlace.triton_kernels._bridge_norm_parts import (
    inverse_root,
    load_columns,
    load_rows,
    load_scale,
    load_sum,
    mean_of,
)


@triton.jit
def forward_rows(
    x,
    residual,
    weight,
    bias,
    scale,
    normed,
    new_residual,
    rstd,
    mean,
    x_stride,
    residual_stride,
    num_rows,
    width,
    eps,
    LAYER: tl.constexpr,
    SCALAR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    r = load_sum(x, residual, x_stride, residual_stride, rows, columns, inside)
    if scale is not None:
        r *= load_scale(scale, columns, width, SCALAR)
    place = rows[:, None] * width + columns[None, :]
    tl.store(new_residual + place, r.to(new_residual.dtype.element_ty), mask=inside)
    if LAYER:
        average = mean_of(tl.sum(r, 1), width)
        r = tl.where(inside, r - average[:, None], 0.0)
    else:
        average = tl.zeros((ROWS,), tl.float32)
    inverse = inverse_root(mean_of(tl.sum(r * r, 1), width), eps)
    tl.store(rstd + rows, inverse, mask=rows < num_rows)
    tl.store(mean + rows, average, mask=rows < num_rows)
    out = r * inverse[:, None] * load_columns(weight, columns, width)
    if bias is not None:
        out += load_columns(bias, columns, width)
    tl.store(normed + place, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def load_normalised(
    grad_normed,
    new_residual,
    x,
    residual,
    factor,
    grad_normed_stride,
    x_stride,
    residual_stride,
    rows,
    columns,
    inside,
    width,
    average,
    inverse,
    LAYER: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """g, h, and n, the normalised values before weight and bias; h only where there is a scale."""
    g = load_rows(grad_normed, grad_normed_stride, rows, columns, inside, EVICTION)
    h = 0.0
    if x is not None:
        h = load_sum(x, residual, x_stride, residual_stride, rows, columns, inside, EVICTION)
        n = h * factor
    else:
        n = load_rows(new_residual, width, rows, columns, inside, EVICTION)
    if LAYER:
        n -= average
    return g, h, n * inverse


@triton.jit
def backward_rows(
    grad_normed,
    grad_residual,
    new_residual,
    rstd,
    mean,
    x,
    residual,
    weight,
    scale,
    dx,
    partials,
    grad_normed_stride,
    grad_residual_stride,
    x_stride,
    residual_stride,
    num_rows,
    width,
    LAYER: tl.constexpr,
    SCALAR: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RELOAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    dscale = tl.zeros((ROWS, WIDTH), tl.float32)
    kept_w = load_columns(weight, columns, width)
    kept_factor = 1.0
    if scale is not None:
        kept_factor = load_scale(scale, columns, width, SCALAR)
    for start in tl.range(program * ROWS, num_rows, num_programs * ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < num_rows
        inside = is_row[:, None] & (columns < width)[None, :]
        inverse = tl.load(rstd + rows, mask=is_row, other=0.0)[:, None]
        average = 0.0
        if LAYER:
            average = tl.load(mean + rows, mask=is_row, other=0.0)[:, None]
        w, factor = kept_w, kept_factor
        if RELOAD:
            w = load_columns(weight, columns, width, "evict_first")
            if scale is not None:
                factor = load_scale(scale, columns, width, SCALAR, "evict_first")
        g, h, n = load_normalised(
            grad_normed, new_residual, x, residual, factor, grad_normed_stride, x_stride,
            residual_stride, rows, columns, inside, width, average, inverse, LAYER, "",
        )  # fmt: skip
        wg = g * w
        along = mean_of(tl.sum(wg * n, 1), width)[:, None]
        level = 0.0
        if LAYER:
            level = mean_of(tl.sum(wg, 1), width)[:, None]
        if RELOAD:
            # another eviction policy, or the compiler would see that it has these values
            w = load_columns(weight, columns, width, "evict_last")
            if scale is not None:
                factor = load_scale(scale, columns, width, SCALAR, "evict_last")
            g, h, n = load_normalised(
                grad_normed, new_residual, x, residual, factor, grad_normed_stride, x_stride,
                residual_stride, rows, columns, inside, width, average, inverse, LAYER,
                "evict_first",
            )  # fmt: skip
            wg = g * w
        dweight += g * n
        if BIAS:
            dbias += g
        d = wg - n * along
        if LAYER:
            d -= level
        d = d * inverse + load_rows(grad_residual, grad_residual_stride, rows, columns, inside)
        if scale is not None:
            dscale += d * h
            d *= factor
        place = rows[:, None] * width + columns[None, :]
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)
    at = partials + program.to(tl.int64) * width + columns
    slot = num_programs.to(tl.int64) * width
    tl.store(at, tl.sum(dweight, 0), mask=columns < width)
    if BIAS:
        at += slot
        tl.store(at, tl.sum(dbias, 0), mask=columns < width)
    if scale is not None:
        at += slot
        tl.store(at, tl.sum(dscale, 0), mask=columns < width)


@triton.jit
def sum_partials(
    partials,
    dweight,
    dbias,
    dscale,
    num_parts,
    width,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The last step of what `backward_rows` adds up, in a fixed order."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    slot = tl.program_id(1)
    at = partials + slot.to(tl.int64) * num_parts * width
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < num_parts)[:, None] & is_column[None, :]
        total += load_rows(at, width, parts.to(tl.int64), columns, inside)
    found = tl.sum(total, 0)
    if slot == 0:
        tl.store(dweight + columns, found.to(dweight.dtype.element_ty), mask=is_column)
    if dbias is not None and slot == 1:
        tl.store(dbias + columns, found.to(dbias.dtype.element_ty), mask=is_column)
    if dscale is not None and slot == tl.num_programs(1) - 1:
        tl.store(dscale + columns, found.to(dscale.dtype.element_ty), mask=is_column)
