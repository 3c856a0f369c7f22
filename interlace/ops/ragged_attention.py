"""ragged_attention - attention where every key-value head serves its own number of query heads.

Letters: B sequences, Tq query tokens, Tk keys (all sequences packed), Hq query heads, Hkv key-value
heads, D head size.

Pruned models keep query heads unevenly: one key-value head may serve five query heads, its
neighbour one. Query heads are sorted by their key-value head, so a prefix array tells the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from interlace.errors import ShapeError
from interlace.ops import _ragged_attention_compiled as compiled
from interlace.ops._autograd import Backward
from interlace.ops._budget import Budget
from interlace.ops._ragged_reference import backward_reference, num_visible, reference
from interlace.ops._ragged_samples import backward_samples, not_finite, samples
from interlace.ops._registry import Backend, Op, OpSample
from interlace.ops._spelling import spell

__all__ = ["q_start_of", "ragged_attention"]

MAX_HEAD_DIM = 256


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    q_start: Sequence[int],
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend within packed sequences, each key-value head serving a group of query heads.

    With g(h) the key-value head whose group holds query head h, and p = i + (keys - queries) the
    position of query i of a sequence, aligned so that the last query stands at the last key:

        out[i, h] = gate[h] * sum over j of softmax_j(scale <q[i, h], k[j, g(h)]>) v[j, g(h)]
        over the keys j of the sequence with  j <= p  if causal,  |p - j| < window  if windowed

    Equal to scaled_dot_product_attention on k and v repeated by group. A query that sees no key
    gives 0. NaN and infinity stay in their sequence.

    Args:
        q: queries of all sequences, [Tq, Hq, D], fp32 | bf16 | fp16 | fp64, D 1..256; sorted by
            key-value head.
        k: keys, [Tk, Hkv, D]; may lie anywhere, as long as the D elements lie side by side.
        v: values, [Tk, Hkv, D], likewise.
        cu_seqlens_q: where each sequence begins in q, and Tq: [B + 1] int32, ascending from 0.
        cu_seqlens_kv: the same for k and v, [B + 1]. Unequal lengths are cross-attention, or new
            queries against a longer past.
        max_seqlen_q: length of the longest sequence of queries; a Python number, so that no GPU
            has to be waited for. May be larger.
        max_seqlen_kv: the same for keys.
        q_start: Hkv + 1 numbers, ascending from 0 to Hq: key-value head n serves query heads
            q_start[n] to q_start[n + 1] - 1, perhaps none. See `q_start_of`.
        causal: a query sees only keys up to its own position.
        window: keys that a query sees counted back from its own position, that one included, and
            without `causal` as many ahead; 1 or more, None for all.
        scale: factor of the scores, > 0; None is D ** -0.5.
        gate: factor of each query head's output, [Hq] fp32 (fp64 for fp64 input), or None.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        out [Tq, Hq, D] in q's dtype. lse [Hq, Tq], fp32 (fp64 for fp64 input): natural logarithm
        of the sum of exponentiated scores, without gradient; -inf for a query that sees no key.

    Raises:
        ShapeError: shapes, dtypes, devices or ranges do not fit. What cu_seqlens hold is looked at
            on the CPU only, since looking would stall a GPU.
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: scores, softmax and sums in fp32; on a GPU, weights of 16-bit input are rounded to
    that type before they meet v, as the tensor cores take them. Scores are finite: of a query that
    meets a score of +inf or NaN the output is NaN, and whether lse is +inf or NaN depends on the
    backend. Deterministic, the gradients
    included, whatever the number of threads.
    Cost: 4 D Hq operations per visible pair; the gradient 10 D Hq.
    """
    given = (q, k, v, cu_seqlens_q, cu_seqlens_kv)
    _check_tensors(*given, gate)
    groups = [int(start) for start in q_start]
    _check_groups(groups, q, k)
    if scale is None:
        scale = q.shape[2] ** -0.5
    if not (math.isfinite(scale) and scale > 0):
        raise ShapeError(f"scale is {scale}; expected a finite number above 0, or None.")
    if window is not None and window < 1:
        raise ShapeError(f"window is {window}; expected 1 or more keys, or None for all of them.")
    # compiled code may know neither the sequences nor how many there are
    if not torch.compiler.is_compiling():
        for name, longest, tokens, cu_seqlens in (
            ("q", max_seqlen_q, q, cu_seqlens_q),
            ("kv", max_seqlen_kv, k, cu_seqlens_kv),
        ):
            _check_lengths(name, cu_seqlens, tokens.shape[0], longest)
    lengths = (max_seqlen_q, max_seqlen_kv)
    out, lse = OP(
        *(q, k, v, gate, cu_seqlens_q, cu_seqlens_kv),
        *(groups, *lengths, causal, window, scale),
        backend=backend,
    )
    return out, lse


def q_start_of(groups: Sequence[int]) -> tuple[int, ...]:
    """Turn the number of query heads per key-value head, (3, 1, 2), into `q_start`, (0, 3, 4, 6).

    Raises:
        ShapeError: a number is negative.
    """
    if any(count < 0 for count in groups):
        raise ShapeError(f"groups is {tuple(groups)}; expected query heads per key-value head.")
    return (0, *accumulate(groups))


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    gate: Tensor | None,
) -> None:
    if q.dim() != 3 or k.dim() != 3:
        raise ShapeError(
            "ragged_attention expects packed q [Tq, Hq, D] and k [Tk, Hkv, D]; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}. Flatten batch and tokens first."
        )
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ShapeError(f"The head size is {q.shape[2]}; expected 1..{MAX_HEAD_DIM}.")
    if not q.is_floating_point():
        raise ShapeError(f"q is {q.dtype}; expected a floating-point type.")
    for name, tensor, shape in (
        ("k", k, (k.shape[0], k.shape[1], q.shape[2])),
        ("v", v, (k.shape[0], k.shape[1], q.shape[2])),
    ):
        expected = (shape, q.dtype, q.device)
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != expected:
            raise ShapeError(
                f"{name} is {spell(tensor)}; expected {q.dtype} {shape} on {q.device}: q's head "
                "size, dtype and device, and k and v alike."
            )
    if gate is not None:
        exact = torch.promote_types(q.dtype, torch.float32)
        if (gate.shape, gate.dtype, gate.device) != (q.shape[1:2], exact, q.device):
            raise ShapeError(
                f"gate is {spell(gate)}; expected {exact} ({q.shape[1]},) on {q.device}: one "
                "factor per query head."
            )
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        fits = tensor.dim() == 1 and len(tensor) == len(cu_seqlens_q) >= 1
        if not fits or (tensor.dtype, tensor.device) != (torch.int32, q.device):
            raise ShapeError(
                f"{name} is {spell(tensor)}; expected torch.int32 (B + 1,) on {q.device}: where "
                "each sequence begins, and the end; cu_seqlens_q and cu_seqlens_kv alike."
            )


def _check_groups(q_start: list[int], q: Tensor, k: Tensor) -> None:
    ascending = all(one <= other for one, other in pairwise(q_start))
    fits = len(q_start) == k.shape[1] + 1 and (q_start[0], q_start[-1]) == (0, q.shape[1])
    if not (ascending and fits):
        raise ShapeError(
            f"q_start is {tuple(q_start)}; expected {k.shape[1] + 1} numbers ascending from 0 to "
            f"{q.shape[1]}, where the query heads of each key-value head begin and the end, as "
            "q_start_of gives them."
        )


def _check_lengths(name: str, cu_seqlens: Tensor, num_tokens: int, longest: int) -> None:
    if longest * (len(cu_seqlens) - 1) < num_tokens:
        raise ShapeError(
            f"max_seqlen_{name} is {longest}; {len(cu_seqlens) - 1} sequences of that length "
            f"do not hold {num_tokens} tokens."
        )
    if not cu_seqlens.is_cpu:
        return
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if (bounds[0], bounds[-1]) != (0, num_tokens) or min(lengths, default=0) < 0:
        raise ShapeError(
            f"cu_seqlens_{name} is {bounds}; expected numbers ascending from 0 to {num_tokens}, "
            "the tokens there are."
        )
    if max(lengths, default=0) > longest:
        raise ShapeError(
            f"max_seqlen_{name} is {longest}, but cu_seqlens_{name} holds a sequence of "
            f"{max(lengths)}; expected that or more."
        )


def _fake(
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
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=exact)


def _backward_fake(
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
    grad_gate = lse.new_empty((0 if gate is None else q.shape[1],))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_gate


def _bytes_moved(q: Tensor, k: Tensor, v: Tensor, *others: object) -> int:
    read_and_written = 2 * q.numel() + k.numel() + v.numel()
    return read_and_written * q.element_size() + 4 * q.shape[0] * q.shape[1]


def _backward_bytes_moved(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object
) -> int:
    # with the gradients of q, k and v
    read_and_written = 4 * q.numel() + 2 * k.numel() + 2 * v.numel()
    return read_and_written * q.element_size() + 4 * lse.numel()


def _flops(
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
) -> int:
    pairs = num_visible(cu_seqlens_q, cu_seqlens_kv, causal, window)
    return 4 * pairs * q.shape[1] * q.shape[2]


def _backward_flops(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> int:
    # five matrix products instead of two
    return _flops(*args) * 5 // 2


def _samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    return [*samples(device, dtype), *not_finite(device, dtype)]


def _why_not(q: Tensor, *others: object) -> str | None:
    if q.dtype not in compiled.DTYPES:
        return f"works on fp32, bf16 and fp16, got {q.dtype}"
    return None


BACKWARD = Op(
    "ragged_attention_bwd",
    backward_reference,
    fake=_backward_fake,
    samples=backward_samples,
    bytes_moved=_backward_bytes_moved,
    flops=_backward_flops,
    backends=(
        Backend(
            "triton",
            "interlace.triton_kernels.ragged_attention_bwd:backward",
            why_not=_why_not,
        ),
    ),
    # tensor cores cut sums of 16-bit products off instead of rounding them, so that all lean toward
    # zero, and a gate's gradient adds up every one of them (docs/decisions/0007)
    budget=Budget(ulps=8.0),
)
OP = Op(
    "ragged_attention",
    reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend(
            "triton",
            "interlace.triton_kernels.ragged_attention:forward",
            why_not=_why_not,
        ),
        Backend("cpp", compiled.forward, why_not=_why_not),
    ),
    backward=Backward(BACKWARD, wrt=("q", "k", "v", "gate"), needs_outputs=True, constant=(1,)),
)
