"""The kernels of qk_norm_rope; `qk_norm_rope.py` launches them.

Letters: B batch, T tokens, H heads, D head size, F frequencies.

A program takes a tile of tokens and heads, of queries or of keys: as many heads as there are, then
as many tokens as fit. It loads the tables of a token once for all heads. Each half of the rotated
part is a block of its own, so that the rotation moves nothing between threads, and so is the rest
that passes through.

The backward keeps the gradients of the weights in registers: a fixed number of programs walks over
the tiles and leaves one row of partial sums each, which a second kernel adds in a fixed order.

Tuples that the kernels hand on: `counts` (tokens, tokens per batch, heads), `strides` (batch,
token, head) and `table_strides` (axis, batch, token), in elements; compile-time SHAPE (D, F, block
of F, block of the rest), TILE (norm or not, tokens, heads, tiles per token), LAYOUT (name, then the
three sections) and ALIGN (what the strides of heads and of tables are multiples of).
"""

from __future__ import annotations

import triton
import triton.language as tl

from interlace.triton_kernels._overlap import enter

# sizes that differ from call to call are no reason to compile again
SIZES = ("num_tokens", "batch_tokens", "q_heads", "k_heads")
PROGRAMS = ("q_programs", "k_programs")


@triton.jit
def _place(part, counts, TILE: tl.constexpr):
    """Tokens and heads of a tile, and which of them exist."""
    token = (part // TILE[3]) * TILE[1] + tl.arange(0, TILE[1])
    head = (part % TILE[3]) * TILE[2] + tl.arange(0, TILE[2])
    return token, head, (token < counts[0])[:, None] & (head < counts[2])[None, :]


@triton.jit
def _token_rows(token, counts, batch_stride, token_stride, ALIGN: tl.constexpr):
    """Where tokens begin, counted in elements."""
    batch = (token // counts[1]).to(tl.int64) * batch_stride
    within = (token % counts[1]).to(tl.int64) * token_stride
    return tl.multiple_of(batch, ALIGN) + tl.multiple_of(within, ALIGN)


@triton.jit
def _rows(token, head, counts, strides, ALIGN: tl.constexpr):
    """Where the heads of a tile begin, counted in elements."""
    # elements of a compile-time tuple are constants by name only
    OF_HEADS: tl.constexpr = ALIGN[0]
    of_token = _token_rows(token, counts, strides[0], strides[1], OF_HEADS)
    of_head = tl.multiple_of(head.to(tl.int64) * strides[2], OF_HEADS)
    return of_token[:, None] + of_head[None, :]


@triton.jit
def _packed_rows(token, head, counts, SHAPE: tl.constexpr):
    """The same in an output, which is contiguous."""
    return (token.to(tl.int64)[:, None] * counts[2] + head[None, :]) * SHAPE[0]


@triton.jit
def _load(ptr, rows, inside, START: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Load elements START to START + COUNT of the heads of a tile as fp32, zeros elsewhere."""
    column = tl.arange(0, BLOCK)[None, None, :]
    mask = inside[:, :, None] & (column < COUNT)
    return tl.load(ptr + START + rows[:, :, None] + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, rows, inside, START: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Store elements START to START + COUNT of the heads of a tile, rounded once."""
    column = tl.arange(0, BLOCK)[None, None, :]
    mask = inside[:, :, None] & (column < COUNT)
    tl.store(ptr + START + rows[:, :, None] + column, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(ptr, START: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Load a part of a norm weight as fp32, shaped to be multiplied with a tile."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(ptr + START + column, mask=column < COUNT, other=0.0)
    return weight.to(tl.float32)[None, None, :]


@triton.jit
def _load_tables(
    tables,
    token,
    counts,
    table_strides,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Cosines and sines of tokens as fp32, shaped to be multiplied with a tile."""
    OF_TABLES: tl.constexpr = ALIGN[1]
    rows = _token_rows(token, counts, table_strides[1], table_strides[2], OF_TABLES)
    column = tl.arange(0, SHAPE[2])
    mask = (token < counts[0])[:, None] & (column < SHAPE[1])[None, :]
    offset = column
    if LAYOUT[0] == "interleaved":
        axis = column % 3
        reach = tl.where(axis == 1, 3 * LAYOUT[2], 3 * LAYOUT[3])
        offset = column + tl.where(column < reach, axis, 0).to(tl.int64) * table_strides[0]
    if LAYOUT[0] == "chunked":
        axis = (column >= LAYOUT[1]).to(tl.int64) + (column >= LAYOUT[1] + LAYOUT[2])
        offset = column + axis * table_strides[0]
    offset = rows[:, None] + offset[None, :]
    cos = tl.load(tables[0] + offset, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(tables[1] + offset, mask=mask, other=0.0).to(tl.float32)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def _scale(square, inside, eps, D: tl.constexpr):
    """One over the root mean square of every head, from its sum of squares."""
    # heads outside are zeros: whatever eps is, they must stay so
    mean = tl.where(inside, square * (1.0 / D) + eps, 1.0)
    # rounded, since the approximate root is off by some units
    return tl.div_rn(1.0, tl.sqrt_rn(mean.to(tl.float32)))[:, :, None]


@triton.jit
def _forward_tile(
    x_ptr,
    weight_ptr,
    out_ptr,
    tables,
    part,
    counts,
    strides,
    table_strides,
    eps,
    TILE: tl.constexpr,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D: tl.constexpr = SHAPE[0]
    F: tl.constexpr = SHAPE[1]
    F_BLOCK: tl.constexpr = SHAPE[2]
    REST_BLOCK: tl.constexpr = SHAPE[3]
    token, head, inside = _place(part, counts, TILE)
    rows = _rows(token, head, counts, strides, ALIGN)
    x1 = _load(x_ptr, rows, inside, 0, F, F_BLOCK)
    x2 = _load(x_ptr, rows, inside, F, F, F_BLOCK)
    if REST_BLOCK > 0:
        rest = _load(x_ptr, rows, inside, 2 * F, D - 2 * F, REST_BLOCK)
    cos, sin = _load_tables(tables, token, counts, table_strides, SHAPE, LAYOUT, ALIGN)
    if TILE[0]:
        square = tl.sum(x1 * x1 + x2 * x2, axis=2)
        if REST_BLOCK > 0:
            square += tl.sum(rest * rest, axis=2)
        scale = _scale(square, inside, eps, D)
        x1 = x1 * scale * _load_weight(weight_ptr, 0, F, F_BLOCK)
        x2 = x2 * scale * _load_weight(weight_ptr, F, F, F_BLOCK)
        if REST_BLOCK > 0:
            rest = rest * scale * _load_weight(weight_ptr, 2 * F, D - 2 * F, REST_BLOCK)
    rows = _packed_rows(token, head, counts, SHAPE)
    _store(out_ptr, x1 * cos - x2 * sin, rows, inside, 0, F, F_BLOCK)
    _store(out_ptr, x2 * cos + x1 * sin, rows, inside, F, F, F_BLOCK)
    if REST_BLOCK > 0:
        _store(out_ptr, rest, rows, inside, 2 * F, D - 2 * F, REST_BLOCK)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    num_tokens,
    batch_tokens,
    q_heads,
    k_heads,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    axis_stride,
    table_batch_stride,
    table_token_stride,
    eps,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    enter(OVERLAP)
    # a group of tokens that both tilings divide: its queries, then its keys, so that their tables
    # are still in the cache
    GROUP: tl.constexpr = max(Q_TILE[1], K_TILE[1])
    Q_PARTS: tl.constexpr = GROUP // Q_TILE[1] * Q_TILE[3]
    K_PARTS: tl.constexpr = GROUP // K_TILE[1] * K_TILE[3]
    group = tl.program_id(0) // (Q_PARTS + K_PARTS)
    place = tl.program_id(0) % (Q_PARTS + K_PARTS)
    tables = (cos_ptr, sin_ptr)
    table_strides = (axis_stride, table_batch_stride, table_token_stride)
    # Inductor hands over fp64
    eps = tl.full((), eps, tl.float32)
    if place < Q_PARTS:
        _forward_tile(
            q_ptr,
            q_weight_ptr,
            q_out_ptr,
            tables,
            group * Q_PARTS + place,
            (num_tokens, batch_tokens, q_heads),
            (q_batch_stride, q_token_stride, q_head_stride),
            table_strides,
            eps,
            Q_TILE,
            SHAPE,
            LAYOUT,
            ALIGN,
        )
    else:
        _forward_tile(
            k_ptr,
            k_weight_ptr,
            k_out_ptr,
            tables,
            group * K_PARTS + place - Q_PARTS,
            (num_tokens, batch_tokens, k_heads),
            (k_batch_stride, k_token_stride, k_head_stride),
            table_strides,
            eps,
            K_TILE,
            SHAPE,
            LAYOUT,
            ALIGN,
        )


@triton.jit
def _backward_tiles(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    tables,
    first,
    step,
    counts,
    dy_strides,
    x_strides,
    table_strides,
    eps,
    TILE: tl.constexpr,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Tiles `first`, `first` + `step` and so on of the queries or of the keys."""
    NORM: tl.constexpr = TILE[0]
    TOKENS: tl.constexpr = TILE[1]
    HEADS: tl.constexpr = TILE[2]
    D: tl.constexpr = SHAPE[0]
    F: tl.constexpr = SHAPE[1]
    F_BLOCK: tl.constexpr = SHAPE[2]
    REST_BLOCK: tl.constexpr = SHAPE[3]
    if NORM:
        weight1 = _load_weight(weight_ptr, 0, F, F_BLOCK)
        weight2 = _load_weight(weight_ptr, F, F, F_BLOCK)
        sum1 = tl.zeros((TOKENS, HEADS, F_BLOCK), tl.float32)
        sum2 = tl.zeros((TOKENS, HEADS, F_BLOCK), tl.float32)
        if REST_BLOCK > 0:
            weight_rest = _load_weight(weight_ptr, 2 * F, D - 2 * F, REST_BLOCK)
            sum_rest = tl.zeros((TOKENS, HEADS, REST_BLOCK), tl.float32)
    for part in range(first, tl.cdiv(counts[0], TILE[1]) * TILE[3], step):
        token, head, inside = _place(part, counts, TILE)
        rows = _rows(token, head, counts, dy_strides, ALIGN)
        dy1 = _load(dy_ptr, rows, inside, 0, F, F_BLOCK)
        dy2 = _load(dy_ptr, rows, inside, F, F, F_BLOCK)
        if REST_BLOCK > 0:
            drest = _load(dy_ptr, rows, inside, 2 * F, D - 2 * F, REST_BLOCK)
        if NORM:
            rows = _rows(token, head, counts, x_strides, ALIGN)
            x1 = _load(x_ptr, rows, inside, 0, F, F_BLOCK)
            x2 = _load(x_ptr, rows, inside, F, F, F_BLOCK)
            if REST_BLOCK > 0:
                rest = _load(x_ptr, rows, inside, 2 * F, D - 2 * F, REST_BLOCK)
        cos, sin = _load_tables(tables, token, counts, table_strides, SHAPE, LAYOUT, ALIGN)
        d1 = dy1 * cos + dy2 * sin
        d2 = dy2 * cos - dy1 * sin
        if NORM:
            square = tl.sum(x1 * x1 + x2 * x2, axis=2)
            if REST_BLOCK > 0:
                square += tl.sum(rest * rest, axis=2)
            scale = _scale(square, inside, eps, D)
            x1 *= scale
            x2 *= scale
            sum1 += d1 * x1
            sum2 += d2 * x2
            d1 *= weight1
            d2 *= weight2
            dot = tl.sum(d1 * x1 + d2 * x2, axis=2)
            if REST_BLOCK > 0:
                rest *= scale
                sum_rest += drest * rest
                drest *= weight_rest
                dot += tl.sum(drest * rest, axis=2)
            dot = (dot * (1.0 / D))[:, :, None]
            d1 = scale * (d1 - x1 * dot)
            d2 = scale * (d2 - x2 * dot)
            if REST_BLOCK > 0:
                drest = scale * (drest - rest * dot)
        rows = _packed_rows(token, head, counts, SHAPE)
        _store(dx_ptr, d1, rows, inside, 0, F, F_BLOCK)
        _store(dx_ptr, d2, rows, inside, F, F, F_BLOCK)
        if REST_BLOCK > 0:
            _store(dx_ptr, drest, rows, inside, 2 * F, D - 2 * F, REST_BLOCK)
    if NORM:
        _store_sum(partial_ptr, sum1, 0, F, F_BLOCK)
        _store_sum(partial_ptr, sum2, F, F, F_BLOCK)
        if REST_BLOCK > 0:
            _store_sum(partial_ptr, sum_rest, 2 * F, D - 2 * F, REST_BLOCK)


@triton.jit
def _store_sum(ptr, value, START: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Store the sum of a tile over its tokens and heads."""
    column = tl.arange(0, BLOCK)
    tl.store(ptr + START + column, tl.sum(tl.sum(value, axis=0), axis=0), mask=column < COUNT)


@triton.jit(do_not_specialize=(*SIZES, *PROGRAMS))
def backward_kernel(
    dq_out_ptr,
    dk_out_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dk_ptr,
    partial_ptr,
    q_programs,
    k_programs,
    num_tokens,
    batch_tokens,
    q_heads,
    k_heads,
    dq_batch_stride,
    dq_token_stride,
    dq_head_stride,
    dk_batch_stride,
    dk_token_stride,
    dk_head_stride,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    axis_stride,
    table_batch_stride,
    table_token_stride,
    eps,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    SHAPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0)
    partial_ptr += program.to(tl.int64) * SHAPE[0]
    tables = (cos_ptr, sin_ptr)
    table_strides = (axis_stride, table_batch_stride, table_token_stride)
    eps = tl.full((), eps, tl.float32)
    if program < q_programs:
        _backward_tiles(
            dq_out_ptr,
            q_ptr,
            q_weight_ptr,
            dq_ptr,
            partial_ptr,
            tables,
            program,
            q_programs,
            (num_tokens, batch_tokens, q_heads),
            (dq_batch_stride, dq_token_stride, dq_head_stride),
            (q_batch_stride, q_token_stride, q_head_stride),
            table_strides,
            eps,
            Q_TILE,
            SHAPE,
            LAYOUT,
            ALIGN,
        )
    else:
        _backward_tiles(
            dk_out_ptr,
            k_ptr,
            k_weight_ptr,
            dk_ptr,
            partial_ptr,
            tables,
            program - q_programs,
            k_programs,
            (num_tokens, batch_tokens, k_heads),
            (dk_batch_stride, dk_token_stride, dk_head_stride),
            (k_batch_stride, k_token_stride, k_head_stride),
            table_strides,
            eps,
            K_TILE,
            SHAPE,
            LAYOUT,
            ALIGN,
        )


@triton.jit(do_not_specialize=PROGRAMS)
def add_partials_kernel(
    partial_ptr,
    dq_weight_ptr,
    dk_weight_ptr,
    q_programs,
    k_programs,
    D: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the rows of partial sums, those of the queries and those of the keys."""
    blocks = tl.cdiv(D, COLUMNS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(0) < blocks:
        if Q_NORM:
            _add_rows(partial_ptr, dq_weight_ptr, 0, q_programs, column, D, ROWS, COLUMNS)
    else:
        if K_NORM:
            _add_rows(partial_ptr, dk_weight_ptr, q_programs, k_programs, column, D, ROWS, COLUMNS)


@triton.jit
def _add_rows(
    partial_ptr,
    out_ptr,
    first,
    count,
    column,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        offset = (first + row).to(tl.int64)[:, None] * D + column[None, :]
        mask = (row < count)[:, None] & (column < D)[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, value, mask=column < D)
