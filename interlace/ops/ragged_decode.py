"""ragged_decode - attention of a few new tokens against a KV cache, with any heads per kv head.

Letters: B sequences, N new tokens, Hq query heads, Hkv key-value heads, D head size, L capacity of
the cache in keys, G new tokens x query heads of one kv head.

Pruning heads leaves kv heads that serve different numbers of query heads. Query heads are sorted by
kv head, and kv head j serves the query heads q_start[j]..q_start[j + 1] - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from interlace.errors import ShapeError
from interlace.ops import _ragged_decode_compiled as compiled
from interlace.ops._ragged_decode_check import check
from interlace.ops._ragged_decode_samples import samples
from interlace.ops._registry import Backend, Op

__all__ = ["ragged_decode"]


def ragged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    q_start: Sequence[int],
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from the last N tokens of every sequence to the keys and values in its cache.

    Token n of sequence b has position p = lengths[b] - N + n and sees the keys at positions
    max(starts[b], p - window + 1)..p:

    out[b, n, h] = gate[h] * sum over keys i of
        softmax_i(scale * <q[b, n, h], k[b, j, i]>) v[b, j, i],   j the kv head of query head h

    Equal to `scaled_dot_product_attention` with a mask and with
    the kv heads repeated for their query heads. A token that sees no key gives 0. Slots of the
    cache before `starts` and from `lengths` on are not read and may hold anything; NaN or infinity
    in a value between them may reach every new token of its sequence. No gradient flows.

    Args:
        q: queries [B, N, Hq, D], any N >= 0, fp32 | bf16 | fp16 | fp64; D at most 256.
        k_cache: keys, in q's dtype. Contiguous: [B, Hkv, L, D], with any strides but side by
            side in D. Paged: [blocks, block size, Hkv, D], with L = max_blocks * block size.
        v_cache: values, as the keys.
        lengths: keys per sequence, the N new ones included, [B] int32, 0..L.
        q_start: first query head of every kv head and, at the end, Hq; Hkv + 1 whole numbers from
            0 that do not fall. A kv head may serve no query head at all.
        starts: first key of every sequence, [B] int32, >= 0, for left padding; None: 0.
        block_table: for a paged cache, the block that holds the keys from i * block size on,
            [B, max_blocks] int32. Entries beyond a sequence's keys are not looked at.
        window: keys that a token sees, itself included, >= 1; None: all.
        scale: factor of the scores, > 0; None: D ** -0.5.
        gate: factor of every query head's output, [Hq], fp32 (fp64 for fp64 q); None: 1.
        backend: "auto", "cuda", "triton", "cpp" or "torch".

    Returns:
        [B, N, Hq, D], in q's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, or lengths, starts or blocks are out of
            range (looked at on the CPU only; on a GPU they have to be right).
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: scores, softmax and sums in fp32; deterministic, whatever the number of threads.
    Cost: reads the visible keys and values once per kv head. What is launched depends on shapes
    alone, so that a CUDA graph replays for growing sequences; call once before capturing it.
    """
    heads = tuple(q_start)
    check(q, k_cache, v_cache, lengths, starts, block_table, heads, window, gate)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise ShapeError(f"scale is {scale}; expected a finite number above 0, or None.")
    out: Tensor = OP(
        q.detach(),
        k_cache.detach(),
        v_cache.detach(),
        lengths,
        starts,
        block_table,
        heads,
        window,
        float(scale),
        None if gate is None else gate.detach(),
        backend=backend,
    )
    return out


def reference(
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
    """The meaning: masked softmax, the query heads of a kv head side by side and padded."""
    num_tokens, exact = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    if block_table is not None:
        k_cache, v_cache = (_gather(cache, block_table) for cache in (k_cache, v_cache))
    capacity = k_cache.shape[2]
    groups = list(pairwise(q_start))
    widest = max((stop - first for first, stop in groups), default=0)
    if q.numel() == 0 or capacity == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    key = torch.arange(capacity, device=q.device)
    position = (lengths[:, None] - num_tokens + torch.arange(num_tokens, device=q.device))[
        ..., None
    ]
    seen = key <= position
    if starts is not None:
        seen = seen & (key >= starts[:, None, None])
    if window is not None:
        seen = seen & (key > position - window)
    rows = torch.stack(
        [pad(q[:, :, a:b].to(exact), (0, 0, 0, widest - (b - a))) for a, b in groups], dim=1
    )
    shape = rows.shape[:-1]
    scores = (rows.flatten(2, 3) @ k_cache.to(exact).mT * scale).view(*shape, capacity)
    scores.masked_fill_(~seen[:, None, :, None], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == float("-inf"), 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    # what no token sees may be NaN, and 0 * NaN is NaN
    values = v_cache.to(exact).masked_fill(~seen.any(1)[:, None, :, None], 0)
    mixed = (weights.flatten(2, 3) @ values).view(*shape, q.shape[3])
    mixed /= total.masked_fill(total == 0, 1)
    out = torch.cat([mixed[:, j, :, : b - a] for j, (a, b) in enumerate(groups)], dim=2)
    return (out if gate is None else out * gate[:, None]).to(q.dtype)


def _gather(cache: Tensor, block_table: Tensor) -> Tensor:
    """Blocks [blocks, size, Hkv, D] -> keys or values in their order [B, Hkv, L, D]."""
    # entries that stand for no keys may be anything
    blocks = block_table.clamp(0, len(cache) - 1).long()
    return cache[blocks].flatten(1, 2).transpose(1, 2)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _visible(
    q: Tensor,
    k_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_table: Tensor | None,
    window: int | None,
) -> list[tuple[int, int]]:
    """First key and end of what the new tokens of every sequence see together."""
    capacity = k_cache.shape[2]
    if block_table is not None:
        capacity = block_table.shape[1] * k_cache.shape[1]
    firsts = [0] * len(lengths) if starts is None else starts.tolist()
    found = []
    for first, length in zip(firsts, lengths.tolist(), strict=True):
        if window is not None:
            first = max(first, length - q.shape[1] - window + 1)
        found.append((first, max(first, min(length, capacity))))
    return found


def _triton_why_not(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if q.dtype not in compiled.DTYPES:
        return f"works on fp32, bf16 and fp16, got {q.dtype}"
    if not k_cache.stride(3) == v_cache.stride(3) == 1 < k_cache.shape[3]:
        return "the elements of a key and of a value have to lie side by side"
    return None


def _bytes_moved(
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
) -> int:
    keys = sum(b - a for a, b in _visible(q, k_cache, lengths, starts, block_table, window))
    serving = sum(a < b for a, b in pairwise(q_start))
    return 2 * q.element_size() * (keys * serving * q.shape[3] + q.numel())


def _flops(
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
) -> int:
    pairs = 0
    for n in range(q.shape[1]):
        # token n sees what a single new token sees that comes N - 1 - n tokens earlier
        earlier = lengths - (q.shape[1] - 1 - n)
        spans = _visible(q[:, :1], k_cache, earlier, starts, block_table, window)
        pairs += sum(b - a for a, b in spans)
    return 4 * pairs * q.shape[2] * q.shape[3]


OP = Op(
    "ragged_decode",
    reference,
    fake=_fake,
    samples=samples,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend("cuda", compiled.cuda, why_not=compiled.cuda_why_not),
        Backend(
            "triton",
            "interlace.triton_kernels.ragged_decode:ragged_decode",
            why_not=_triton_why_not,
        ),
        Backend("cpp", compiled.cpp, why_not=compiled.cpp_why_not),
    ),
)
