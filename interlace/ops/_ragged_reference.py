"""The meaning of ragged_attention and of its backward, in plain PyTorch.

Letters: Tq query tokens, Tk keys, Hq query heads, Hkv key-value heads, D head size; i a query, j a
key, h a query head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# scores held at a time, in the accumulation dtype
_CHUNK_ELEMENTS = 1 << 23
# farther than any key
UNBOUNDED = 1 << 30


def reach(causal: bool, window: int | None) -> tuple[int, int]:
    """How many keys a query sees before and behind its own aligned position."""
    before = UNBOUNDED if window is None else window - 1
    return before, 0 if causal else before


def reference(
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
) -> tuple[Tensor, Tensor]:
    """Softmax attention, sequence by sequence, key-value head by key-value head."""
    exact = torch.promote_types(q.dtype, torch.float32)
    # every element is overwritten; made of q, so that autograd also knows an empty result's origin
    out = q.to(exact, memory_format=torch.contiguous_format, copy=True)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=exact)
    for rows, keys, hidden in _pieces(q, cu_seqlens_q, cu_seqlens_kv, causal, window):
        for kv_head, heads in _groups(q_start):
            scores = _scores(q[rows, heads], k[keys, kv_head], hidden, scale)
            # softmax of a row that sees nothing is NaN
            weights = scores.softmax(-1).masked_fill(hidden, 0.0)
            mixed = weights @ v[keys, kv_head].to(exact)
            if gate is not None:
                mixed = mixed * gate[heads, None, None]
            out[rows, heads] = mixed.transpose(0, 1)
            lse[heads, rows] = scores.logsumexp(-1)
    return out.to(q.dtype), lse


def backward_reference(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate, with w = exp(score - lse) and g = gate (1 without).

        delta[h, i]    = <grad_out[i, h], out[i, h]>
        grad_w[h, i, j] = <grad_out[i, h], v[j]>
        grad_score     = w (g grad_w - delta)
        grad_gate[h]   = sum over i, j of w grad_w

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
    """
    exact = lse.dtype
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, dtype=exact, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    grad_gate = q.new_zeros((0 if gate is None else q.shape[1],), dtype=exact)
    delta = (grad_out.to(exact) * out.to(exact)).sum(-1).T
    for rows, keys, hidden in _pieces(q, cu_seqlens_q, cu_seqlens_kv, causal, window):
        for kv_head, heads in _groups(q_start):
            key, value = k[keys, kv_head].to(exact), v[keys, kv_head].to(exact)
            query, grad = (x[rows, heads].to(exact).transpose(0, 1) for x in (q, grad_out))
            # a query that sees nothing has lse = -inf; its weights are exp(-inf - 0) = 0
            offset = lse[heads, rows].masked_fill(lse[heads, rows].isneginf(), 0.0)
            scores = _scores(q[rows, heads], key, hidden, scale)
            weights = torch.exp(scores - offset[..., None])
            grad_weights = grad @ value.T
            if gate is not None:
                grad_gate[heads] += (weights * grad_weights).sum((1, 2))
                grad, grad_weights = (x * gate[heads, None, None] for x in (grad, grad_weights))
            grad_scores = weights * (grad_weights - delta[heads, rows, None]) * scale
            # no other way to a score that is not seen than its gradient of zero
            grad_scores = grad_scores.masked_fill(hidden, 0.0)
            grad_q[rows, heads] = (grad_scores @ key).transpose(0, 1)
            grad_k[keys, kv_head] += (grad_scores.mT @ query).sum(0)
            grad_v[keys, kv_head] += (weights.mT @ grad).sum(0)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_gate


def num_visible(
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, causal: bool, window: int | None
) -> int:
    """Pairs of a query and a key that it sees, per query head."""
    before, behind = reach(causal, window)
    total = 0
    for (first_q, last_q), (first_kv, last_kv) in _sequences(cu_seqlens_q, cu_seqlens_kv):
        num_keys = last_kv - first_kv
        position = torch.arange(last_q - first_q) + num_keys - (last_q - first_q)
        first = (position - before).clamp_min(0)
        last = (position + behind).clamp_max(num_keys - 1)
        total += int((last - first + 1).clamp_min(0).sum())
    return total


def _scores(query: Tensor, key: Tensor, hidden: Tensor, scale: float) -> Tensor:
    # [queries, group, D] and [keys, D] -> [group, queries, keys]
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact).transpose(0, 1) @ key.to(exact).T * scale
    return scores.masked_fill(hidden, float("-inf"))


def _groups(q_start: Sequence[int]) -> Iterator[tuple[int, slice]]:
    for kv_head in range(len(q_start) - 1):
        if q_start[kv_head] < q_start[kv_head + 1]:
            yield kv_head, slice(q_start[kv_head], q_start[kv_head + 1])


def _sequences(
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    bounds = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
    yield from zip(*map(pairwise, bounds), strict=True)


def _pieces(
    q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, causal: bool, window: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows of a sequence, its keys, and which of these the rows do not see."""
    before, behind = reach(causal, window)
    for (first_q, last_q), (first_kv, last_kv) in _sequences(cu_seqlens_q, cu_seqlens_kv):
        num_keys = last_kv - first_kv
        shift = num_keys - (last_q - first_q)
        step = max(1, _CHUNK_ELEMENTS // max(1, q.shape[1] * num_keys))
        for start in range(first_q, last_q, step):
            stop = min(start + step, last_q)
            position = torch.arange(start - first_q, stop - first_q, device=q.device) + shift
            distance = torch.arange(num_keys, device=q.device) - position[:, None]
            hidden = (distance < -before) | (distance > behind)
            yield slice(start, stop), slice(first_kv, last_kv), hidden
