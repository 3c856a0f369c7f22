"""What is special to ragged_decode: its meaning, its caches, its refusals."""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from interlace import ops
from interlace.errors import ShapeError
from interlace.ops import _ragged_decode_plan as planning
from interlace.ops._check import in_fp64

BACKENDS = ["torch", "cpp"]

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.ragged_decode")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def prefix(groups: list[int]) -> tuple[int, ...]:
    return (0, *torch.tensor(groups).cumsum(0).tolist())


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    groups: list[int],
    starts: list[int],
    window: int | None,
) -> torch.Tensor:
    """PyTorch's attention in fp64 with gathered heads, one sequence at a time, its keys alone."""
    heads = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for n in range(q.shape[1]):
            end = length - q.shape[1] + n + 1
            first = max(starts[b], end - window if window else 0)
            if first < end:
                keys, values = (c[b, heads, first:end].double() for c in (k, v))
                row = q[b, n, :, None].double()
                out[b, n] = scaled_dot_product_attention(row, keys, values)[:, 0]
    return out


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    block = draw(st.sampled_from([1, 3, 16]))
    capacity = block * draw(st.integers(1, 90 // block))
    numbers = st.lists(st.integers(0, capacity), min_size=batch, max_size=batch)
    return {
        "groups": draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)),
        "tokens": tokens,
        "width": draw(st.sampled_from([8, 16, 40, 64])),
        "capacity": capacity,
        "block": block,
        "lengths": draw(numbers),
        "starts": draw(st.one_of(st.just([0] * batch), numbers)),
        "window": draw(st.one_of(st.none(), st.integers(1, 40))),
        "seed": draw(st.integers(0, 99)),
    }


def drawn(problem: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(problem["seed"])
    batch, heads, width = len(problem["lengths"]), sum(problem["groups"]), problem["width"]
    q = torch.randn(batch, problem["tokens"], heads, width)
    k, v = torch.randn(2, batch, len(problem["groups"]), problem["capacity"], width)
    for b, (first, end) in enumerate(zip(problem["starts"], problem["lengths"], strict=True)):
        for cache in (k, v):
            cache[b, :, end:] = float("nan")
            cache[b, :, :first] = float("nan")
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_equals_attention_with_gathered_heads(backend: str, problem: dict[str, Any]) -> None:
    q, k, v = drawn(problem)
    lengths, starts, window = problem["lengths"], problem["starts"], problem["window"]
    out = ops.ragged_decode(
        q,
        k,
        v,
        lengths=int32(*lengths),
        starts=int32(*starts) if any(starts) else None,
        q_start=prefix(problem["groups"]),
        window=window,
        backend=backend,
    )
    expected = sdpa(q, k, v, lengths, problem["groups"], starts, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(problem=problems())
def test_paged_and_contiguous_caches_give_the_same_bits(
    backend: str, problem: dict[str, Any]
) -> None:
    q, k, v = drawn(problem)
    batch, size = len(q), problem["block"]
    per_sequence = problem["capacity"] // size
    order = torch.randperm(batch * per_sequence)
    pages = []
    for cache in (k, v):
        page = torch.full((len(order) + 1, size, *cache.shape[1::2]), float("nan"))
        page[order] = cache.transpose(1, 2).reshape(-1, size, *cache.shape[1::2])
        pages.append(page)
    common: dict[str, Any] = {
        "lengths": int32(*problem["lengths"]),
        "starts": int32(*problem["starts"]),
        "q_start": prefix(problem["groups"]),
        "window": problem["window"],
        "backend": backend,
    }
    table = order.int().view(batch, per_sequence)
    paged = ops.ragged_decode(q, *pages, block_table=table, **common)
    assert torch.equal(paged, ops.ragged_decode(q, k, v, **common))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_tokens_equal_one_after_the_other(backend: str) -> None:
    q, k, v = torch.randn(2, 5, 7, 32), torch.randn(2, 3, 50, 32), torch.randn(2, 3, 50, 32)
    common: dict[str, Any] = {"q_start": (0, 4, 5, 7), "window": 11, "backend": backend}
    lengths = int32(50, 23)
    together = ops.ragged_decode(q, k, v, lengths=lengths, **common)
    for n in range(5):
        alone = ops.ragged_decode(q[:, n : n + 1], k, v, lengths=lengths - 4 + n, **common)
        torch.testing.assert_close(together[:, n : n + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_capacity_of_the_cache_changes_nothing(backend: str) -> None:
    q, k, v = torch.randn(2, 1, 6, 64), torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    common: dict[str, Any] = {"lengths": int32(300, 7), "q_start": (0, 5, 6), "backend": backend}
    tight = ops.ragged_decode(q, k, v, **common)
    roomy = [torch.cat([c, torch.full((2, 2, 900, 64), float("nan"))], dim=2) for c in (k, v)]
    torch.testing.assert_close(ops.ragged_decode(q, *roomy, **common), tight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_scales_heads_and_no_key_gives_zero(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 3, 16), torch.randn(3, 2, 8, 16), torch.randn(3, 2, 8, 16)
    common: dict[str, Any] = {"lengths": int32(0, 1, 8), "q_start": (0, 2, 3), "backend": backend}
    plain = ops.ragged_decode(q, k, v, **common)
    assert torch.equal(plain[0], torch.zeros(1, 3, 16))
    torch.testing.assert_close(plain[1, 0], v[1, [0, 0, 1], 0])
    gate = torch.tensor([0.0, 2.0, -0.5])
    gated = ops.ragged_decode(q, k, v, gate=gate, **common)
    torch.testing.assert_close(gated, plain * gate[:, None])


def test_compiled_kernel_does_not_depend_on_the_threads_or_the_batch() -> None:
    q, k, v = torch.randn(3, 2, 5, 64), torch.randn(3, 2, 3000, 64), torch.randn(3, 2, 3000, 64)
    lengths = int32(3000, 1700, 40)
    common: dict[str, Any] = {"q_start": (0, 4, 5), "backend": "cpp"}
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(ops.ragged_decode(q, k, v, lengths=lengths, **common))
    finally:
        torch.set_num_threads(before)
    alone = [
        ops.ragged_decode(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], lengths=lengths[b : b + 1], **common
        )
        for b in range(3)
    ]
    for other in (*results[1:], torch.cat(alone)):
        assert torch.equal(results[0], other)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("max_lanes", [4, 8])
@pytest.mark.parametrize("dtype", contract.OP.dtypes)
def test_variants_for_other_processors_keep_the_budget(max_lanes: int, dtype: torch.dtype) -> None:
    for sample in contract.OP.samples(torch.device("cpu"), dtype):
        truth = contract.reference(*in_fp64(sample.args))
        plain = contract.reference(*sample.args)
        found = contract.compiled.cpp(*sample.args, max_lanes=max_lanes)
        excess = contract.OP.budget.excess(found, plain, truth)
        assert excess is None, f"{sample.name}: {excess}"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is present")
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 128])
@pytest.mark.parametrize("sample", ["paged_odd", "room_to_grow", "window", "no_key_and_one_key"])
def test_any_number_of_splits_keeps_the_budget(
    monkeypatch: pytest.MonkeyPatch, splits: int, sample: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(planning, "num_splits", lambda *_: splits)
    args = next(
        each.args
        for each in contract.OP.samples(torch.device("cpu"), torch.float32)
        if each.name == sample
    )
    found = contract.OP.run("triton", *args)
    truth, plain = contract.reference(*in_fp64(args)), contract.reference(*args)
    excess = contract.OP.budget.excess(found, plain, truth)
    assert excess is None, excess


@pytest.mark.parametrize("tiles", [1, 8, 131, 132, 5000])
@pytest.mark.parametrize("keys", [0, 1, 100, 1024, 65536])
def test_splits_fill_the_gpu_and_are_worth_it(tiles: int, keys: int) -> None:
    splits = planning.num_splits(tiles, keys, 72 << 10, torch.device("cpu"))
    assert 1 <= splits <= planning.MAX_SPLITS
    if keys <= 100:
        assert splits == 1
    if keys == 65536:
        # three programs of 72 KB fit on each of 132 multiprocessors
        waves = -(-tiles * splits // 396)
        assert splits == planning.MAX_SPLITS or tiles * splits >= 0.9 * 396 * waves


def test_scale_is_that_of_the_head_size_unless_given() -> None:
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    common: dict[str, Any] = {"lengths": int32(8), "q_start": (0, 2)}
    default = ops.ragged_decode(q, k, v, **common)
    assert torch.equal(default, ops.ragged_decode(q, k, v, scale=0.25, **common))
    assert not torch.allclose(default, ops.ragged_decode(q, k, v, scale=1.0, **common))


def test_no_gradient_flows() -> None:
    q, k, v = torch.randn(1, 1, 2, 16, requires_grad=True), *torch.randn(2, 1, 1, 8, 16)
    assert not ops.ragged_decode(q, k, v, lengths=int32(8), q_start=(0, 2)).requires_grad


def test_compiles_without_a_graph_break() -> None:
    q, k, v = torch.randn(2, 1, 3, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)

    def step(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return ops.ragged_decode(q, k, v, lengths=lengths, q_start=(0, 2, 3)) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in (int32(5, 8), int32(6, 1)):
        assert torch.equal(compiled(q, lengths), step(q, lengths))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 3, 16)}, r"\[B, N, Hq, D\]"),
        ({"q": torch.zeros(2, 1, 3, 16, dtype=torch.int32)}, "floating-point"),
        ({"q": torch.zeros(2, 1, 3, 300)}, "at most 256"),
        ({"k_cache": torch.zeros(2, 2, 8, 15)}, r"\[B, Hkv, L, D\] with D = 16 and B = 2"),
        ({"v_cache": torch.zeros(2, 2, 9, 16)}, "v_cache is"),
        ({"v_cache": torch.zeros(2, 2, 8, 16).half()}, "keys and values alike"),
        ({"q_start": (0, 3)}, "expected 3 numbers for 2 kv heads"),
        ({"q_start": (0, 2, 4)}, "from 0 to the number of query heads, 3"),
        ({"q_start": (0, 4, 3)}, "do not fall"),
        ({"lengths": int32(8)}, r"expected torch.int32 \(2,\)"),
        ({"lengths": torch.tensor([8, 8])}, "lengths is torch.int64"),
        ({"lengths": int32(8, 9)}, r"expected 0\.\.8"),
        ({"lengths": int32(8, -1)}, r"values in -1\.\.8"),
        ({"starts": int32(0, -1)}, "starts holds -1"),
        ({"starts": int32(0)}, "starts is"),
        ({"gate": torch.ones(2)}, r"gate is .* expected torch.float32 \(3,\)"),
        ({"gate": torch.ones(3).double()}, "gate is torch.float64"),
        ({"window": 0}, "window is 0"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, "q_start is"),
        ({"block_table": int32(0, 0), "q_start": (0,) * 8 + (3,)}, "block_table is"),
        ({"block_table": int32(0, 5, 0, 0).view(2, 2), "q_start": (0,) * 8 + (3,)}, r"0\.\.1"),
        ({"scale": math.nan}, "scale is nan"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 3, 16),
        "k_cache": torch.zeros(2, 2, 8, 16),
        "v_cache": torch.zeros(2, 2, 8, 16),
        "lengths": int32(3, 4),
        "q_start": (0, 2, 3),
    }
    with pytest.raises(ShapeError, match=words):
        ops.ragged_decode(**(arguments | change))
