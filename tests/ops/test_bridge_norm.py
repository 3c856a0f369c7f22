"""What is special to bridge_norm: its meaning, its bridges, its gradients, its refusals."""

from __future__ import annotations

import importlib
import os
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from interlace import ops
from interlace.errors import BackendError, ShapeError
from interlace.ops._budget import Budget
from interlace.ops._check import in_fp64

samples = importlib.import_module("interlace.ops._bridge_norm_samples")
# the module, whose name the function hides
contract = importlib.import_module("interlace.ops.bridge_norm")

BACKENDS = ["torch", "cpp"]
DTYPES = list(contract.OP.dtypes)


def rows(*size: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*size) * factor).to(dtype)


def assert_within_budget(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    excess = Budget().excess(found, plain, truth)
    assert excess is None, excess


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_norm_of_transformers_after_a_residual_add(
    backend: str, dtype: torch.dtype
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, residual = rows(2, 9, 320, dtype=dtype), rows(2, 9, 320, dtype=dtype)
    norm = Qwen3RMSNorm(320, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.1)
    normed, new_residual = ops.bridge_norm(
        x, residual, norm.weight.detach(), eps=1e-6, backend=backend
    )
    exact = x.double() + residual.double()
    root = (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    plain = (x + residual).detach()
    assert_within_budget(normed, norm(plain).detach(), exact / root * norm.weight.detach().double())
    assert_within_budget(new_residual, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_layer_norm_of_torch_after_a_residual_add(backend: str, dtype: torch.dtype) -> None:
    norm = torch.nn.LayerNorm(257, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.normal_(1, 0.1)
    norm.bias.normal_()
    x, residual = rows(11, 257, dtype=dtype), rows(11, 257, dtype=dtype)
    normed, _ = ops.bridge_norm(
        x, residual, norm.weight, norm.bias, eps=1e-5, kind="layer", backend=backend
    )
    plain, truth = norm(x + residual), norm.double()(x.double() + residual.double())
    assert_within_budget(normed, plain, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 1, 48])
@pytest.mark.parametrize("rank", [None, 1, 6])
def test_bridge_is_the_matrix_that_it_stands_for(
    backend: str, scale: int | None, rank: int | None
) -> None:
    x, residual, weight = rows(5, 48), rows(5, 48), rows(48)
    factors = None if scale is None else rows(scale)
    down = None if rank is None else rows(rank, 48, factor=0.1)
    up = None if rank is None else rows(48, rank, factor=0.3)
    matrix = torch.eye(48, dtype=torch.float64)
    if down is not None and up is not None:
        matrix = matrix + up.double() @ down.double()
    if factors is not None:
        matrix = matrix @ torch.diag(factors.double().expand(48))
    normed, new_residual = ops.bridge_norm(
        x, residual, weight, eps=1e-6, scale=factors, down=down, up=up, backend=backend
    )
    r = (x.double() + residual.double()) @ matrix.T
    torch.testing.assert_close(new_residual.double(), r, rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.rms_norm(r, (48,), weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_do_not_depend_on_each_other(backend: str) -> None:
    x, residual, weight = rows(7, 3, 100), rows(7, 3, 100), rows(100)
    options = {"eps": 1e-6, "scale": rows(100), "down": rows(4, 100), "up": rows(100, 4)}
    whole = ops.bridge_norm(x, residual, weight, **options, backend=backend)
    for token in range(7):
        alone = ops.bridge_norm(x[token], residual[token], weight, **options, backend=backend)
        for one, other in zip(whole, alone, strict=True):
            torch.testing.assert_close(one[token], other, rtol=1e-5, atol=1e-5)


def test_norm_is_taken_before_the_residual_is_rounded() -> None:
    x, residual = torch.full((1, 64), 2.0**-9), torch.ones(1, 64)
    x[0, ::2].neg_()
    x, residual = x.bfloat16(), residual.bfloat16()
    weight = torch.ones(64)
    normed, new_residual = ops.bridge_norm(x, residual, weight, eps=1e-12, kind="layer")
    assert normed.abs().min() > 0.9
    assert new_residual[0, 1] == 1


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("max_lanes", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_for_other_processors_keep_the_budget(max_lanes: int, dtype: torch.dtype) -> None:
    for sample in contract.OP.samples(torch.device("cpu"), dtype):
        truth = contract.OP.reference(*in_fp64(sample.args))
        plain = contract.OP.reference(*sample.args)
        found = contract._cpp(*sample.args, max_lanes=max_lanes)
        for one, own, exact in zip(found, plain, truth, strict=True):
            assert contract.OP.budget.excess(one, own, exact) is None, sample.name


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    size=strategies.tuples(strategies.integers(0, 40), strategies.integers(1, 300)),
    kind=strategies.sampled_from(["rms", "layer"]),
    flags=strategies.tuples(*[strategies.booleans()] * 3),
    scale=strategies.sampled_from(["none", "one", "all"]),
    rank=strategies.integers(0, 40),
    dtype=strategies.sampled_from(DTYPES),
)
def test_compiled_kernel_keeps_the_budget_on_any_shape(
    size: tuple[int, int],
    kind: str,
    flags: tuple[bool, bool, bool],
    scale: str,
    rank: int,
    dtype: torch.dtype,
) -> None:
    draw = samples._Draw(torch.device("cpu"), dtype, torch.Generator().manual_seed(size[1]))
    residual, bias, wide = flags
    count = {"none": 0, "one": 1, "all": size[1]}[scale]
    options = {"kind": kind, "residual": residual, "bias": bias, "wide": wide, "rank": rank}
    args = draw.args(*size, scale=count, **options)
    truth, plain = contract.OP.reference(*in_fp64(args)), contract.OP.reference(*args)
    if kind == "layer" and rank:
        # a row of few channels may hardly vary; then its norm magnifies how the product was
        # rounded, and what the reference makes of that is luck
        r = truth[1]
        spread = (r - r.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        hypothesis.assume(bool((spread >= 0.2 * r.abs().amax(-1)).all()))
    for found, own, exact in zip(contract._cpp(*args), plain, truth, strict=True):
        assert_within_budget(found, own, exact)


def test_compiled_kernel_does_not_depend_on_the_number_of_threads() -> None:
    x, residual, weight = rows(150, 3000), rows(150, 3000), rows(3000)
    bridge = {"down": rows(7, 3000, factor=0.02), "up": rows(3000, 7), "scale": rows(1)}
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(ops.bridge_norm(x, residual, weight, eps=1e-6, **bridge, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.usefixtures("poisoned_empty")
# numpy, which the interpreter computes with
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tokens", "width", "options"),
    [
        (3, 5000, {}),
        (2, 5000, {"kind": "layer", "bias": True}),
        (5, 9001, {}),
        (2, 9001, {"kind": "layer", "bias": True, "scale": 9001}),
        (3, 17000, {"scale": 1}),
        (9, 17000, {"kind": "layer", "residual": False, "wide": True}),
        (70, 33, {"rank": 64, "kind": "layer"}),
        (70, 40, {"rank": 33, "scale": 40, "residual": False}),
    ],
    ids=str,
)
def test_triton_serves_rows_and_ranks_of_any_size(
    device: str, tokens: int, width: int, options: dict[str, Any]
) -> None:
    pytest.importorskip("triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is present; the gpu lane runs these")
    draw = samples._Draw(torch.device(device), torch.float32, torch.Generator().manual_seed(3))
    args = draw.args(tokens, width, **options)
    kept = contract._keep(contract.OP.reference(*args), args)
    grads = (draw.normal(tokens, width), draw.normal(tokens, width))
    for op, given in ((contract.OP, args), (contract.BACKWARD, (*grads, *kept))):
        truth, plain = op.reference(*in_fp64(given)), op.reference(*given)
        for found, own, exact in zip(op.run("triton", *given), plain, truth, strict=True):
            assert_within_budget(found, own, exact)


@pytest.mark.parametrize(
    ("dtype", "rank", "words"),
    [(torch.float32, 65, "R <= 64, got 65"), (torch.float64, 2, "works on fp32, bf16 and fp16")],
)
def test_triton_refuses_in_words(dtype: torch.dtype, rank: int, words: str) -> None:
    x, down, up = (rows(*size, dtype=dtype) for size in ((3, 8), (rank, 8), (8, rank)))
    args = (x, None, rows(8, dtype=dtype), None, 1e-6, "rms", None, down, up)
    kept = contract._keep(contract.OP.reference(*args), args)
    for op, given in ((contract.OP, args), (contract.BACKWARD, (x, x, *kept))):
        assert words in (op._by_name["triton"].why_not(*given) or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({0: rows(4, 17).bfloat16()[:, :16]}, "not all rows of x begin at a multiple of 16"),
        ({1: rows(5, 8).bfloat16().view(-1)[8 - 1 :][:32].view(2, 16)}, "not all rows of residual"),
        ({0: rows(16, 4).bfloat16().mT}, None),
        ({2: rows(17)[1:]}, "weight does not begin at a multiple of 16"),
        ({6: rows(17)[1:]}, "scale does not begin at a multiple of 16"),
        ({6: rows(2)[1:]}, None),
        ({0: rows(4, 12).bfloat16()}, "in multiples of 8"),
        ({0: rows(1, 16392).bfloat16()}, "D up to 16384"),
        ({0: rows(4, 16).double()}, "works on fp32, bf16 and fp16"),
        ({7: rows(2, 16).bfloat16()}, "takes no low-rank bridge"),
    ],
)
def test_cuda_refuses_in_words(change: dict[int, Tensor], words: str | None) -> None:
    args = [rows(4, 16).bfloat16(), None, rows(16), None, 1e-6, "rms", None, None, None]
    for place, value in change.items():
        args[place] = value
    reason = contract.OP._by_name["cuda"].why_not(*args)
    assert reason is None if words is None else words in (reason or "")


def saved_bytes(**options: Any) -> int:
    """Bytes that the graph of one call holds, parameters aside."""
    x, residual = (rows(64, 32).requires_grad_() for _ in range(2))
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.bridge_norm(x, residual, torch.ones(32), eps=1e-6, **options)
    return sum(held.values())


def test_graph_holds_no_more_than_the_gradient_needs() -> None:
    size = 64 * 32 * 4
    assert saved_bytes() == size
    assert saved_bytes(scale=torch.ones(1)) == 2 * size
    assert saved_bytes(down=rows(2, 32), up=rows(32, 2)) == 3 * size


def test_both_terms_of_the_sum_have_one_gradient() -> None:
    x, residual = (rows(4, 24).requires_grad_() for _ in range(2))
    weight = rows(24)
    normed, new_residual = ops.bridge_norm(x, residual, weight, eps=1e-6, scale=rows(24))
    (normed * new_residual).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.any()
    twice = x.detach().clone().requires_grad_()
    ops.bridge_norm(twice, twice, weight, eps=1e-6)[0].sum().backward()
    once = (2 * x.detach()).requires_grad_()
    ops.bridge_norm(once, None, weight, eps=1e-6)[0].sum().backward()
    torch.testing.assert_close(twice.grad, 2 * once.grad)


def test_gradients_stop_where_none_are_asked_for() -> None:
    x, weight = rows(3, 8), rows(8).requires_grad_()
    normed, new_residual = ops.bridge_norm(x, rows(3, 8), weight, eps=1e-6)
    assert normed.requires_grad
    (found,) = torch.autograd.grad(normed.sum() + new_residual.sum(), weight)
    assert found.shape == (8,)
    assert x.grad is None


# torch.compile itself makes an instance of the class while it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break() -> None:
    x, residual = (rows(2, 5, 32).requires_grad_() for _ in range(2))
    weight, scale = rows(32).requires_grad_(), rows(1).requires_grad_()

    def step(x: Tensor, residual: Tensor) -> Tensor:
        normed, new_residual = ops.bridge_norm(x, residual, weight, eps=1e-6, scale=scale)
        return normed.sin().sum() + new_residual.cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = (x, residual, weight, scale)
    eager, traced = (torch.autograd.grad(call(x, residual), leaves) for call in (step, compiled))
    for one, other in zip(eager, traced, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 0)}, "D >= 1"),
        ({"x": torch.tensor(1.0)}, r"x \[\.\.\., D\]"),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "floating-point"),
        ({"residual": torch.zeros(4, 9)}, "residual is"),
        ({"residual": torch.zeros(4, 8).half()}, "expected alike"),
        ({"weight": torch.zeros(9)}, r"weight is torch.float32 \(9,\); expected \(8,\)"),
        ({"weight": torch.zeros(8).half()}, "weight is torch.float16"),
        ({"bias": torch.zeros(1)}, "bias is"),
        ({"scale": torch.zeros(4)}, r"expected \(1,\) or \(8,\)"),
        ({"down": torch.zeros(2, 8)}, "give both or neither"),
        ({"down": torch.zeros(2, 8), "up": torch.zeros(2, 8)}, r"up is .* expected \(8, 2\)"),
        ({"down": torch.zeros(0, 8), "up": torch.zeros(8, 0)}, r"expected \(1, 8\)"),
        ({"down": torch.zeros(8), "up": torch.zeros(8, 1)}, r"down is .* expected \(8, 8\)"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"kind": "batch"}, "'rms' or 'layer'"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta"),
        ({"residual": torch.zeros(4, 8, device="meta")}, "residual is on meta"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 8),
        "residual": torch.zeros(4, 8),
        "weight": torch.zeros(8),
        "eps": 1e-6,
    }
    with pytest.raises(ShapeError, match=words):
        ops.bridge_norm(**(arguments | change))


def test_backends_without_gradients_refuse_them_in_words() -> None:
    x = rows(3, 8).requires_grad_()
    for name in ("cpp",):
        if dict(ops.explain("bridge_norm", x, None, rows(8), None, 1e-6, "rms", *[None] * 3))[name]:
            continue
        normed, _ = ops.bridge_norm(x, None, rows(8), eps=1e-6, backend=name)
        with pytest.raises(BackendError, match=f"bridge_norm_bwd has no {name} kernel"):
            normed.sum().backward()
