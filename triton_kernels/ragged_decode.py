"""ragged_decode in Triton: splits of the keys, then a kernel that joins them.

Letters: B sequences, N new tokens, Hq query heads, D head size, S splits.

The rows of a tile are the (token, query head) pairs of one kv head, so that every key and value is
read once for all of them. The kernel waits for memory, and the matrix units work through 16 rows in
less time than their keys take to arrive: padding small groups up to 16 costs nothing.

Source: packing query heads, FlashAttention-2's and vLLM's GQA decode kernels; splits over the keys,
Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from interlace.ops import _ragged_decode_plan as planning
from interlace.triton_kernels import _cache_append
from interlace.triton_kernels._overlap import enter, options
from interlace.triton_kernels._variants import Variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# splits that the joining kernel adds up at a time
_JOIN_BLOCK = 16
# sizes that change as a cache grows, and must not make a kernel of their own whenever they happen
# to be a multiple of 16
_PLAIN = ("num_splits", "num_stats", "stats", "capacity")


@triton.jit
def _keys_of(lengths, starts, window, b, num_tokens, capacity):
    """First key and end of what the new tokens of a sequence see together, and its length."""
    length = tl.load(lengths + b)
    begin = tl.maximum(length - num_tokens - window + 1, 0)
    if starts is not None:
        begin = tl.maximum(begin, tl.load(starts + b))
    return begin, tl.maximum(tl.minimum(length, capacity), begin), length


@triton.jit
def _split_size(begin, end, num_splits, BLOCK_N: tl.constexpr):
    """Keys of a split, a multiple of BLOCK_N, at least one."""
    return tl.cdiv(tl.maximum(tl.cdiv(end - begin, num_splits), 1), BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=_PLAIN)
def attend_kernel(
    # [B, N, Hq, D]; with splits, sums [B, N, Hq, S, D] and, from `stats` on, largest scores and
    # totals [2, B, N, Hq, S]
    out,
    q,
    k,
    v,
    lengths,
    starts,
    block_table,
    heads,
    gate,
    num_tokens,
    num_heads,
    num_serving,
    num_row_blocks,
    num_splits,
    num_stats,
    stats,
    capacity,
    window,
    scale,
    q_sequence_stride,
    q_token_stride,
    q_head_stride,
    k_outer_stride,
    k_head_stride,
    k_key_stride,
    v_outer_stride,
    v_head_stride,
    v_key_stride,
    table_stride,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of rows against one split of the keys."""
    enter(OVERLAP)
    program = tl.program_id(0)
    # blocks of rows that share their keys run side by side
    row_block = program % num_row_blocks
    split = program // num_row_blocks % num_splits
    tile = program // (num_row_blocks * num_splits)
    b = (tile // num_serving).to(tl.int64)
    entry = heads + tile % num_serving * 3
    kv_head = tl.load(entry).to(tl.int64)
    first_head = tl.load(entry + 1)
    group = tl.load(entry + 2)
    if row_block * BLOCK_M >= group * num_tokens:
        return
    begin, end, length = _keys_of(lengths, starts, window, b, num_tokens, capacity)
    if SPLIT:
        size = _split_size(begin, end, num_splits, BLOCK_N)
        begin += split * size
        end = tl.minimum(begin + size, end)
        if begin >= end:
            return

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < group * num_tokens
    token = rows // group
    head = first_head + rows % group
    position = length - num_tokens + token
    d = tl.arange(0, BLOCK_D)
    inner = d < WIDTH
    q_row = b * q_sequence_stride + token.to(tl.int64) * q_token_stride
    q_row += head.to(tl.int64) * q_head_stride
    queries = tl.load(
        q + q_row[:, None] + d[None, :], mask=real[:, None] & inner[None, :], other=0.0
    )
    if UPCAST:
        queries = queries.to(tl.float32)

    k += kv_head * k_head_stride
    v += kv_head * v_head_stride
    if PAGE == 0:
        k += b * k_outer_stride
        v += b * v_outer_stride
    else:
        block_table += b * table_stride
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        there = key < end
        if PAGE == 0:
            k_row = key.to(tl.int64) * k_key_stride
            v_row = key.to(tl.int64) * v_key_stride
        else:
            block = tl.load(block_table + key // PAGE, mask=there, other=0).to(tl.int64)
            slot = (key % PAGE).to(tl.int64)
            k_row = block * k_outer_stride + slot * k_key_stride
            v_row = block * v_outer_stride + slot * v_key_stride
        mask = there[:, None] & inner[None, :]
        keys = tl.load(k + k_row[:, None] + d[None, :], mask=mask, other=0.0)
        values = tl.load(v + v_row[:, None] + d[None, :], mask=mask, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        seen = there[None, :] & (key[None, :] <= position[:, None])
        seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen no key yet keeps sums of 0
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(
            weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee"
        )
        top = higher

    row = (b * num_tokens + token) * num_heads + head
    mask = real[:, None] & inner[None, :]
    if SPLIT:
        row = row * num_splits + split
        tl.store(out + row[:, None] * WIDTH + d[None, :], sums, mask=mask)
        tl.store(out + stats + row, top, mask=real)
        tl.store(out + stats + num_stats + row, total, mask=real)
    else:
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        if gate is not None:
            result *= tl.load(gate + head, mask=real, other=0.0)[:, None]
        tl.store(
            out + row[:, None] * WIDTH + d[None, :], result.to(out.dtype.element_ty), mask=mask
        )


@triton.jit(do_not_specialize=_PLAIN)
def join_kernel(
    out,
    parts,
    lengths,
    starts,
    gate,
    num_tokens,
    num_heads,
    num_splits,
    num_stats,
    stats,
    capacity,
    window,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row of the output from its splits."""
    enter(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    b = row // (num_heads * num_tokens)
    begin, end, _ = _keys_of(lengths, starts, window, b, num_tokens, capacity)
    # splits without keys wrote nothing
    used = tl.cdiv(end - begin, _split_size(begin, end, num_splits, BLOCK_N))
    tops = parts + stats + row * num_splits
    totals = tops + num_stats
    every = tl.arange(0, MAX_SPLITS)
    top = tl.max(tl.load(tops + every, mask=every < used, other=float("-inf")), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, used, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        there = s < used
        weight = tl.exp(tl.load(tops + s, mask=there, other=float("-inf")) - top)
        total += tl.sum(weight * tl.load(totals + s, mask=there, other=0.0), 0)
        part = tl.load(
            parts + (row * num_splits + s)[:, None] * WIDTH + d[None, :],
            mask=there[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )
        sums += tl.sum(weight[:, None] * part, 0)
    result = sums / tl.where(total == 0.0, 1.0, total)
    if gate is not None:
        result *= tl.load(gate + row % num_heads)
    tl.store(out + row * WIDTH + d, result.to(out.dtype.element_ty), mask=d < WIDTH)


@dataclass(frozen=True)
class Config:
    """Sizes of a program.

    Attributes:
        block_m: rows.
        block_n: keys of a step.
        block_d: D, up to the next power of two.
        num_warps: warps.
        num_stages: depth of the software pipeline.
        shared: bytes of shared memory that a program needs, about.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    shared: int


def config(rows: int, width: int, element_size: int, *, paged: bool) -> Config:
    """Choose the sizes for up to `rows` rows of one kv head, D, and bytes of an element."""
    block_d = max(16, triton.next_power_of_2(width))
    # of wide heads as many rows as fit in 99 KB of shared memory beside the keys and values
    most = 64 if block_d <= 128 else 64 // element_size
    block_m = min(most, max(16, triton.next_power_of_2(rows)))
    # fp32 has no matrix units to work on: its products keep more of a step in registers
    block_n = max(16, min(64, (8192 if element_size == 2 else 2048) // block_d))
    num_warps = 8 if block_m == 64 and block_d > 64 else 4
    # the number of a block has to arrive before its keys can be asked for: two stages per step
    num_stages = 5 if paged else 3
    # what is in use now and what is on its way, and the queries
    shared = (2 * 2 * block_n + block_m) * block_d * element_size
    return Config(block_m, block_n, block_d, num_warps, num_stages, shared)


def ragged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_table: Tensor | None,
    q_start: Sequence[int],
    window: int | None,
    scale: float,
    gate: Tensor | None,
) -> Tensor:
    """Run the kernels; arguments as those of the op's reference."""
    batch, num_tokens, num_heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 or width == 1 else q.contiguous()
    lengths = lengths.contiguous()
    starts = None if starts is None else starts.contiguous()
    gate = None if gate is None else gate.contiguous()
    if block_table is None:
        page, capacity, table_stride = 0, k_cache.shape[2], 0
        strides = [cache.stride()[:3] for cache in (k_cache, v_cache)]
    else:
        page, capacity = k_cache.shape[1], block_table.shape[1] * k_cache.shape[1]
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        table_stride = block_table.stride(0)
        strides = [
            (cache.stride(0), cache.stride(2), cache.stride(1)) for cache in (k_cache, v_cache)
        ]
    window = planning.NO_WINDOW if window is None else min(window, planning.NO_WINDOW)
    heads = planning.heads(tuple(q_start), q.device)
    rows = num_tokens * max(b - a for a, b in pairwise(q_start))
    sizes = config(rows, width, q.element_size(), paged=page > 0)
    num_row_blocks = triton.cdiv(rows, sizes.block_m)
    tiles = batch * len(heads) * num_row_blocks
    num_splits = planning.num_splits(
        tiles, min(capacity, window + num_tokens - 1), sizes.shared, q.device
    )
    num_stats = batch * num_tokens * num_heads * num_splits
    parts = out
    if num_splits > 1:
        parts = torch.empty(num_stats * (width + 2), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        attend_kernel[(tiles * num_splits,)](
            parts,
            q,
            k_cache,
            v_cache,
            lengths,
            starts,
            block_table,
            heads,
            gate,
            num_tokens,
            num_heads,
            len(heads),
            num_row_blocks,
            num_splits,
            num_stats,
            num_stats * width,
            capacity,
            window,
            scale,
            *q.stride()[:3],
            *strides[0],
            *strides[1],
            table_stride,
            WIDTH=width,
            PAGE=page,
            SPLIT=num_splits > 1,
            BLOCK_M=sizes.block_m,
            BLOCK_N=sizes.block_n,
            BLOCK_D=sizes.block_d,
            UPCAST=triton.knobs.runtime.interpret,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
            **options(q.device),
        )
        if num_splits > 1:
            join_kernel[(batch * num_tokens * num_heads,)](
                out,
                parts,
                lengths,
                starts,
                gate,
                num_tokens,
                num_heads,
                num_splits,
                num_stats,
                num_stats * width,
                capacity,
                window,
                WIDTH=width,
                BLOCK_N=sizes.block_n,
                BLOCK_D=sizes.block_d,
                MAX_SPLITS=planning.MAX_SPLITS,
                BLOCK_S=_JOIN_BLOCK,
                num_warps=4,
                **options(q.device),
            )
    return out


def variants() -> list[Variant]:
    """What decoding with 16-bit caches of the usual head sizes compiles to, and the rare forms."""
    found = [
        _attend_variant("bf16, head 128, splits", rows=4, width=128),
        _attend_variant("bf16, head 128, one split", rows=4, width=128, split=False),
        _attend_variant("bf16, head 64, splits", rows=1, width=64),
        _attend_variant("fp16, head 80, splits", rows=5, width=80, element="fp16"),
        _attend_variant("bf16, head 96, splits", rows=3, width=96),
        _attend_variant("bf16, head 256, splits", rows=4, width=256),
        _attend_variant("bf16, head 128, paged", rows=4, width=128, page=16),
        _attend_variant("bf16, head 128, 8 tokens", rows=32, width=128),
        _attend_variant("bf16, head 128, prompt", rows=64, width=128, split=False),
        _attend_variant("bf16, head 256, prompt", rows=64, width=256, split=False),
        _attend_variant("bf16, head 256, prompt, paged", rows=64, width=256, page=16, split=False),
        _attend_variant("fp32, head 128, splits", rows=4, width=128, element="fp32"),
    ]
    joins = (_join_variant(width) for width in (64, 80, 128))
    return [*found, *joins, *_cache_append.variants()]


def _attend_variant(
    name: str, *, rows: int, width: int, element: str = "bf16", page: int = 0, split: bool = True
) -> Variant:
    sizes = config(rows, width, 4 if element == "fp32" else 2, paged=page > 0)
    counts = ("num_heads", "num_serving", "num_row_blocks", "num_splits", "num_stats", "stats")
    strides = (
        "q_sequence_stride",
        "q_token_stride",
        "q_head_stride",
        "k_outer_stride",
        "k_head_stride",
        "k_key_stride",
        "v_outer_stride",
        "v_head_stride",
        "v_key_stride",
    )
    types = dict.fromkeys(("out", "q", "k", "v"), f"*{element}")
    types |= {"lengths": "*i32", "starts": "*i32", "heads": "*i32", "gate": "*fp32"}
    types |= dict.fromkeys(("num_tokens", *counts, "capacity", "window", *strides), "i32")
    types |= {"scale": "fp32", "table_stride": "i32"}
    if split:
        types["out"] = "*fp32"
    constants = {
        "WIDTH": width,
        "PAGE": page,
        "SPLIT": split,
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
        "BLOCK_D": sizes.block_d,
        "UPCAST": False,
        "OVERLAP": False,
    }
    if page:
        types["block_table"] = "*i32"
    else:
        constants["block_table"] = None
    # keys and values arrive by asynchronous copies of 16 bytes while earlier ones are worked on
    expects = ("cp.async.cg.shared.global", "fma.rn.f32" if element == "fp32" else "mma")
    return Variant(
        name,
        attend_kernel,
        types,
        constants,
        aligned=("out", "q", "k", "v", *strides),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        expects=dict.fromkeys((80, 90, 100), expects),
    )


def _join_variant(width: int) -> Variant:
    types = {"out": "*bf16", "parts": "*fp32", "lengths": "*i32", "starts": "*i32"}
    types |= {"gate": "*fp32"}
    counts = ("num_tokens", "num_heads", "num_splits", "num_stats", "stats", "capacity", "window")
    types |= dict.fromkeys(counts, "i32")
    sizes = config(4, width, 2, paged=False)
    constants = {
        "WIDTH": width,
        "BLOCK_N": sizes.block_n,
        "BLOCK_D": sizes.block_d,
        "MAX_SPLITS": planning.MAX_SPLITS,
        "BLOCK_S": _JOIN_BLOCK,
        "OVERLAP": False,
    }
    return Variant(f"join, head {width}", join_kernel, types, constants, aligned=("out", "parts"))
