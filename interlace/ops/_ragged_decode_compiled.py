"""The compiled kernels of ragged_decode: what they can serve, and how they are called.

Arguments are those of the reference in `interlace/ops/ragged_decode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from interlace.ops import _extension, _overlap
from interlace.ops import _ragged_decode_plan as planning

# in the order of csrc/common/dtype.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what the CUDA kernel is compiled for (csrc/cuda/ragged_decode.h)
_CUDA_WIDTH, _CUDA_ROWS, _CUDA_HEADS = 128, 4, 256
# a quarter of a multiprocessor: its registers hold four blocks
_CUDA_SHARED = 57 << 10


def cuda_why_not(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_table: Tensor | None,
    q_start: Sequence[int],
    *_: object,
) -> str | None:
    """Say why the CUDA kernel cannot serve the arguments; None if it can."""
    if q.dtype not in DTYPES:
        return f"works on fp32, bf16 and fp16, got {q.dtype}"
    width, per_pack = q.shape[3], 16 // q.element_size()
    if width % per_pack or not 0 < width <= _CUDA_WIDTH:
        return f"works on heads of a multiple of {per_pack} up to {_CUDA_WIDTH}, got {width}"
    for cache in (k_cache, v_cache):
        if (
            cache.stride(3) != 1
            or any(s % per_pack for s in cache.stride()[:3])
            or cache.data_ptr() % 16
        ):
            return "every key and value has to begin at a multiple of 16 bytes"
    rows = q.shape[1] * max((b - a for a, b in pairwise(q_start)), default=0)
    if rows > _CUDA_ROWS:
        return (
            f"works on up to {_CUDA_ROWS} rows (new tokens x query heads) per kv head, got {rows}"
        )
    if len(q_start) > _CUDA_HEADS:
        return f"works on fewer than {_CUDA_HEADS} kv heads, got {len(q_start) - 1}"
    return None


def cuda(
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
    """Run the CUDA kernels; arguments as those of the op's reference."""
    batch, num_tokens, num_heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = _with_whole_rows(q)
    lengths, starts, gate = lengths.contiguous(), _packed(starts), _packed(gate)
    block_table = _packed(block_table)
    capacity, table_stride = k_cache.shape[2], 0
    if block_table is not None:
        capacity, table_stride = block_table.shape[1] * k_cache.shape[1], block_table.shape[1]
    window = planning.NO_WINDOW if window is None else min(window, planning.NO_WINDOW)
    tiles = batch * sum(a < b for a, b in pairwise(q_start))
    splits = planning.num_splits(
        tiles, min(capacity, window + num_tokens - 1), _CUDA_SHARED, q.device
    )
    parts = None
    if splits > 1:
        size = batch * num_tokens * num_heads * splits * (width + 2)
        parts = torch.empty(size, dtype=torch.float32, device=q.device)
    _extension.extension().ragged_decode_cuda(
        dtype=DTYPES.index(q.dtype),
        q=q.data_ptr(),
        q_strides=q.stride()[:3],
        k=k_cache.data_ptr(),
        k_strides=_cache_strides(k_cache, block_table),
        v=v_cache.data_ptr(),
        v_strides=_cache_strides(v_cache, block_table),
        lengths=_address(lengths),
        starts=_address(starts),
        block_table=_address(block_table),
        table_stride=table_stride,
        block_size=k_cache.shape[1],
        q_start=q_start,
        num_sequences=batch,
        num_tokens=num_tokens,
        width=width,
        capacity=capacity,
        window=window,
        num_splits=splits,
        scale=scale,
        gate=_address(gate),
        out=out.data_ptr(),
        parts=_address(parts),
        device=q.device.index,
        stream=torch._C._cuda_getCurrentRawStream(q.device.index),
        overlap=_overlap.allowed(q.device),
    )
    return out


def cpp_why_not(q: Tensor, *_: object) -> str | None:
    """Say why the C++ kernel cannot serve the arguments; None if it can."""
    if q.dtype not in DTYPES:
        return f"works on fp32, bf16 and fp16, got {q.dtype}"
    return None


def cpp(
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
    *,
    max_lanes: int = 16,
) -> Tensor:
    """Run the C++ kernel; `max_lanes` limits the width of its vectors."""
    q, k_cache, v_cache = (_with_whole_rows(each) for each in (q, k_cache, v_cache))
    lengths, starts, gate = lengths.contiguous(), _packed(starts), _packed(gate)
    block_table = _packed(block_table)
    table_stride = 0 if block_table is None else block_table.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype)
    _extension.extension().ragged_decode(
        dtype=DTYPES.index(q.dtype),
        q=q.data_ptr(),
        q_strides=q.stride()[:3],
        k=k_cache.data_ptr(),
        k_strides=_cache_strides(k_cache, block_table),
        v=v_cache.data_ptr(),
        v_strides=_cache_strides(v_cache, block_table),
        lengths=lengths.data_ptr(),
        starts=_address(starts),
        block_table=_address(block_table),
        table_stride=table_stride,
        block_size=k_cache.shape[1],
        q_start=q_start,
        num_sequences=q.shape[0],
        num_tokens=q.shape[1],
        width=q.shape[3],
        window=planning.NO_WINDOW if window is None else min(window, planning.NO_WINDOW),
        scale=scale,
        gate=_address(gate),
        out=out.data_ptr(),
        num_threads=torch.get_num_threads(),
        max_lanes=max_lanes,
    )
    return out


def _with_whole_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] <= 1 else tensor.contiguous()


def _cache_strides(cache: Tensor, block_table: Tensor | None) -> tuple[int, int, int]:
    """Strides from sequence (block) to sequence, from kv head to kv head, from key to key."""
    outer, middle, inner, _ = cache.stride()
    return (outer, middle, inner) if block_table is None else (outer, inner, middle)


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
