"""bridge_norm with a low-rank bridge, or with rows too long for registers: by tiles.

Letters: T tokens, D hidden size, R rank of the bridge.

A low-rank bridge needs a whole row before any of r is known, and its weights are worth loading only
for many rows at once. `forward_tiles` walks over column chunks of a tile of rows three times: for
z = down s, for the statistics, for the output; the second and third time the tile comes from the
cache. That moves fewer bytes through memory than a product of its own in front would: it has to
read x and residual too, and what follows still cannot hold a row and load the weights for many.

The backward is cut in two: `backward_sums` finds per row what all its columns need, by tiles of
rows; `backward_columns` keeps what is summed over rows in registers, by chunks of columns, and
writes it once per part of the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interlace.triton_kernels._bridge_norm_parts import (
    load_columns,
    load_high,
    load_low,
    load_rows,
    load_scale,
    load_sum,
    product,
)


@triton.jit
def load_bridged(
    x,
    residual,
    scale,
    up,
    z,
    x_stride,
    residual_stride,
    rows,
    columns,
    ranks,
    inside,
    width,
    rank,
    SCALAR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """r, for a chunk of columns and a known z = down s."""
    r = load_sum(x, residual, x_stride, residual_stride, rows, columns, inside)
    if scale is not None:
        r *= load_scale(scale, columns, width, SCALAR)
    if up is not None:
        r = product(z, tl.trans(load_high(up, columns, ranks, rank, width)), r, up, UPCAST)
    return r


@triton.jit
def forward_tiles(
    x,
    residual,
    weight,
    bias,
    scale,
    down,
    up,
    normed,
    new_residual,
    rstd,
    mean,
    x_stride,
    residual_stride,
    num_rows,
    width,
    rank,
    eps,
    LAYER: tl.constexpr,
    SCALAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ranks = tl.arange(0, RANK)
    z = tl.zeros((ROWS, RANK), tl.float32)
    if down is not None:
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = is_row[:, None] & (columns < width)[None, :]
            s = load_sum(x, residual, x_stride, residual_stride, rows, columns, inside)
            if scale is not None:
                s *= load_scale(scale, columns, width, SCALAR)
            z = product(s, tl.trans(load_low(down, ranks, columns, rank, width)), z, down, UPCAST)
        # infinity times the zeros behind R is not zero
        z = tl.where((ranks < rank)[None, :], z, 0.0)

    # sums, and squares of what is left without the mean, merged chunk by chunk
    total = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = is_row[:, None] & (columns < width)[None, :]
        r = load_bridged(
            x, residual, scale, up, z, x_stride, residual_stride, rows, columns, ranks, inside,
            width, rank, SCALAR, UPCAST,
        )  # fmt: skip
        place = rows[:, None] * width + columns[None, :]
        tl.store(new_residual + place, r.to(new_residual.dtype.element_ty), mask=inside)
        if LAYER:
            before = tl.zeros((ROWS,), tl.float32) + start
            here = tl.zeros((ROWS,), tl.float32) + tl.minimum(COLUMNS, width - start)
            of_chunk = tl.sum(r, 1)
            apart = of_chunk / here - total / tl.maximum(before, 1.0)
            r = tl.where(inside, r - (of_chunk / here)[:, None], 0.0)
            squares += apart * apart * (before * here / (before + here))
            total += of_chunk
        squares += tl.sum(r * r, 1)
    average = total / width
    # the rounded root takes registers that are not there; a traced program may hand over eps in
    # fp64
    inverse = tl.rsqrt((squares / width + eps).to(tl.float32))
    tl.store(rstd + rows, inverse, mask=is_row)
    tl.store(mean + rows, average, mask=is_row)

    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = is_row[:, None] & (columns < width)[None, :]
        r = load_bridged(
            x, residual, scale, up, z, x_stride, residual_stride, rows, columns, ranks, inside,
            width, rank, SCALAR, UPCAST,
        )  # fmt: skip
        out = (r - average[:, None]) * inverse[:, None] * load_columns(weight, columns, width)
        if bias is not None:
            out += load_columns(bias, columns, width)
        place = rows[:, None] * width + columns[None, :]
        tl.store(normed + place, out.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def load_normed(
    new_residual,
    s,
    rows,
    columns,
    inside,
    average,
    inverse,
    width,
):
    """n, the normalised values before weight and bias."""
    r = load_rows(new_residual, width, rows, columns, inside) if new_residual is not None else s
    return tl.where(inside, (r - average[:, None]) * inverse[:, None], 0.0)


@triton.jit
def backward_sums(
    grad_normed,
    grad_residual,
    new_residual,
    rstd,
    mean,
    x,
    residual,
    weight,
    scale,
    down,
    up,
    sums,
    z_out,
    dz_out,
    grad_normed_stride,
    grad_residual_stride,
    x_stride,
    residual_stride,
    num_rows,
    width,
    rank,
    LAYER: tl.constexpr,
    SCALAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Means of w g n and of w g over the columns of a row, [2, T]; z = down s and dz = up^T dr."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    ranks = tl.arange(0, RANK)
    inverse = tl.load(rstd + rows, mask=is_row, other=0.0)
    average = tl.load(mean + rows, mask=is_row, other=0.0)
    along = tl.zeros((ROWS,), tl.float32)
    level = tl.zeros((ROWS,), tl.float32)
    z = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = is_row[:, None] & (columns < width)[None, :]
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        if x is not None:
            s = load_sum(x, residual, x_stride, residual_stride, rows, columns, inside)
            if scale is not None:
                s *= load_scale(scale, columns, width, SCALAR)
        if down is not None:
            z = product(s, tl.trans(load_low(down, ranks, columns, rank, width)), z, down, UPCAST)
        n = load_normed(new_residual, s, rows, columns, inside, average, inverse, width)
        g = load_rows(grad_normed, grad_normed_stride, rows, columns, inside)
        wg = g * load_columns(weight, columns, width)
        along += tl.sum(wg * n, 1)
        if LAYER:
            level += tl.sum(wg, 1)
    along /= width
    level /= width
    tl.store(sums + rows, along, mask=is_row)
    tl.store(sums + num_rows + rows, level, mask=is_row)
    if down is not None:
        dz = tl.zeros((ROWS, RANK), tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = is_row[:, None] & (columns < width)[None, :]
            # r is there: only a scale without a low-rank map goes without new_residual
            n = load_normed(new_residual, None, rows, columns, inside, average, inverse, width)
            g = load_rows(grad_normed, grad_normed_stride, rows, columns, inside)
            wg = g * load_columns(weight, columns, width)
            d = (wg - n * along[:, None] - level[:, None]) * inverse[:, None]
            d += load_rows(grad_residual, grad_residual_stride, rows, columns, inside)
            d = tl.where(inside, d, 0.0)
            dz = product(d, load_high(up, columns, ranks, rank, width), dz, up, UPCAST)
        place = rows[:, None] * rank + ranks[None, :]
        is_low = is_row[:, None] & (ranks < rank)[None, :]
        tl.store(z_out + place, z, mask=is_low)
        tl.store(dz_out + place, dz, mask=is_low)


@triton.jit
def backward_columns(
    grad_normed,
    grad_residual,
    new_residual,
    rstd,
    mean,
    x,
    residual,
    weight,
    scale,
    down,
    sums,
    z_in,
    dz_in,
    dx,
    partials,
    low_partials,
    grad_normed_stride,
    grad_residual_stride,
    x_stride,
    residual_stride,
    num_rows,
    width,
    rank,
    rows_per_part,
    LAYER: tl.constexpr,
    SCALAR: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Dx of a chunk of columns and a part of the rows, and what is summed over these rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    is_column = columns < width
    ranks = tl.arange(0, RANK)
    w = load_columns(weight, columns, width)
    dweight = tl.zeros((COLUMNS,), tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    dscale = tl.zeros((COLUMNS,), tl.float32)
    ddown = tl.zeros((RANK, COLUMNS), tl.float32)
    dup = tl.zeros((RANK, COLUMNS), tl.float32)
    first = part * rows_per_part
    for start in range(first, tl.minimum(first + rows_per_part, num_rows), ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < num_rows
        inside = is_row[:, None] & is_column[None, :]
        inverse = tl.load(rstd + rows, mask=is_row, other=0.0)
        average = tl.load(mean + rows, mask=is_row, other=0.0)
        along = tl.load(sums + rows, mask=is_row, other=0.0)
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = h
        if x is not None:
            h = load_sum(x, residual, x_stride, residual_stride, rows, columns, inside)
            s = h
            if scale is not None:
                s = h * load_scale(scale, columns, width, SCALAR)
        n = load_normed(new_residual, s, rows, columns, inside, average, inverse, width)
        g = load_rows(grad_normed, grad_normed_stride, rows, columns, inside)
        dweight += tl.sum(g * n, 0)
        if BIAS:
            dbias += tl.sum(g, 0)
        d = g * w - n * along[:, None]
        if LAYER:
            d -= tl.load(sums + num_rows + rows, mask=is_row, other=0.0)[:, None]
        d *= inverse[:, None]
        d += load_rows(grad_residual, grad_residual_stride, rows, columns, inside)
        d = tl.where(inside, d, 0.0)
        if down is not None:
            place = rows[:, None] * rank + ranks[None, :]
            is_low = is_row[:, None] & (ranks < rank)[None, :]
            z = tl.load(z_in + place, mask=is_low, other=0.0)
            dz = tl.load(dz_in + place, mask=is_low, other=0.0)
            dup = product(tl.trans(z), d, dup, down, UPCAST)
            ddown = product(tl.trans(dz), s, ddown, down, UPCAST)
            d = product(dz, load_low(down, ranks, columns, rank, width), d, down, UPCAST)
        if scale is not None:
            dscale += tl.sum(d * h, 0)
            d *= load_scale(scale, columns, width, SCALAR)
        place = rows[:, None] * width + columns[None, :]
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)
    at = partials + part.to(tl.int64) * width + columns
    slot = num_parts.to(tl.int64) * width
    tl.store(at, dweight, mask=is_column)
    if BIAS:
        at += slot
        tl.store(at, dbias, mask=is_column)
    if scale is not None:
        at += slot
        tl.store(at, dscale, mask=is_column)
    if down is not None:
        is_low = (ranks < rank)[:, None] & is_column[None, :]
        at = low_partials + part.to(tl.int64) * rank * width
        at += ranks[:, None] * width + columns[None, :]
        tl.store(at, ddown, mask=is_low)
        tl.store(at + slot * rank, dup, mask=is_low)
