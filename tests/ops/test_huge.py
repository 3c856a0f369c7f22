"""Tensors of more than 2**31 elements: an address computed in 32 bits would miss the last rows.

What an op makes of the last rows of a huge tensor is what it makes of a copy of these rows alone:
bit for bit where rows are treated one by one, within the error budget where work is split by size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interlace import ops
from interlace.ops._check import in_fp64, outputs
from interlace.ops._registry import OPS

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MANY = 2**31
LAST = 3
BACKENDS = ["triton", "cuda"]


def huge(*size: int, last: int = LAST) -> torch.Tensor:
    """Zeros in bf16 on the GPU, normal numbers in the last rows."""
    tensor = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    assert tensor.numel() > MANY
    tensor[-last:].normal_(generator=torch.Generator("cuda").manual_seed(0))
    return tensor


def assert_in_budget(op: str, found: torch.Tensor, *args: Any) -> None:
    """Hold a part of a result to the reference on the part of the arguments that it comes from."""
    plain, truth = (outputs(OPS[op].reference(*given))[0] for given in (args, in_fp64(args)))
    assert OPS[op].budget.excess(found, plain, truth) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_similarity(backend: str) -> None:
    width = 4096
    states = [huge(MANY // width + LAST, width) for _ in range(3)]
    groups = torch.zeros(len(states[0]), dtype=torch.int32, device="cuda")
    groups[-LAST:] = 1
    found, counts = ops.layer_similarity(states, groups, num_groups=2, backend=backend)
    assert counts.tolist() == [len(groups) - LAST, LAST]
    tail = [state[-LAST:].clone() for state in states]
    assert_in_budget("layer_similarity", found[1:], tail, groups[-LAST:] - 1, 1, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bridge_norm(backend: str) -> None:
    width = 4096
    x = huge(MANY // width + LAST, width)
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    found = ops.bridge_norm(x, x, weight, eps=1e-6, backend=backend)
    tail = x[-LAST:].clone()
    expected = ops.bridge_norm(tail, tail, weight, eps=1e-6, backend=backend)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[-LAST:], other)


def test_qk_norm_rope() -> None:
    heads, size = 32, 128
    q = huge(MANY // (heads * size) + LAST, heads, size)
    k = q[:, :1]
    angles = torch.rand(len(q), size // 2, device="cuda")
    weight = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    norms = {"q_weight": weight, "k_weight": weight, "backend": "triton"}
    found = ops.qk_norm_rope(q, k, angles.cos(), angles.sin(), **norms)
    tail = q[-LAST:].clone()
    angles = angles[-LAST:].clone()
    expected = ops.qk_norm_rope(tail, tail[:, :1], angles.cos(), angles.sin(), **norms)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[-LAST:], other)


@pytest.mark.parametrize("merged", [True, False])
def test_silu_mul(merged: bool) -> None:
    width = 4096
    rows = MANY // width + LAST
    if merged:
        gate, up = huge(rows, 2 * width).chunk(2, dim=-1)
    else:
        gate = up = huge(rows, width)
    found = ops.silu_mul(gate, up, backend="triton")
    tail = gate[-LAST:].clone(), up[-LAST:].clone()
    expected = ops.silu_mul(*tail, backend="triton")
    assert torch.equal(found[-LAST:], expected)
    backward = OPS["silu_mul_bwd"]
    gradients = backward(found, gate, up, backend="triton")
    for one, other in zip(gradients, backward(expected, *tail, backend="triton"), strict=True):
        assert torch.equal(one[-LAST:], other)


def test_ragged_attention() -> None:
    heads, size, length = 64, 128, 128
    q = huge((MANY // (heads * size) // length + 1) * length, heads, size, last=length)
    k = q[:, :2].clone()
    starts = torch.arange(0, len(q) + 1, length, dtype=torch.int32, device="cuda")
    common = {
        "max_seqlen_q": length,
        "max_seqlen_kv": length,
        "q_start": (0, 23, heads),
        "causal": True,
        "backend": "triton",
    }
    found, _ = ops.ragged_attention(q, k, k, cu_seqlens_q=starts, cu_seqlens_kv=starts, **common)
    tail, keys, one = q[-length:].clone(), k[-length:].clone(), starts[:2].clone()
    expected, _ = ops.ragged_attention(
        tail, keys, keys, cu_seqlens_q=one, cu_seqlens_kv=one, **common
    )
    assert torch.equal(found[-length:], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_decode(backend: str) -> None:
    kv_heads, size, capacity = 8, 128, 65536
    cache = huge(MANY // (kv_heads * size * capacity) + LAST, kv_heads, capacity, size)
    q = torch.randn(len(cache), 1, 24, size, dtype=torch.bfloat16, device="cuda")
    lengths = torch.full((len(cache),), capacity, dtype=torch.int32, device="cuda")
    q_start = (0, 1, 6, 9, 12, 15, 18, 21, 24)
    found = ops.ragged_decode(q, cache, cache, lengths=lengths, q_start=q_start, backend=backend)
    tail = cache[-1:].clone()
    scale = size**-0.5
    args = (q[-1:], tail, tail, lengths[-1:], None, None, list(q_start), None, scale, None)
    assert_in_budget("ragged_decode", found[-1:], *args)


def test_skinny_linear() -> None:
    width = 4096
    weight = huge(MANY // width + LAST, width)
    x = torch.randn(2, width, dtype=torch.bfloat16, device="cuda")
    found = ops.skinny_linear(x, weight, backend="triton")
    assert_in_budget("skinny_linear", found[:, -LAST:], x, weight[-LAST:].clone(), None, False)
