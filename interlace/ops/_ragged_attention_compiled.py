"""The compiled kernel of ragged_attention: what it can serve, and how it is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interlace.ops import _extension
from interlace.ops._ragged_reference import reach

# in the order of csrc/common/dtype.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q_start: Sequence[int],
    max_seqlen_q: int,
    max_seqlen_kv: int,
    causal: bool,
    window: int | None,
    scale: float,
    *,
    max_lanes: int = 16,
) -> tuple[Tensor, Tensor]:
    """Run the C++ kernel; `max_lanes` limits the width of its vectors.

    The other arguments are those of the reference in `interlace/ops/_ragged_reference.py`.
    """
    q, k, v = (_with_whole_rows(each) for each in (q, k, v))
    gate = None if gate is None else gate.contiguous()
    cu_seqlens_q, cu_seqlens_kv = cu_seqlens_q.contiguous(), cu_seqlens_kv.contiguous()
    num_queries, num_heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((num_heads, num_queries), dtype=torch.float32)
    before, behind = reach(causal, window)
    _extension.extension().ragged_attention(
        dtype=DTYPES.index(q.dtype),
        q=q.data_ptr(),
        q_strides=q.stride()[:2],
        k=k.data_ptr(),
        k_strides=k.stride()[:2],
        v=v.data_ptr(),
        v_strides=v.stride()[:2],
        gate=0 if gate is None else gate.data_ptr(),
        q_tokens=cu_seqlens_q.data_ptr(),
        kv_tokens=cu_seqlens_kv.data_ptr(),
        q_start=q_start,
        num_sequences=len(cu_seqlens_q) - 1,
        num_queries=num_queries,
        width=width,
        before=before,
        behind=behind,
        scale=scale,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        num_threads=torch.get_num_threads(),
        max_lanes=max_lanes,
    )
    return out, lse


def _with_whole_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()
