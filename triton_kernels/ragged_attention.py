"""ragged_attention on tensor cores: one program per query head and block of queries.

Letters: B sequences, Tq query tokens, Tk keys, Hq query heads, Hkv key-value heads, D head size.

Scores live in units of log2, so that the exponential is one instruction. Blocks of keys that nobody
sees are left out; only those at an edge (the diagonal, the window, the end) are masked. Programs
of query heads with one key-value head run side by side and find its keys in the second-level cache;
with a causal mask the longest come first.

On Hopper, keys and values come by TMA, through descriptors that end where the sequence ends.

Source: FlashAttention-2 (arXiv 2307.08691), FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from interlace.ops._ragged_reference import UNBOUNDED, reach
from interlace.triton_kernels._ragged import (
    LN_2,
    LOG2_E,
    Launch,
    choose,
    fetchable,
    fits_tma,
    head_map,
    interpreted,
    launch_on,
    load_tile,
    locate,
    on_hopper,
    parts_of,
    side_by_side,
    slots,
    span,
    store_tile,
)
from interlace.triton_kernels._variants import Variant

if TYPE_CHECKING:
    from collections.abc import Sequence

# sizes that must not make a kernel of their own when they happen to be 1 or a multiple of 16
_PLAIN = (
    "num_tokens",
    "num_heads",
    "num_sequences",
    "slots_per_sequence",
    "before",
    "behind",
)


@triton.jit(do_not_specialize=_PLAIN)
def _forward(
    q,
    k,
    v,
    gate,
    cu_seqlens_q,
    cu_seqlens_kv,
    heads,
    out,
    lse,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
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
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # heads of one key-value head side by side
    program = tl.program_id(0)
    slot = program // num_heads
    head = (program % num_heads).to(tl.int64)
    sequence, block = locate(cu_seqlens_q, slot, num_sequences, slots_per_sequence, BLOCK_M, SEARCH)
    q_begin, q_length = span(cu_seqlens_q, sequence)
    kv_begin, kv_length = span(cu_seqlens_kv, sequence)
    num_blocks = tl.cdiv(q_length, BLOCK_M)
    # nothing to read or to write beyond the sequence
    kv_length = tl.where(block < num_blocks, kv_length, 0)
    if BEHIND:
        block = tl.where(block < num_blocks, num_blocks - 1 - block, block)
    kv_head = tl.load(heads + head).to(tl.int64)
    row = block * BLOCK_M
    # an empty sequence may begin where the memory ends
    q += tl.where(q_length > 0, q_begin, 0) * stride_qt + head * stride_qh
    k += kv_begin * stride_kt + kv_head * stride_kh
    v += kv_begin * stride_vt + kv_head * stride_vh
    scale_log2 = scale * LOG2_E

    acc = tl.zeros([BLOCK_M, PART], tl.float32)
    if TMA:
        # made per program, so that rows beyond the sequence read as zeros; one of no rows at all
        # would be an illegal instruction
        q_rows = tl.maximum(q_length, 1)
        kv_rows = tl.maximum(kv_length, 1)
        query = tl.make_tensor_descriptor(
            q, [q_rows, HEAD_DIM], [stride_qt, 1], [BLOCK_M, PART]
        ).load([row, 0])
        key_source = tl.make_tensor_descriptor(
            k, [kv_rows, HEAD_DIM], [stride_kt, 1], [BLOCK_N, PART]
        )
        value_source = tl.make_tensor_descriptor(
            v, [kv_rows, HEAD_DIM], [stride_vt, 1], [BLOCK_N, PART]
        )
    else:
        query = load_tile(q, stride_qt, row, q_length, HEAD_DIM, BLOCK_M, 0, PART, True, UPCAST)
    if REST > 0:
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
        if TMA:
            query_rest = tl.make_tensor_descriptor(
                q, [q_rows, HEAD_DIM], [stride_qt, 1], [BLOCK_M, REST]
            ).load([row, PART])
            key_rest_source = tl.make_tensor_descriptor(
                k, [kv_rows, HEAD_DIM], [stride_kt, 1], [BLOCK_N, REST]
            )
            value_rest_source = tl.make_tensor_descriptor(
                v, [kv_rows, HEAD_DIM], [stride_vt, 1], [BLOCK_N, REST]
            )
        else:
            query_rest = load_tile(
                q, stride_qt, row, q_length, HEAD_DIM, BLOCK_M, PART, REST, True, UPCAST
            )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    # the first and the last key that each row sees, that any row sees, that all rows see
    first = row + kv_length - q_length
    position = first + tl.arange(0, BLOCK_M)
    lowest = tl.zeros([BLOCK_M], tl.int32)
    highest = tl.zeros([BLOCK_M], tl.int32) + (kv_length - 1)
    low = 0
    high = kv_length
    full_low = 0
    full_high = kv_length - 1
    if BEFORE:
        lowest = position - before
        low = tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N
        full_low = first + BLOCK_M - 1 - before
    if BEHIND:
        highest = tl.minimum(position + behind, highest)
        high = tl.minimum(high, first + BLOCK_M + behind)
        full_high = tl.minimum(full_high, first + behind)
    for key in range(low, high, BLOCK_N):
        if TMA:
            keys = key_source.load([key, 0])
        else:
            keys = load_tile(k, stride_kt, key, kv_length, HEAD_DIM, BLOCK_N, 0, PART, True, UPCAST)
        scores = tl.dot(query, keys.T, input_precision="ieee")
        if REST > 0:
            if TMA:
                keys = key_rest_source.load([key, PART])
            else:
                keys = load_tile(
                    k, stride_kt, key, kv_length, HEAD_DIM, BLOCK_N, PART, REST, True, UPCAST
                )
            scores = tl.dot(query_rest, keys.T, scores, input_precision="ieee")
        if (key < full_low) | (key + BLOCK_N - 1 > full_high):
            numbers = tl.arange(0, BLOCK_N)[None, :]
            seen = numbers <= (highest - key)[:, None]
            if BEFORE:
                seen = seen & (numbers >= (lowest - key)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        # a row that has seen nothing yet: exp2(-inf - 0) = 0
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if TMA:
            values = value_source.load([key, 0])
        else:
            values = load_tile(
                v, stride_vt, key, kv_length, HEAD_DIM, BLOCK_N, 0, PART, True, UPCAST
            )
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        if REST > 0:
            acc_rest = acc_rest * decay[:, None]
            if TMA:
                values = value_rest_source.load([key, PART])
            else:
                values = load_tile(
                    v, stride_vt, key, kv_length, HEAD_DIM, BLOCK_N, PART, REST, True, UPCAST
                )
            acc_rest = tl.dot(weights.to(values.dtype), values, acc_rest, input_precision="ieee")
        top = new_top

    divisor = tl.where(total == 0.0, 1.0, total)
    found = tl.where(total == 0.0, float("-inf"), (top + tl.log2(divisor)) * LN_2)
    rows = row + tl.arange(0, BLOCK_M)
    at = lse + head * num_tokens + q_begin + rows
    tl.store(at, found, mask=rows < q_length)
    factor = 1.0 / divisor
    if GATED:
        factor = factor * tl.load(gate + head)
    stride_ot = num_heads.to(tl.int64) * HEAD_DIM
    out += q_begin * stride_ot + head * HEAD_DIM
    acc = acc * factor[:, None]
    store_tile(out, stride_ot, row, q_length, acc, HEAD_DIM, BLOCK_M, 0, PART)
    if REST > 0:
        acc_rest = acc_rest * factor[:, None]
        store_tile(out, stride_ot, row, q_length, acc_rest, HEAD_DIM, BLOCK_M, PART, REST)


# (bytes of an element, largest D) -> how to launch; the first that fits
POINTERS = {
    (2, 128): Launch(128, 64, 8, 2),
    (2, 256): Launch(64, 32, 8, 2),
    (4, 256): Launch(32, 32, 8, 1),
}
HOPPER = {
    (2, 128): Launch(128, 128, 8, 2, tma=True),
    (2, 256): Launch(128, 64, 8, 2, tma=True),
}


def launch_for(q: Tensor, k: Tensor, v: Tensor) -> Launch:
    """How to launch on given tensors."""
    by_tma = on_hopper(q) and all(map(fits_tma, (q, k, v)))
    return choose(POINTERS | HOPPER if by_tma else POINTERS, q.element_size(), q.shape[2])


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in interlace/ops/ragged_attention.py."""
    num_tokens, num_heads, asked = q.shape
    q, k, v = map(side_by_side, (q, k, v))
    gate, cu_seqlens_q, cu_seqlens_kv = map(side_by_side, (gate, cu_seqlens_q, cu_seqlens_kv))
    if launch is None:
        q, k, v = fetchable(q, k, v)
    head_dim = q.shape[2]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    launch = launch or launch_for(q, k, v)
    num_sequences = len(cu_seqlens_q) - 1
    num_slots, per_sequence = slots(num_tokens, num_sequences, max_seqlen_q, launch.block_m)
    before, behind = reach(causal, window)
    part, rest = parts_of(head_dim)

    def run() -> None:
        _forward[(num_slots * num_heads,)](
            *(q, k, v, gate, cu_seqlens_q, cu_seqlens_kv, head_map(q_start, q.device), out, lse),
            *(stride for tensor in (q, k, v) for stride in tensor.stride()[:2]),
            *(num_tokens, num_heads, num_sequences, per_sequence),
            *(before, behind, scale),
            HEAD_DIM=head_dim,
            PART=part,
            REST=rest,
            BEFORE=before < UNBOUNDED,
            BEHIND=behind < UNBOUNDED,
            GATED=gate is not None,
            SEARCH=0 if per_sequence else triton.next_power_of_2(num_sequences),
            TMA=launch.tma,
            UPCAST=interpreted(),
            **launch.options(),
        )

    launch_on(q.device, run)
    return out if head_dim == asked else out[..., :asked].contiguous(), lse


_POINTERS = ("q", "k", "v", "gate", "cu_seqlens_q", "cu_seqlens_kv", "heads", "out", "lse")
_STRIDES = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh")


def _variant(
    head_dim: int, launch: Launch, capabilities: tuple[int, ...], name: str, **constants: object
) -> Variant:
    dtype = constants.pop("dtype", "bf16")
    part, rest = parts_of(head_dim)
    given = {"BEFORE": False, "BEHIND": True, "GATED": False, "SEARCH": 0} | constants
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    types |= {"gate": "*fp32", "lse": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv", "heads"), "*i32")
    types |= dict.fromkeys((*_STRIDES, *_PLAIN), "i32")
    tensor_cores = {90: ("wgmma.mma_async",), 80: ("mma.sync",), 100: ("tcgen05.mma",)}
    loads = {80: ("cp.async",), 90: ("cp.async",), 100: ("cp.async",)}
    if launch.tma:
        loads = {90: ("cp.async.bulk.tensor",)}
    expects = {c: tensor_cores[c] + loads[c] for c in capabilities} if dtype == "bf16" else {}
    return Variant(
        name=f"head {head_dim}, {dtype}, {name}",
        kernel=_forward,
        types=types,
        constants={
            "HEAD_DIM": head_dim,
            **launch.blocks(),
            "PART": part,
            "REST": rest,
            "TMA": launch.tma,
            "UPCAST": False,
            **given,
        },
        # from head to head it is D elements
        aligned=_POINTERS + tuple(s for s in _STRIDES if head_dim % 16 == 0 or s.endswith("t")),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        capabilities=capabilities,
        expects=expects,
    )


def variants() -> list[Variant]:
    """What is launched on real shapes."""
    # on Hopper 16-bit tiles come by TMA
    others, hopper = (80, 100), (90,)
    found = []
    for head_dim in (64, 72, 80, 96, 128, 256):
        by_tma = choose(HOPPER, 2, head_dim)
        found.append(_variant(head_dim, by_tma, hopper, "causal, TMA"))
    for head_dim in (64, 80, 96, 128, 256):
        plain = choose(POINTERS, 2, head_dim)
        found.append(_variant(head_dim, plain, others, "causal"))
    by_tma, plain = choose(HOPPER, 2, 128), choose(POINTERS, 2, 128)
    for name, constants in (
        ("full", {"BEHIND": False}),
        ("window, gate", {"BEFORE": True, "GATED": True}),
        ("causal, 64 lengths", {"SEARCH": 64}),
    ):
        found.append(_variant(128, by_tma, hopper, f"{name}, TMA", **constants))
        found.append(_variant(128, plain, others, name, **constants))
    fp32 = choose(POINTERS, 4, 128)
    found.append(_variant(128, fp32, (80, 90, 100), "causal", dtype="fp32"))
    return found
