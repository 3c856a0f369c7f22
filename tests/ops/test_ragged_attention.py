"""What is special to ragged_attention: equality with SDPA, its masks, its refusals."""

from __future__ import annotations

import importlib
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from interlace import ops
from interlace.errors import ShapeError
from interlace.ops._budget import Budget

BACKENDS = ["torch", "cpp"]

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.ragged_attention")


def prefix(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def draw(
    lengths_q: list[int], lengths_kv: list[int], groups: list[int], head_dim: int
) -> dict[str, Any]:
    return {
        "q": torch.randn(sum(lengths_q), sum(groups), head_dim),
        "k": torch.randn(sum(lengths_kv), len(groups), head_dim),
        "v": torch.randn(sum(lengths_kv), len(groups), head_dim),
        "cu_seqlens_q": prefix(lengths_q),
        "cu_seqlens_kv": prefix(lengths_kv),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_kv": max(lengths_kv),
        "q_start": ops.q_start_of(groups),
    }


def by_sdpa(
    case: dict[str, Any],
    causal: bool,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """SDPA on gathered heads, with a written-out mask, sequence by sequence."""
    q, k, v = (case[name].to(dtype) for name in ("q", "k", "v"))
    starts = case["q_start"]
    head_map = [n for n, (a, b) in enumerate(pairwise(starts)) for _ in range(a, b)]
    spans = (pairwise(case[name].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_kv"))
    found = []
    for (a, b), (c, d) in zip(*spans, strict=True):
        offset = torch.arange(d - c) - torch.arange(b - a)[:, None] - (d - c) + (b - a)
        seen = offset <= 0 if causal else torch.ones_like(offset, dtype=torch.bool)
        if window is not None:
            seen &= offset.abs() < window
        key, value = (x[c:d, head_map].transpose(0, 1) for x in (k, v))
        out = scaled_dot_product_attention(q[a:b].transpose(0, 1), key, value, attn_mask=seen)
        # SDPA leaves rows that see nothing open
        out = out.masked_fill(~seen.any(1)[:, None], 0)
        found.append(out.transpose(0, 1))
    return torch.cat(found)


def assert_equal_to_sdpa(
    found: torch.Tensor, case: dict[str, Any], causal: bool, window: int | None = None
) -> None:
    truth = by_sdpa(case, causal, window)
    plain = by_sdpa(case, causal, window, dtype=torch.float32)
    excess = Budget().excess(found, plain, truth)
    assert excess is None, excess


GROUPS = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(sum)
LENGTHS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=4
).filter(lambda pairs: any(a and b for a, b in pairs))


@settings(max_examples=60, deadline=None)
@given(
    groups=GROUPS,
    lengths=LENGTHS,
    head_dim=st.sampled_from([1, 8, 33, 64]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    backend=st.sampled_from(BACKENDS),
)
def test_any_ragged_map_equals_sdpa_on_gathered_heads(
    groups: list[int],
    lengths: list[tuple[int, int]],
    head_dim: int,
    causal: bool,
    window: int | None,
    backend: str,
) -> None:
    case = draw([a for a, _ in lengths], [b for _, b in lengths], groups, head_dim)
    out, _ = ops.ragged_attention(**case, causal=causal, window=window, backend=backend)
    assert_equal_to_sdpa(out, case, causal, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_uniform_map_equals_grouped_sdpa(backend: str, causal: bool) -> None:
    case = draw([50], [50], [3, 3], 32)
    out, _ = ops.ragged_attention(**case, causal=causal, backend=backend)
    q, k, v = (case[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
    plain = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    excess = Budget().excess(out, plain[0].transpose(0, 1), by_sdpa(case, causal))
    assert excess is None, excess


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_queries_against_a_longer_past_equal_the_end_of_the_whole(backend: str) -> None:
    whole = draw([40], [40], [2, 1], 16)
    chunk = whole | {
        "q": whole["q"][-7:],
        "cu_seqlens_q": prefix([7]),
        "max_seqlen_q": 7,
    }
    found, lse = ops.ragged_attention(**chunk, causal=True, backend=backend)
    expected, expected_lse = ops.ragged_attention(**whole, causal=True, backend=backend)
    torch.testing.assert_close(found, expected[-7:])
    torch.testing.assert_close(lse, expected_lse[:, -7:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_give_what_each_gives_alone(backend: str, causal: bool) -> None:
    lengths_q, lengths_kv = [5, 0, 1, 33], [5, 4, 20, 35]
    packed = draw(lengths_q, lengths_kv, [1, 2], 16)
    out, lse = ops.ragged_attention(**packed, causal=causal, backend=backend)
    spans = zip(
        pairwise(packed["cu_seqlens_q"].tolist()),
        pairwise(packed["cu_seqlens_kv"].tolist()),
        strict=True,
    )
    for (a, b), (c, d) in spans:
        alone = packed | {
            "q": packed["q"][a:b],
            "k": packed["k"][c:d],
            "v": packed["v"][c:d],
            "cu_seqlens_q": prefix([b - a]),
            "cu_seqlens_kv": prefix([d - c]),
        }
        found, found_lse = ops.ragged_attention(**alone, causal=causal, backend=backend)
        torch.testing.assert_close(found, out[a:b])
        torch.testing.assert_close(found_lse, lse[:, a:b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_the_log_of_the_sum_and_the_gate_a_factor(backend: str) -> None:
    case = draw([12], [12], [2, 1], 8)
    gate = torch.tensor([0.5, -2.0, 0.0])
    plain, _ = ops.ragged_attention(**case, causal=False, scale=0.7, backend=backend)
    gated, lse = ops.ragged_attention(**case, causal=False, scale=0.7, gate=gate, backend=backend)
    torch.testing.assert_close(gated, plain * gate[:, None])
    scores = 0.7 * torch.einsum("ihd,jhd->hij", case["q"], case["k"][:, [0, 0, 1]])
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_see_no_key_give_zero(backend: str) -> None:
    case = draw([9, 2], [4, 0], [1, 1], 8)
    out, lse = ops.ragged_attention(**case, causal=True, backend=backend)
    blind = torch.tensor([True] * 5 + [False] * 4 + [True] * 2)
    assert not out[blind].any()
    assert bool(out[~blind].all())
    assert torch.equal(lse.isneginf(), blind.expand(2, 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend: str) -> None:
    case = draw([40, 30], [40, 30], [1, 2], 16)
    for name in ("k", "v"):
        case[name][40:] = float("nan")
    out, lse = ops.ragged_attention(**case, causal=False, backend=backend)
    assert bool(out[:40].isfinite().all())
    assert bool(lse[:, :40].isfinite().all())
    assert bool(out[40:].isnan().all())
    assert bool(lse[:, 40:].isnan().all())


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 9)])
def test_gradients_equal_those_of_sdpa_on_gathered_heads(causal: bool, window: int | None) -> None:
    case = draw([13, 20], [13, 25], [3, 0, 1, 2], 8)
    for name in ("q", "k", "v"):
        case[name] = case[name].double().requires_grad_()
    leaves = [case[name] for name in ("q", "k", "v")]
    out, lse = ops.ragged_attention(**case, causal=causal, window=window)
    assert not lse.requires_grad
    seed = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, seed)
    expected = torch.autograd.grad(by_sdpa(case, causal, window), leaves, seed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradient_of_the_gate_is_the_output_without_it() -> None:
    case = draw([10], [10], [1, 2], 8)
    gate = torch.tensor([0.0, 1.5, -1.0], requires_grad=True)
    out, _ = ops.ragged_attention(**case, causal=True, gate=gate)
    seed = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, gate, seed)
    plain, _ = ops.ragged_attention(**case, causal=True)
    torch.testing.assert_close(found, (plain * seed).sum((0, 2)))


def test_groups_become_a_prefix_array() -> None:
    assert ops.q_start_of([3, 0, 2]) == (0, 3, 3, 5)
    assert ops.q_start_of([]) == (0,)
    with pytest.raises(ShapeError, match="query heads per key-value head"):
        ops.q_start_of([2, -1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 6, 3, 8)}, r"\[Tq, Hq, D\]"),
        ({"q": torch.zeros(6, 3, 257), "k": torch.zeros(6, 2, 257)}, "head size is 257"),
        ({"q": torch.zeros(6, 3, 8, dtype=torch.int64)}, "floating-point"),
        ({"k": torch.zeros(6, 2, 9)}, r"k is .* expected torch.float32 \(6, 2, 8\)"),
        ({"v": torch.zeros(5, 2, 8)}, r"v is .* expected torch.float32 \(6, 2, 8\)"),
        ({"v": torch.zeros(6, 2, 8).half()}, "k and v alike"),
        ({"gate": torch.ones(2)}, "one factor per query head"),
        ({"gate": torch.ones(3).half()}, r"expected torch.float32 \(3,\)"),
        ({"cu_seqlens_q": prefix([6]).long()}, "expected torch.int32"),
        ({"cu_seqlens_kv": prefix([3, 3])}, "alike"),
        ({"cu_seqlens_q": prefix([5])}, "ascending from 0 to 6"),
        ({"cu_seqlens_kv": torch.tensor([1, 6], dtype=torch.int32)}, "ascending from 0 to 6"),
        ({"max_seqlen_q": 5}, "do not hold 6 tokens"),
        (
            {"max_seqlen_q": 3, "cu_seqlens_q": prefix([4, 2]), "cu_seqlens_kv": prefix([3, 3])},
            "holds a sequence of 4",
        ),
        ({"max_seqlen_kv": 0}, "do not hold 6 tokens"),
        ({"q_start": (0, 3)}, "expected 3 numbers"),
        ({"q_start": (0, 2, 4)}, "ascending from 0 to 3"),
        ({"q_start": (0, 4, 3)}, "ascending from 0 to 3"),
        ({"window": 0}, "expected 1 or more keys"),
        ({"scale": 0.0}, "above 0"),
        ({"scale": float("nan")}, "above 0"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(6, 3, 8),
        "k": torch.zeros(6, 2, 8),
        "v": torch.zeros(6, 2, 8),
        "cu_seqlens_q": prefix([6]),
        "cu_seqlens_kv": prefix([6]),
        "max_seqlen_q": 6,
        "max_seqlen_kv": 6,
        "q_start": (0, 2, 3),
        "causal": True,
    }
    with pytest.raises(ShapeError, match=words):
        ops.ragged_attention(**(arguments | change))
