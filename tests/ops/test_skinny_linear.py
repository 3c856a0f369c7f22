"""What is special to skinny_linear: its meaning, its refusals, its kernel's sizes and order."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from interlace import ops
from interlace.errors import BackendError, ShapeError
from interlace.ops._check import in_fp64

# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.skinny_linear")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is present"
)

# N and K of the products of a token in models of 4096 and 2560 dimensions
SHAPES = [
    (6144, 4096, False),
    (4096, 4096, False),
    (24576, 4096, True),
    (4096, 12288, False),
    (4096, 11008, False),
    (151936, 4096, False),
    (6144, 2560, False),
    (2560, 4096, False),
    (19456, 2560, True),
    (2560, 9728, False),
]


def kernels() -> Any:
    pytest.importorskip("triton")
    return importlib.import_module("interlace.triton_kernels.skinny_linear")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    rows, k = draw(st.integers(1, contract.MAX_ROWS)), draw(st.integers(1, 2600))
    gated = draw(st.booleans())
    n = draw(st.integers(1, 9)) * (1 + gated)
    dtype = draw(st.sampled_from(contract.OP.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # a weight may be cut from a wider one, so that its rows begin anywhere
    spare = draw(st.integers(0, 2))
    x, weight, bias = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((rows, k), (n, k + spare), (n,))
    )
    # numpy, which interprets, warns where the exponential of a gate is infinite
    return x, weight[:, spare:] / k**0.5, bias if draw(st.booleans()) else None, gated


def hold_to_the_budget(args: tuple[Any, ...], found: torch.Tensor) -> None:
    truth, plain = contract.reference(*in_fp64(args)), contract.reference(*args)
    excess = contract.OP.budget.excess(found, plain, truth)
    assert excess is None, excess


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(args=problems())
def test_interpreted_kernel_keeps_the_budget_on_any_shape(args: tuple[Any, ...]) -> None:
    hold_to_the_budget(args, kernels().skinny_linear(*args))


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sizes", [(1, 256, 1), (2, 512, 2), (8, 1024, 4), (4, 4096, 8)])
def test_any_launch_keeps_the_budget(sizes: tuple[int, ...], rows: int, gated: bool) -> None:
    x, weight, bias = torch.randn(rows, 1300), torch.randn(22, 1300) / 36, torch.randn(22)
    launch = kernels().Config(*sizes, evict_first=False)
    args = (x, weight, bias, gated)
    hold_to_the_budget(args, kernels().skinny_linear(*args, launch))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rows", range(1, contract.MAX_ROWS + 1))
@pytest.mark.parametrize(("n", "k", "gated"), SHAPES)
def test_steps_feed_every_thread_alike(n: int, k: int, gated: bool, rows: int, size: int) -> None:
    sizes = kernels().config(rows, n, k, gated=gated, element_size=size)
    threads, loads = 32 * sizes.num_warps, sizes.block_k * size // 16
    # else elements of x go from thread to thread in every step
    assert loads % threads == 0
    # more than eight of a tile at once leave too few registers
    assert loads // threads * sizes.block_n * (1 + gated) <= 8
    # the sizes that are measured waste nothing, or little, in the last step
    assert k % sizes.block_k == 0 or k > 4 * sizes.block_k


@pytest.mark.parametrize("gated", [False, True])
def test_equals_torch(gated: bool) -> None:
    x, weight, bias = torch.randn(2, 1, 33), torch.randn(10, 33), torch.randn(10)
    expected = functional.linear(x, weight, bias)
    if gated:
        expected = functional.silu(expected[..., :5]) * expected[..., 5:]
    torch.testing.assert_close(ops.skinny_linear(x, weight, bias, gated=gated), expected)


def test_nothing_is_rounded_before_the_gate() -> None:
    x, weight = torch.randn(1, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    gate, up = functional.linear(x.double(), weight.double()).chunk(2, -1)
    expected = (functional.silu(gate) * up).bfloat16()
    assert torch.equal(ops.skinny_linear(x, weight, gated=True), expected)


def test_no_gradient_flows() -> None:
    x, weight = torch.randn(1, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    assert not ops.skinny_linear(x, weight, torch.randn(4, requires_grad=True)).requires_grad


def test_compiles_without_a_graph_break() -> None:
    x, weight = torch.randn(1, 1, 8), torch.randn(6, 8)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.skinny_linear(x, weight, gated=True) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(())}, r"expected floating-point rows \[\.\.\., K\]"),
        ({"x": torch.zeros(1, 8, dtype=torch.int32)}, "expected floating-point rows"),
        ({"x": torch.zeros(1, 7)}, r"weight is .* expected \[N, 7\]"),
        ({"weight": torch.zeros(8)}, r"expected \[N, 8\]"),
        (
            {"weight": torch.zeros(5, 8), "bias": None, "gated": True},
            "has 5 rows; expected",
        ),
        ({"bias": torch.zeros(5)}, r"bias is .* expected \[6\]"),
        ({"bias": torch.zeros(6).half()}, "bias is torch.float16"),
        (
            {"weight": torch.zeros(6, 8).double()},
            "is torch.float64 .* expected torch.float32",
        ),
        ({"weight": torch.zeros(6, 8, device="meta")}, "on meta; expected"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 8),
        "weight": torch.zeros(6, 8),
        "bias": torch.zeros(6),
    }
    with pytest.raises(ShapeError, match=words):
        ops.skinny_linear(**(arguments | change))


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.zeros(5, 8), torch.zeros(6, 8), "works on up to 4 rows, got 5"),
        (torch.zeros(2, 3, 8), torch.zeros(6, 8), "works on up to 4 rows, got 6"),
        (torch.zeros(1, 8).double(), torch.zeros(6, 8).double(), "got torch.float64"),
        (torch.zeros(1, 8), torch.zeros(8, 6).t(), "have to lie side by side"),
        (torch.zeros(1, 0), torch.zeros(6, 0), "one element or more, got none"),
        (torch.zeros(2, 2, 8), torch.zeros(6, 8), None),
    ],
)
def test_the_kernel_says_what_it_does_not_serve(
    x: torch.Tensor, weight: torch.Tensor, words: str | None
) -> None:
    (backend,) = contract.OP.backends
    reason = backend.why_not(x, weight, None, False)
    assert reason is None if words is None else words in (reason or "")


def test_a_named_backend_that_cannot_serve_raises() -> None:
    with pytest.raises(BackendError, match="skinny_linear has no cpp kernel"):
        ops.skinny_linear(torch.zeros(1, 8), torch.zeros(6, 8), backend="cpp")


def overlapping_ptx() -> dict[str, str]:
    """PTX for sm_90 of the variants that start before their input is complete, by name."""
    pytest.importorskip("triton")
    # a process of its own: this one interprets kernels
    script = """if True:
        import json
        from interlace.triton_kernels import aot
        found = [one for one in aot.variants("skinny_linear") if one.constants["OVERLAP"]]
        texts = {one.name: aot.build("skinny_linear", one, 90).asm["ptx"] for one in found}
        print(json.dumps(texts))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_weights_are_asked_for_before_the_wait_and_all_else_after_it() -> None:
    found = overlapping_ptx()
    assert len(found) >= 3
    for name, ptx in found.items():
        before, after = ptx.split("griddepcontrol.wait")
        assert "griddepcontrol.launch_dependents" in before
        # loads of x have no policy; a bias is read one number at a time
        weights, plain = r"ld\.global\.L1::evict_first\S*\.v4\.b32", r"ld\.global\.v"
        rows = re.findall(weights, before)
        assert len(rows) == 4, name
        assert not re.findall(plain, before), name
        singles = re.findall(r"ld\.global\.b16", before)
        assert len(singles) == (4 if "bias" in name else 0), name
        assert len(re.findall(r"ld\.global", before)) == len(rows) + len(singles), name
        assert not re.findall(r"st\.global|red\.|atom\.", before), name
        assert re.findall(plain, after), name
        assert re.findall(r"st\.global", after), name
        assert not re.findall(r"red\.global|atom\.global", after), name
