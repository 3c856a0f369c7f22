"""The gradients of ragged_attention: of keys and values, of queries, without atomics.

Letters: B sequences, Tq query tokens, Tk keys, Hq query heads, Hkv key-value heads, D head size.

One program per key-value head and block of keys walks over the group's query heads and their
queries, so no gradient is ever held per query head and added up later. A second kernel, laid out as
the forward one, gives the gradients of queries and gates. Weights come from the saved lse.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from interlace.ops._ragged_reference import UNBOUNDED, reach
from interlace.triton_kernels._ragged import (
    LOG2_E,
    Launch,
    Table,
    by_group,
    choose,
    fetchable,
    fits_tma,
    head_map,
    interpreted,
    launch_on,
    load_tile,
    locate,
    on_blackwell,
    on_device,
    on_hopper,
    parts_of,
    side_by_side,
    slots,
    span,
    store_tile,
)
from interlace.triton_kernels._ragged_attention_queries import PLAIN, queries_kernel, statistics_of
from interlace.triton_kernels._variants import Variant

if TYPE_CHECKING:
    from collections.abc import Sequence


@triton.jit(do_not_specialize=("num_tokens", "num_heads", "num_sequences"))
def _prepare(
    grad_out,
    out,
    lse,
    gate,
    cu_seqlens_q,
    score_start,
    grad_start,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    stride_sh,
    num_tokens,
    num_heads,
    num_sequences,
    scale,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    SEARCH: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """What is taken off the products of queries and keys, and of grad_out and values.

    -lse / scale and -<grad_out, out> / gate: the products below start from them, so that they take
    no registers. A sum that starts from a large number rounds every summand to it; PRECISE kernels
    start from zero, add -lse to the scaled product, and subtract <grad_out, out> / gate, as which
    the second is stored then: a sum the compiler would make the start of the product again. Every
    sequence has whole blocks of ROWS; behind its queries they hold -inf and 0, so that what is no
    query has no weights.
    """
    program = tl.program_id(0)
    slot = program // num_heads
    head = (program % num_heads).to(tl.int64)
    sequence, block = locate(cu_seqlens_q, slot, num_sequences, 0, ROWS, SEARCH)
    q_begin, q_length = span(cu_seqlens_q, sequence)
    row = block * ROWS
    grad_out += q_begin * stride_gt + head * stride_gh
    out += q_begin * stride_ot + head * stride_oh
    grad = load_tile(grad_out, stride_gt, row, q_length, HEAD_DIM, ROWS, 0, WIDTH, True, True)
    result = load_tile(out, stride_ot, row, q_length, HEAD_DIM, ROWS, 0, WIDTH, True, True)
    delta = tl.sum(grad * result, 1)
    if GATED:
        # of a gate of zero everything but its own gradient is zero
        factor = tl.load(gate + head)
        delta = delta / tl.where(factor == 0.0, 1.0, factor)
    rows = row + tl.arange(0, ROWS)
    lse += head * num_tokens + q_begin
    found = tl.load(lse + rows, mask=rows < q_length, other=float("-inf"))
    # a query that sees nothing has no weights either
    if PRECISE:
        start = tl.where(found == float("-inf"), found, -found)
    else:
        start = tl.where(found == float("-inf"), found, -found / scale)
    at = head * stride_sh + slot.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(score_start + at, start)
    tl.store(grad_start + at, delta if PRECISE else -delta)


@triton.jit(do_not_specialize=PLAIN)
def _keys(
    grad_out,
    score_start,
    grad_start,
    q,
    k,
    v,
    gate,
    cu_seqlens_q,
    cu_seqlens_kv,
    q_start,
    order,
    grad_k,
    grad_v,
    stride_gt,
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_sh,
    num_tokens,
    num_heads,
    num_sequences,
    slots_per_sequence,
    before,
    behind,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    BEFORE: tl.constexpr,
    BEHIND: tl.constexpr,
    GATED: tl.constexpr,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of a block of keys and values; num_heads counts those of k and v."""
    program = tl.program_id(0)
    # the largest groups first
    kv_head = tl.load(order + program % num_heads).to(tl.int64)
    sequence, block = locate(
        cu_seqlens_kv, program // num_heads, num_sequences, slots_per_sequence, BLOCK_N, SEARCH
    )
    q_begin, q_length = span(cu_seqlens_q, sequence)
    kv_begin, kv_length = span(cu_seqlens_kv, sequence)
    key = block * BLOCK_N
    if key < kv_length:
        first_head = tl.load(q_start + kv_head)
        last_head = tl.load(q_start + kv_head + 1)
        k += kv_begin * stride_kt + kv_head * stride_kh
        v += kv_begin * stride_vt + kv_head * stride_vh
        keys = load_tile(k, stride_kt, key, kv_length, HEAD_DIM, BLOCK_N, 0, PART, True, UPCAST)
        values = load_tile(v, stride_vt, key, kv_length, HEAD_DIM, BLOCK_N, 0, PART, True, UPCAST)
        acc_k = tl.zeros([BLOCK_N, PART], tl.float32)
        acc_v = tl.zeros([BLOCK_N, PART], tl.float32)
        if REST > 0:
            keys_rest = load_tile(
                k, stride_kt, key, kv_length, HEAD_DIM, BLOCK_N, PART, REST, True, UPCAST
            )
            values_rest = load_tile(
                v, stride_vt, key, kv_length, HEAD_DIM, BLOCK_N, PART, REST, True, UPCAST
            )
            acc_k_rest = tl.zeros([BLOCK_N, REST], tl.float32)
            acc_v_rest = tl.zeros([BLOCK_N, REST], tl.float32)

        # the first and the last query that sees each key, any key, all keys; those that are no keys
        # get gradients that nobody stores
        shift = kv_length - q_length
        first = key + tl.arange(0, BLOCK_N) - shift - behind
        last = first + behind + before
        low = 0
        high = q_length
        full_low = 0
        full_high = high + BLOCK_M
        if BEHIND:
            low = tl.maximum(key - shift - behind, 0) // BLOCK_M * BLOCK_M
            full_low = key + BLOCK_N - 1 - shift - behind
        if BEFORE:
            high = tl.minimum(high, key + BLOCK_N - shift + before)
            full_high = key - shift + before
        q += q_begin * stride_qt
        grad_out += q_begin * stride_gt
        if TMA:
            # a descriptor of nothing would be an illegal instruction
            heads_there = tl.maximum(last_head, 1)
            score_source = tl.make_tensor_descriptor(
                score_start, [heads_there, stride_sh], [stride_sh, 1], [1, BLOCK_M]
            )
            grad_score_source = tl.make_tensor_descriptor(
                grad_start, [heads_there, stride_sh], [stride_sh, 1], [1, BLOCK_M]
            )
            bounds = [tl.maximum(q_length, 1), heads_there, HEAD_DIM]
            q_source = tl.make_tensor_descriptor(
                q, bounds, [stride_qt, stride_qh, 1], [BLOCK_M, 1, PART]
            )
            grad_source = tl.make_tensor_descriptor(
                grad_out, bounds, [stride_gt, stride_gh, 1], [BLOCK_M, 1, PART]
            )
            if REST > 0:
                q_rest_source = tl.make_tensor_descriptor(
                    q, bounds, [stride_qt, stride_qh, 1], [BLOCK_M, 1, REST]
                )
                grad_rest_source = tl.make_tensor_descriptor(
                    grad_out, bounds, [stride_gt, stride_gh, 1], [BLOCK_M, 1, REST]
                )
        # heads and their queries in one loop, so that loads run ahead from one head to the next
        first_row = statistics_of(q_begin, sequence, ROWS).to(tl.int32)
        steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
        for step in range(0, steps * (last_head - first_head)):
            head = first_head + step // steps
            row = low + step % steps * BLOCK_M
            at_head = head.to(tl.int64)
            columns = tl.arange(0, BLOCK_M)
            head_q = q + at_head * stride_qh
            head_grad = grad_out + at_head * stride_gh
            if TMA:
                query = q_source.load([row, head, 0]).reshape([BLOCK_M, PART])
            else:
                query = load_tile(
                    head_q, stride_qt, row, q_length, HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST
                )
            if TMA:
                start = score_source.load([head, first_row + row]).reshape([BLOCK_M])
            else:
                statistics = at_head * stride_sh + first_row + row
                start = tl.load(score_start + statistics + columns)
            if PRECISE:
                scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            else:
                scores = tl.broadcast_to(start[None, :], [BLOCK_N, BLOCK_M])
            scores = tl.dot(keys, query.T, scores, input_precision="ieee")
            if REST > 0:
                if TMA:
                    query_rest = q_rest_source.load([row, head, PART]).reshape([BLOCK_M, REST])
                else:
                    query_rest = load_tile(
                        head_q,
                        stride_qt,
                        row,
                        q_length,
                        HEAD_DIM,
                        BLOCK_M,
                        PART,
                        REST,
                        True,
                        UPCAST,
                    )
                scores = tl.dot(keys_rest, query_rest.T, scores, input_precision="ieee")
            if BEHIND or BEFORE:
                at_edge = (row < full_low) | (row + BLOCK_M - 1 > full_high)
                if at_edge:
                    seen = columns[None, :] >= (first - row)[:, None]
                    if BEFORE:
                        seen = seen & (columns[None, :] <= (last - row)[:, None])
                    scores = tl.where(seen, scores, float("-inf"))
            if PRECISE:
                weights = tl.exp(scores * scale + start[None, :])
            else:
                weights = tl.exp2(scores * (scale * LOG2_E))
            if GATED:
                weights = weights * tl.load(gate + head)
            if TMA:
                grad = grad_source.load([row, head, 0]).reshape([BLOCK_M, PART])
            else:
                grad = load_tile(
                    head_grad, stride_gt, row, q_length, HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST
                )
            rounded = weights.to(grad.dtype)
            acc_v = tl.dot(rounded, grad, acc_v, input_precision="ieee")
            if TMA:
                start = grad_score_source.load([head, first_row + row]).reshape([BLOCK_M])
            else:
                start = tl.load(grad_start + statistics + columns)
            if PRECISE:
                grad_scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            else:
                grad_scores = tl.broadcast_to(start[None, :], [BLOCK_N, BLOCK_M])
            grad_scores = tl.dot(values, grad.T, grad_scores, input_precision="ieee")
            if REST > 0:
                if TMA:
                    grad = grad_rest_source.load([row, head, PART]).reshape([BLOCK_M, REST])
                else:
                    grad = load_tile(
                        head_grad,
                        stride_gt,
                        row,
                        q_length,
                        HEAD_DIM,
                        BLOCK_M,
                        PART,
                        REST,
                        True,
                        UPCAST,
                    )
                acc_v_rest = tl.dot(rounded, grad, acc_v_rest, input_precision="ieee")
                grad_scores = tl.dot(values_rest, grad.T, grad_scores, input_precision="ieee")
            if PRECISE:
                grad_scores -= start[None, :]
            grad_scores = (weights * grad_scores).to(query.dtype)
            acc_k = tl.dot(grad_scores, query, acc_k, input_precision="ieee")
            if REST > 0:
                acc_k_rest = tl.dot(grad_scores, query_rest, acc_k_rest, input_precision="ieee")

        stride = num_heads.to(tl.int64) * HEAD_DIM
        start = kv_begin * stride + kv_head * HEAD_DIM
        acc_k = acc_k * scale
        store_tile(grad_k + start, stride, key, kv_length, acc_k, HEAD_DIM, BLOCK_N, 0, PART)
        store_tile(grad_v + start, stride, key, kv_length, acc_v, HEAD_DIM, BLOCK_N, 0, PART)
        if REST > 0:
            acc_k_rest = acc_k_rest * scale
            store_tile(
                grad_k + start, stride, key, kv_length, acc_k_rest, HEAD_DIM, BLOCK_N, PART, REST
            )
            store_tile(
                grad_v + start, stride, key, kv_length, acc_v_rest, HEAD_DIM, BLOCK_N, PART, REST
            )


# (bytes of an element, largest D) -> how to launch; the first that fits
KEYS = {
    (2, 128): Launch(64, 64, 8, 2),
    (2, 256): Launch(32, 32, 8, 2),
    (4, 128): Launch(32, 32, 8, 1),
    (4, 256): Launch(16, 16, 8, 1),
}
KEYS_HOPPER = {(2, 128): Launch(64, 128, 8, 2, tma=True)}
# windows and gates need registers of their own
KEYS_HOPPER_SMALL = {(2, 128): Launch(32, 128, 8, 2, tma=True)}
QUERIES = {
    (2, 128): Launch(64, 64, 8, 2),
    (2, 256): Launch(32, 32, 8, 2),
    (4, 128): Launch(32, 32, 8, 1),
    (4, 256): Launch(16, 16, 8, 1),
}
QUERIES_HOPPER = {
    (2, 128): Launch(128, 64, 8, 2, tma=True),
    (2, 256): Launch(64, 32, 8, 2),
}
# eight warps make the compiler aim at three programs per multiprocessor, and spill
QUERIES_BLACKWELL = {(2, 128): Launch(64, 64, 4, 2), (4, 128): Launch(32, 32, 4, 1)}
# what BLOCK_M of the kernel of keys divides
ROWS = 64


def tables(by_tma: bool, blackwell: bool, gated_or_windowed: bool) -> tuple[Table, Table]:
    """How to launch the kernel of keys and the kernel of queries; Hopper is where TMA is used."""
    if blackwell:
        return KEYS, QUERIES | QUERIES_BLACKWELL
    if not by_tma:
        return KEYS, QUERIES
    keys = KEYS_HOPPER_SMALL if gated_or_windowed else KEYS_HOPPER
    return KEYS | keys, QUERIES | QUERIES_HOPPER


def backward(
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
    *,
    launch_keys: Launch | None = None,
    launch_queries: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels; arguments as in interlace/ops/ragged_attention.py."""
    num_tokens, num_heads, asked = q.shape
    num_keys, num_kv_heads, _ = k.shape
    device, size = q.device, q.element_size()
    if q.numel() == 0 or k.numel() == 0:
        gates = 0 if gate is None else num_heads
        zeros = (torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
        return (*zeros, torch.zeros(gates, dtype=torch.float32, device=device))
    grad_out, out, q, k, v = map(side_by_side, (grad_out, out, q, k, v))
    gate, cu_seqlens_q, cu_seqlens_kv = map(side_by_side, (gate, cu_seqlens_q, cu_seqlens_kv))
    if launch_keys is None and launch_queries is None:
        grad_out, out, q, k, v = fetchable(grad_out, out, q, k, v)
    head_dim = q.shape[2]
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    lse = lse.contiguous()
    num_sequences = len(cu_seqlens_q) - 1
    num_blocks = num_tokens // ROWS + num_sequences
    score_start, grad_start = (
        torch.empty((num_heads, num_blocks * ROWS), dtype=torch.float32, device=device)
        for _ in range(2)
    )
    by_tma = on_hopper(q) and all(map(fits_tma, (grad_out, q, k, v)))
    special = gate is not None or window is not None
    for_keys, for_queries = tables(by_tma, on_blackwell(q), special)
    keys = launch_keys or choose(for_keys, size, head_dim)
    queries = launch_queries or choose(for_queries, size, head_dim)
    slots_q, per_sequence_q = slots(num_tokens, num_sequences, max_seqlen_q, queries.block_m)
    slots_kv, per_sequence_kv = slots(num_keys, num_sequences, max_seqlen_kv, keys.block_n)
    gate_shape = (0, 0) if gate is None else (num_heads, slots_q)
    grad_gate = torch.empty(gate_shape, dtype=torch.float32, device=device)
    before, behind = reach(causal, window)
    part, rest = parts_of(head_dim)
    search = triton.next_power_of_2(num_sequences)
    inputs = (grad_out, score_start, grad_start, q, k, v, gate, cu_seqlens_q, cu_seqlens_kv)
    strides = [step for x in (grad_out, q, k, v) for step in x.stride()[:2]]
    strides.append(score_start.stride(0))
    constants = {
        "HEAD_DIM": head_dim,
        "PART": part,
        "REST": rest,
        "BEFORE": before < UNBOUNDED,
        "BEHIND": behind < UNBOUNDED,
        "GATED": gate is not None,
        "ROWS": ROWS,
        "PRECISE": size == 4 or gate is not None,
        "UPCAST": interpreted(),
    }

    def run() -> None:
        _prepare[(num_blocks * num_heads,)](
            *(grad_out, out, lse, gate, cu_seqlens_q, score_start, grad_start),
            *(*grad_out.stride()[:2], *out.stride()[:2], score_start.stride(0)),
            *(num_tokens, num_heads, num_sequences, scale),
            HEAD_DIM=head_dim,
            ROWS=ROWS,
            WIDTH=triton.next_power_of_2(head_dim),
            GATED=gate is not None,
            SEARCH=search,
            PRECISE=constants["PRECISE"],
        )
        _keys[(slots_kv * num_kv_heads,)](
            *(*inputs, on_device(tuple(q_start), device), by_group(q_start, device)),
            *(grad_k, grad_v, *strides),
            *(num_tokens, num_kv_heads, num_sequences, per_sequence_kv, before, behind, scale),
            SEARCH=0 if per_sequence_kv else search,
            TMA=keys.tma,
            **constants,
            **keys.options(),
        )
        queries_kernel[(slots_q * num_heads,)](
            *(*inputs, head_map(q_start, device), grad_q, grad_gate, *strides),
            *(num_tokens, num_heads, num_sequences, per_sequence_q, slots_q),
            *(before, behind, scale),
            SEARCH=0 if per_sequence_q else search,
            TMA=queries.tma,
            RELOAD=size == 4,
            **constants,
            **queries.options(),
        )

    launch_on(device, run)
    # shares in a fixed order, not atomics
    grads = (grad_q, grad_k, grad_v)
    if head_dim != asked:
        grad_q, grad_k, grad_v = (each[..., :asked].contiguous() for each in grads)
    return grad_q, grad_k, grad_v, grad_gate.sum(1)


def _variant(
    kernel: Any,
    head_dim: int,
    launch: Launch,
    capabilities: tuple[int, ...],
    name: str,
    dtype: str = "bf16",
    **constants: object,
) -> Variant:
    part, rest = parts_of(head_dim)
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}")
    types |= dict.fromkeys(("score_start", "grad_start", "gate", "grad_gate"), "*fp32")
    types |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv", "heads", "q_start", "order"), "*i32")
    types |= dict.fromkeys((*strides, *PLAIN, "num_slots"), "i32") | {"scale": "fp32"}
    if "RELOAD" in kernel.arg_names:
        constants["RELOAD"] = dtype == "fp32"
    given = {
        "HEAD_DIM": head_dim,
        "PART": part,
        "REST": rest,
        "BEFORE": False,
        "BEHIND": True,
        "GATED": False,
        "SEARCH": 0,
        "ROWS": ROWS,
        "TMA": launch.tma,
        "PRECISE": dtype == "fp32" or bool(constants.get("GATED")),
        "UPCAST": False,
        **constants,
    } | launch.blocks()
    types = {n: t for n, t in types.items() if n in kernel.arg_names and n not in given}
    # Hopper's matrix units take 64 rows; 32 by 32 tiles leave them to the older instructions
    products = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    expects = {
        capability: (product, "cp.async.bulk.tensor" if launch.tma else "cp.async")
        for capability, product in products.items()
        if (dtype == "bf16" and min(launch.block_m, launch.block_n) >= 64) or launch.tma
    }
    result = kernel.__name__.strip("_").removesuffix("_kernel")
    return Variant(
        name=f"{result}, head {head_dim}, {dtype}, {name}" + (", TMA" if launch.tma else ""),
        kernel=kernel,
        types=types,
        constants=given,
        # from head to head it is D elements
        aligned=tuple(
            n
            for n, t in types.items()
            if t.startswith("*") or (n in strides and (head_dim % 16 == 0 or n.endswith("t")))
        ),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        capabilities=capabilities,
        expects=expects,
    )


def variants() -> list[Variant]:
    """What is launched on real shapes."""
    found = []
    special = {"BEFORE": True, "GATED": True, "SEARCH": 64}
    # on Hopper 16-bit tensors can be fetched by TMA, and what is launched there may do so
    for by_tma, generations in ((False, (80,)), (False, (100,)), (True, (90,))):
        blackwell = generations == (100,)
        plain, small = (tables(by_tma, blackwell, each) for each in (False, True))
        for place, kernel in enumerate((_keys, queries_kernel)):
            for head_dim in (64, 72, 80, 128, 256) if by_tma else (128, 256):
                launch = choose(plain[place], 2, head_dim)
                found.append(_variant(kernel, head_dim, launch, generations, "causal"))
            launch = choose(small[place], 2, 128)
            name = "window, gate, 64 lengths"
            found.append(_variant(kernel, 128, launch, generations, name, **special))
            launch = choose(plain[place], 4, 128)
            found.append(_variant(kernel, 128, launch, generations, "causal", "fp32"))
        launch = choose(plain[0], 2, 128)
        found.append(_variant(_keys, 128, launch, generations, "full", BEHIND=False))
    return found
