"""Whether arguments of ragged_decode fit each other, said in words.

Letters: B sequences, N new tokens, Hq query heads, Hkv key-value heads, D head size, L capacity.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from interlace.errors import ShapeError
from interlace.ops._spelling import spell

MAX_HEAD_DIM = 256


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_table: Tensor | None,
    q_start: tuple[int, ...],
    window: int | None,
    gate: Tensor | None,
) -> None:
    """Raise ShapeError unless the arguments of the public function fit each other."""
    if q.dim() != 4 or not q.is_floating_point() or q.shape[3] > MAX_HEAD_DIM:
        raise ShapeError(
            f"q is {spell(q)}; expected floating-point queries [B, N, Hq, D] with D at most "
            f"{MAX_HEAD_DIM}."
        )
    batch, _, num_heads, width = q.shape
    layout = "[B, Hkv, L, D]" if block_table is None else "[blocks, block size, Hkv, D]"
    head_axis = 1 if block_table is None else 2
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dim() == 4 and cache.shape[3] == width and cache.shape == k_cache.shape
        if block_table is None:
            fits = fits and cache.shape[0] == batch
        else:
            fits = fits and cache.shape[0] > 0 and cache.shape[1] > 0
        if not fits or (cache.dtype, cache.device) != (q.dtype, q.device):
            raise ShapeError(
                f"{name} is {spell(cache)}; expected {layout} with D = {width}"
                f"{f' and B = {batch}' if block_table is None else ' and one block or more'}, "
                f"{q.dtype} on {q.device}, and keys and values alike."
            )
    _check_heads(q_start, k_cache.shape[head_axis], num_heads)
    exact = torch.promote_types(q.dtype, torch.float32)
    for name, tensor, shape, dtype in (
        ("lengths", lengths, (batch,), torch.int32),
        ("starts", starts, (batch,), torch.int32),
        ("gate", gate, (num_heads,), exact),
    ):
        if tensor is not None and (
            (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, q.device)
        ):
            raise ShapeError(f"{name} is {spell(tensor)}; expected {dtype} {shape} on {q.device}.")
    if block_table is not None and (
        (block_table.dim(), block_table.shape[0], block_table.dtype, block_table.device)
        != (2, batch, torch.int32, q.device)
    ):
        raise ShapeError(
            f"block_table is {spell(block_table)}; expected torch.int32 [{batch}, max_blocks] on "
            f"{q.device}."
        )
    if window is not None and window < 1:
        raise ShapeError(f"window is {window}; expected 1 or more keys, or None for all.")
    if q.is_cpu and batch and not torch.compiler.is_compiling():
        _check_values(k_cache, lengths, starts, block_table)


def _check_heads(q_start: tuple[int, ...], num_kv_heads: int, num_heads: int) -> None:
    rising = all(a <= b for a, b in pairwise(q_start))
    if (
        len(q_start) != num_kv_heads + 1
        or q_start[0] != 0
        or q_start[-1] != num_heads
        or not rising
    ):
        raise ShapeError(
            f"q_start is {q_start}; expected {num_kv_heads + 1} numbers for {num_kv_heads} kv "
            f"heads that do not fall, from 0 to the number of query heads, {num_heads}."
        )


def _check_values(
    k_cache: Tensor, lengths: Tensor, starts: Tensor | None, block_table: Tensor | None
) -> None:
    capacity = k_cache.shape[2]
    if block_table is not None:
        capacity = block_table.shape[1] * k_cache.shape[1]
    low, high = (int(bound) for bound in lengths.aminmax())
    if low < 0 or high > capacity:
        raise ShapeError(
            f"lengths holds values in {low}..{high}; expected 0..{capacity}, the cache's capacity."
        )
    if starts is not None and int(starts.min()) < 0:
        raise ShapeError(f"starts holds {int(starts.min())}; expected 0 or more.")
    if block_table is not None and block_table.shape[1]:
        size, num_blocks = k_cache.shape[1], k_cache.shape[0]
        used = torch.arange(block_table.shape[1])[None] * size < lengths[:, None]
        low, high = (int(bound) for bound in block_table.masked_fill(~used, 0).aminmax())
        if low < 0 or high >= num_blocks:
            raise ShapeError(
                f"block_table holds {low}..{high} where sequences have keys; expected "
                f"0..{num_blocks - 1}, the blocks of the cache."
            )
