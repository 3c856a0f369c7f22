"""What is special to silu_mul: torch's numbers, halves read in place, limits, refusals."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interlace import ops
from interlace.errors import ShapeError
from interlace.ops._check import in_fp64, outputs

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.silu_mul")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_bit_for_bit_where_torch_rounds_no_more(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 5, 24, dtype=dtype)
    assert torch.equal(ops.silu_mul(gate, up), functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_more_exact_than_torch_in_half_precision(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 50, 64).to(dtype)
    truth = functional.silu(gate.double()) * up.double()
    mine, theirs = (
        float((each.double() - truth).square().mean())
        for each in (ops.silu_mul(gate, up), functional.silu(gate) * up)
    )
    assert mine < 0.8 * theirs


def test_feed_forward_of_transformers_on_a_merged_projection() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    part = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2))
    x = torch.randn(2, 3, 16)
    merged = functional.linear(x, torch.cat((part.gate_proj.weight, part.up_proj.weight)))
    found = part.down_proj(ops.silu_mul(*merged.chunk(2, dim=-1)))
    torch.testing.assert_close(found, part(x))


@pytest.mark.parametrize("size", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6), (1, 1, 6)])
def test_layouts_give_the_same_numbers(size: tuple[int, ...]) -> None:
    gate, up = torch.randn(2, *size)
    expected = ops.silu_mul(gate, up)
    merged = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    apart = [torch.stack((each, each), dim=-1)[..., 0] for each in (gate, up)]
    for one, other in (merged, apart, (gate, merged[1])):
        found = ops.silu_mul(one, other)
        assert found.is_contiguous()
        # torch's vectors and what is left over behind them round differently
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_halves_are_read_in_place_and_only_irregular_rows_are_copied() -> None:
    pytest.importorskip("triton")
    from interlace.triton_kernels.silu_mul import as_rows

    def copied(*tensors: Tensor) -> list[bool]:
        return [
            found.data_ptr() != given.data_ptr()
            for found, given in zip(as_rows(*tensors), tensors, strict=True)
        ]

    halves = torch.randn(2, 3, 16).chunk(2, dim=-1)
    assert copied(*halves) == [False, False]
    assert [tuple(each.shape) for each in as_rows(*halves)] == [(6, 8), (6, 8)]
    assert copied(torch.randn(2, 3, 8), *halves) == [False, False, False]
    irregular, apart = torch.randn(2, 4, 8)[:, :3], torch.randn(2, 3, 16)[..., ::2]
    assert copied(irregular, halves[0], apart) == [True, False, True]
    assert [tuple(each.shape) for each in as_rows(*torch.randn(2, 3, 8))] == [(1, 24), (1, 24)]


def test_ends_of_the_numbers() -> None:
    infinity = float("inf")
    gate = torch.tensor([infinity, -infinity, float("nan"), -1e38, -1e3, -88.0, 0.0, 1e38])
    found = ops.silu_mul(gate, torch.ones(8))
    assert found[0] == infinity
    assert found[1:3].isnan().all()
    assert found[3:5].tolist() == [0.0, 0.0]
    assert found[3:5].signbit().all()
    assert -1e-30 < found[5] < 0
    assert found[6:].tolist() == [0.0, float(gate[7])]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_values_stay_within_their_element(value: float) -> None:
    gate, up = torch.randn(2, 4, 6)
    gate[2, 3] = up[1, 5] = value
    leaves = gate.requires_grad_(), up.requires_grad_()
    out = ops.silu_mul(*leaves)
    touched = torch.zeros(4, 6, dtype=torch.bool)
    touched[2, 3] = touched[1, 5] = True
    assert torch.equal(~out.isfinite(), touched)
    for gradient in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert bool(gradient[~touched].isfinite().all())


# torch.compile itself makes an instance of the class while it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break_and_carries_gradients_to_a_merged_tensor() -> None:
    def loss(merged: Tensor) -> Tensor:
        return ops.silu_mul(*merged.chunk(2, dim=-1)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        torch.manual_seed(0)
        merged = torch.randn(3, 12, requires_grad=True)
        gradients += torch.autograd.grad(function(merged), merged)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("gate", "up", "words"),
    [
        (torch.zeros(()), torch.zeros(()), r"expected floating-point \[\.\.\., F\]"),
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4), "expected floating-point"),
        (torch.zeros(3, 4), torch.zeros(4), "expected two alike"),
        (torch.zeros(4), torch.zeros(4).half(), "expected two alike"),
        (torch.zeros(4), torch.zeros(4, device="meta"), "expected two alike"),
    ],
)
def test_wrong_arguments_are_refused_in_words(gate: Tensor, up: Tensor, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        ops.silu_mul(gate, up)


def test_fp64_is_refused_by_triton_and_served_by_torch() -> None:
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64)
    for op, args in ((contract.OP, (gate, up)), (contract.BACKWARD, (gate, gate, up))):
        (backend,) = op.backends
        assert "float64" in str(backend.why_not(*args))
        assert all(out.dtype == torch.float64 for out in outputs(op(*args)))


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    width=st.one_of(st.integers(1, 70), st.integers(1000, 2100)),
    gap=st.sampled_from([None, 0, 1, 16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_interpreted_kernels_keep_the_budget_on_any_rows(
    lead: list[int], width: int, gap: int | None, seed: int
) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is present; the gpu lane runs the kernels")
    torch.manual_seed(seed)
    gate, up, dout = torch.randn(3, *lead, width)
    if gap is not None:
        merged = torch.randn(*lead, 2 * width + gap) * 10
        gate, up = merged[..., :width], merged[..., width + gap :]
    cases: list[tuple[Any, tuple[Tensor, ...]]] = [
        (contract.OP, (gate, up)),
        (contract.BACKWARD, (dout, gate, up)),
    ]
    for op, args in cases:
        truth, own = (outputs(op.reference(*each)) for each in (in_fp64(args), args))
        for each in zip(outputs(op.run("triton", *args)), own, truth, strict=True):
            assert op.budget.excess(*each) is None
