"""The gradients of ragged_attention's queries and gates: one program per block of queries.

Letters: B sequences, Tq query tokens, Tk keys, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from interlace.triton_kernels._ragged import (
    LOG2_E,
    load_tile,
    locate,
    span,
    store_tile,
)

# sizes that must not make a kernel of their own when they happen to be 1 or a multiple of 16
PLAIN = ("num_tokens", "num_heads", "num_sequences", "slots_per_sequence", "before", "behind")


@triton.jit
def statistics_of(q_begin, sequence, ROWS: tl.constexpr):
    """Where the statistics of a sequence begin in their rows."""
    return (q_begin // ROWS + sequence) * ROWS


@triton.jit(do_not_specialize=(*PLAIN, "num_slots"))
def queries_kernel(
    grad_out,
    score_start,
    grad_start,
    q,
    k,
    v,
    gate,
    cu_seqlens_q,
    cu_seqlens_kv,
    heads,
    grad_q,
    grad_gate,
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
    num_slots,
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
    RELOAD: tl.constexpr,
    PRECISE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of a block of queries, and its share of the gate's, grad_gate [Hq, num_slots]."""
    program = tl.program_id(0)
    slot = program // num_heads
    head = (program % num_heads).to(tl.int64)
    sequence, block = locate(cu_seqlens_q, slot, num_sequences, slots_per_sequence, BLOCK_M, SEARCH)
    q_begin, q_length = span(cu_seqlens_q, sequence)
    kv_begin, kv_length = span(cu_seqlens_kv, sequence)
    num_blocks = tl.cdiv(q_length, BLOCK_M)
    share = 0.0
    if block < num_blocks:
        if BEHIND:
            # the longest first
            block = num_blocks - 1 - block
        kv_head = tl.load(heads + head).to(tl.int64)
        row = block * BLOCK_M
        head_q = q + q_begin * stride_qt + head * stride_qh
        head_grad = grad_out + q_begin * stride_gt + head * stride_gh
        head_k = k + kv_begin * stride_kt + kv_head * stride_kh
        head_v = v + kv_begin * stride_vt + kv_head * stride_vh
        rows = row + tl.arange(0, BLOCK_M)
        statistics = head * stride_sh + statistics_of(q_begin, sequence, ROWS)
        start = tl.load(score_start + statistics + rows, mask=rows < q_length, other=float("-inf"))
        less = tl.load(grad_start + statistics + rows, mask=rows < q_length, other=0.0)
        if GATED:
            factor = tl.load(gate + head)
        query = load_tile(
            head_q, stride_qt, row, q_length, HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST
        )
        grad = load_tile(
            head_grad, stride_gt, row, q_length, HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST
        )
        acc = tl.zeros([BLOCK_M, PART], tl.float32)
        if REST > 0:
            query_rest = load_tile(
                head_q, stride_qt, row, q_length, HEAD_DIM, BLOCK_M, PART, REST, True, UPCAST
            )
            grad_rest = load_tile(
                head_grad, stride_gt, row, q_length, HEAD_DIM, BLOCK_M, PART, REST, True, UPCAST
            )
            acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
        shares = tl.zeros([BLOCK_M], tl.float32)

        first = row + kv_length - q_length
        position = first + tl.arange(0, BLOCK_M)
        low = 0
        high = kv_length
        full_low = 0
        full_high = kv_length - 1
        if BEFORE:
            low = tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N
            full_low = first + BLOCK_M - 1 - before
        if BEHIND:
            high = tl.minimum(high, first + BLOCK_M + behind)
            full_high = tl.minimum(full_high, first + behind)
        if TMA:
            # a descriptor of no rows would be an illegal instruction
            kv_rows = tl.maximum(kv_length, 1)
            k_source = tl.make_tensor_descriptor(
                head_k, [kv_rows, HEAD_DIM], [stride_kt, 1], [BLOCK_N, PART]
            )
            v_source = tl.make_tensor_descriptor(
                head_v, [kv_rows, HEAD_DIM], [stride_vt, 1], [BLOCK_N, PART]
            )
            if REST > 0:
                k_rest_source = tl.make_tensor_descriptor(
                    head_k, [kv_rows, HEAD_DIM], [stride_kt, 1], [BLOCK_N, REST]
                )
                v_rest_source = tl.make_tensor_descriptor(
                    head_v, [kv_rows, HEAD_DIM], [stride_vt, 1], [BLOCK_N, REST]
                )
        for key in range(low, high, BLOCK_N):
            if RELOAD:
                # the place depends on the key for the compiler's eyes, lest it keep in registers
                # what does not change
                query = load_tile(
                    head_q, stride_qt, row + tl.minimum(key, 0), q_length,
                    HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST,
                )  # fmt: skip
                if REST > 0:
                    query_rest = load_tile(
                        head_q, stride_qt, row + tl.minimum(key, 0), q_length,
                        HEAD_DIM, BLOCK_M, PART, REST, True, UPCAST,
                    )  # fmt: skip
            if TMA:
                keys = k_source.load([key, 0])
            else:
                keys = load_tile(
                    head_k, stride_kt, key, kv_length, HEAD_DIM, BLOCK_N, 0, PART, True, UPCAST
                )
            if PRECISE:
                scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            else:
                scores = tl.broadcast_to(start[:, None], [BLOCK_M, BLOCK_N])
            scores = tl.dot(query, keys.T, scores, input_precision="ieee")
            if REST > 0:
                if TMA:
                    keys_rest = k_rest_source.load([key, PART])
                else:
                    keys_rest = load_tile(
                        head_k,
                        stride_kt,
                        key,
                        kv_length,
                        HEAD_DIM,
                        BLOCK_N,
                        PART,
                        REST,
                        True,
                        UPCAST,
                    )
                scores = tl.dot(query_rest, keys_rest.T, scores, input_precision="ieee")
            if (key < full_low) | (key + BLOCK_N - 1 > full_high):
                numbers = key + tl.arange(0, BLOCK_N)[None, :]
                seen = numbers < kv_length
                if BEFORE:
                    seen = seen & (numbers >= (position - before)[:, None])
                if BEHIND:
                    seen = seen & (numbers <= (position + behind)[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            if PRECISE:
                weights = tl.exp(scores * scale + start[:, None])
            else:
                weights = tl.exp2(scores * (scale * LOG2_E))
            if TMA:
                values = v_source.load([key, 0])
            else:
                values = load_tile(
                    head_v, stride_vt, key, kv_length, HEAD_DIM, BLOCK_N, 0, PART, True, UPCAST
                )
            if RELOAD:
                grad = load_tile(
                    head_grad, stride_gt, row + tl.minimum(key, 0), q_length,
                    HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST,
                )  # fmt: skip
                if REST > 0:
                    grad_rest = load_tile(
                        head_grad, stride_gt, row + tl.minimum(key, 0), q_length,
                        HEAD_DIM, BLOCK_M, PART, REST, True, UPCAST,
                    )  # fmt: skip
            grad_weights = tl.dot(grad, values.T, input_precision="ieee")
            if REST > 0:
                if TMA:
                    values = v_rest_source.load([key, PART])
                else:
                    values = load_tile(
                        head_v,
                        stride_vt,
                        key,
                        kv_length,
                        HEAD_DIM,
                        BLOCK_N,
                        PART,
                        REST,
                        True,
                        UPCAST,
                    )
                grad_weights = tl.dot(grad_rest, values.T, grad_weights, input_precision="ieee")
            if GATED:
                shares += tl.sum(weights * grad_weights, 1)
                weights = weights * factor
            if PRECISE:
                grad_scores = weights * (grad_weights - less[:, None])
            else:
                grad_scores = weights * (grad_weights + less[:, None])
            grad_scores = grad_scores.to(keys.dtype)
            acc = tl.dot(grad_scores, keys, acc, input_precision="ieee")
            if REST > 0:
                acc_rest = tl.dot(grad_scores, keys_rest, acc_rest, input_precision="ieee")

        share = tl.sum(shares, 0)
        stride = num_heads.to(tl.int64) * HEAD_DIM
        start = grad_q + q_begin * stride + head * HEAD_DIM
        acc = acc * scale
        store_tile(start, stride, row, q_length, acc, HEAD_DIM, BLOCK_M, 0, PART)
        if REST > 0:
            acc_rest = acc_rest * scale
            store_tile(start, stride, row, q_length, acc_rest, HEAD_DIM, BLOCK_M, PART, REST)
    if GATED:
        tl.store(grad_gate + head * num_slots + slot, share)
