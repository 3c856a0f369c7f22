"""The machine behind the ops: choice of backends, refusals, gradients, the tables for people."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from interlace import ops
from interlace.errors import BackendError
from interlace.ops import _availability, _extension, _order, _selection
from interlace.ops._autograd import Backward
from interlace.ops._budget import Budget
from interlace.ops._registry import OPS, Backend, Op, OpSample

if TYPE_CHECKING:
    from collections.abc import Iterator


def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x.square()


def scaled_bwd(
    grad_scaled: Tensor,
    grad_square: Tensor,
    scaled: Tensor,
    square: Tensor,
    x: Tensor,
    factor: float,
) -> Tensor:
    return grad_scaled * factor + 2 * x * grad_square


def marked(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    marked.calls += 1
    return scaled(x, factor)


marked.calls = 0


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    return [OpSample("one", (torch.ones(2, device=device, dtype=dtype), 3.0))]


@pytest.fixture(scope="module")
def registered_toy() -> Iterator[Op]:
    common = {"samples": samples, "bytes_moved": lambda *_: 0, "flops": lambda *_: 0}
    backward = Op("toy_bwd", scaled_bwd, fake=lambda *args: torch.empty_like(args[4]), **common)
    op = Op(
        "toy",
        scaled,
        fake=lambda x, factor: (torch.empty_like(x), torch.empty_like(x)),
        backends=(
            Backend(
                "cpp", marked, why_not=lambda x, factor: None if factor > 0 else "factor too low"
            ),
            Backend("cuda", marked, why_not=lambda x, factor: "needs a GPU"),
        ),
        backward=Backward(backward, wrt=("x",), needs_outputs=True),
        **common,
    )
    yield op
    del OPS["toy"], OPS["toy_bwd"]


@pytest.fixture
def toy(registered_toy: Op, monkeypatch: pytest.MonkeyPatch) -> Op:
    # it has no compiled kernels; its own refusals are what is tested
    monkeypatch.setattr(_availability, "why_not", lambda backend, op, device: None)
    return registered_toy


def calls_of_cpp(op: Op, *args: object, **options: str) -> int:
    before = marked.calls
    op(*args, **options)
    return marked.calls - before


def test_first_backend_that_can_serve_runs(toy: Op) -> None:
    assert toy.choose((torch.ones(2), 3.0)) == "cpp"
    assert toy.choose((torch.ones(2), -3.0)) == "torch"
    assert calls_of_cpp(toy, torch.ones(2), 3.0) == 1


def test_the_call_goes_before_the_block_and_the_block_before_the_environment(
    toy: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (torch.ones(2), 3.0)
    monkeypatch.setenv("INTERLACE_BACKEND", "torch")
    assert calls_of_cpp(toy, *args) == 0
    with ops.backend("cpp"):
        assert calls_of_cpp(toy, *args) == 1
        assert calls_of_cpp(toy, *args, backend="torch") == 0
        with ops.backend("auto"):
            assert calls_of_cpp(toy, *args) == 1
    assert calls_of_cpp(toy, *args) == 0


def test_explicit_request_that_cannot_be_served_raises_with_all_reasons(
    toy: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (torch.ones(2), -3.0)
    words = (
        "cuda: needs a GPU; triton: toy has no triton kernel; cpp: factor too low; torch: can serve"
    )
    with pytest.raises(BackendError, match=words):
        toy(*args, backend="cpp")
    with ops.backend("triton"), pytest.raises(BackendError, match="'triton' was asked for"):
        toy(*args)
    monkeypatch.setenv("INTERLACE_BACKEND", "cuda")
    with pytest.raises(BackendError, match="'cuda' was asked for"):
        toy(*args)


def test_unknown_names_are_refused_with_a_suggestion(
    toy: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="Did you mean 'triton'"), ops.backend("tritn"):
        pass
    with pytest.raises(BackendError, match="Unknown backend 'fast'"):
        toy(torch.ones(2), 3.0, backend="fast")
    with pytest.raises(BackendError, match="Did you mean 'layer_similarity'"):
        ops.explain("layer_similarty")
    monkeypatch.setenv("INTERLACE_BACKEND", "gpu")
    with pytest.raises(BackendError, match="INTERLACE_BACKEND"):
        toy(torch.ones(2), 3.0)


def test_block_is_left_even_when_it_fails(toy: Op) -> None:
    with pytest.raises(BackendError), ops.backend("triton"):
        toy(torch.ones(2), 3.0)
    assert toy.choose((torch.ones(2), 3.0)) == "cpp"


def test_fallback_on_a_gpu_warns_once_per_op_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="interlace.ops"):
        for reason in ("no kernel", "no kernel", "odd width"):
            _selection.warn_of_fallback("some_op", [("cuda", reason), ("torch", None)])
    assert [record.getMessage().split("because ")[1] for record in caplog.records] == [
        "cuda: no kernel",
        "cuda: odd width",
    ]


def test_gradients_come_from_the_backward_op(toy: Op) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: toy(x, -1.5), x)
    assert torch.autograd.gradcheck(lambda x: toy(x, 1.5)[1], x)


# torch.compile itself makes an instance of the class while it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_gradients_compile_without_a_graph_break(toy: Op) -> None:
    def loss(x: Tensor) -> Tensor:
        first, second = toy(x, 2.0)
        return (first + second).sum()

    x = torch.randn(5, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_opcheck_of_an_op_with_a_backward(toy: Op) -> None:
    torch.library.opcheck(torch.ops.interlace.toy.default, (torch.randn(4), 2.0, "auto"))


def test_references_with_defaults_are_refused() -> None:
    def reference(x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor

    with pytest.raises(ValueError, match="must not have default arguments"):
        Op("bad", reference, fake=reference, samples=samples, bytes_moved=max, flops=max)


def test_extension_tells_why_it_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "NAME", "interlace._missing")
    _extension._load.cache_clear()
    try:
        assert "was not built" in (_extension.why_not() or "")
        with pytest.raises(BackendError, match="cannot be used"):
            _extension.extension()
    finally:
        monkeypatch.undo()
        _extension._load.cache_clear()
    if _extension.why_not() is None:
        assert "built from other sources" in (_extension.why_not("no_such_kernel") or "")


def test_table_and_doctor_describe_this_machine() -> None:
    rows = {(op, backend): reason for op, backend, reason in ops.table()}
    assert rows["layer_similarity", "torch"] is None
    facts = ops.doctor()
    assert facts["torch"] == torch.__version__
    assert facts["extension"] == (_extension.why_not() or "loaded")
    assert all(isinstance(value, str) for value in facts.values())


def test_doctor_names_gpus_and_whether_their_order_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["Some GPU", "Other GPU"].__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (12, 1)].__getitem__)
    monkeypatch.setattr(_order, "measured", lambda: {"Some GPU": {"toy": ["triton"]}})
    facts = ops.doctor()
    assert facts["devices"] == (
        "Some GPU (compute capability 9.0), Other GPU (compute capability 12.1)"
    )
    assert facts["order"].startswith("measured on Some GPU, not measured on Other GPU")


@pytest.mark.parametrize(
    ("reason", "architectures", "says"),
    [
        (None, "sm_80, sm_90", "built for sm_80, sm_90"),
        (None, None, "not built: nvcc was not found"),
        ("it was not built", None, "not built: there is no compiled part"),
    ],
)
def test_doctor_says_what_cuda_kernels_are_built_for(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, architectures: str | None, says: str
) -> None:
    monkeypatch.setattr(_extension, "why_not", lambda function=None: reason)
    monkeypatch.setattr(_extension, "cuda_architectures", lambda: architectures)
    assert ops.doctor()["cuda kernels"].startswith(says)


def test_measured_orders_go_first_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = {"Some GPU": {"toy": ["triton", "torch"]}}
    monkeypatch.setattr(_order, "measured", lambda: orders)
    _order._precedence.cache_clear()
    try:
        assert _order._precedence("toy", "Some GPU") == ("triton", "torch", "cuda", "cpp")
        assert _order._precedence("toy", "Other GPU") == _selection.ORDER
        assert _order._precedence("other", "Some GPU") == _selection.ORDER
        assert _order.precedence("toy", torch.device("cpu")) == _selection.ORDER
    finally:
        _order._precedence.cache_clear()


def test_measured_orders_name_known_backends_and_ops() -> None:
    for ops_of_gpu in _order.measured().values():
        assert set(ops_of_gpu) <= set(OPS)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpp"])
def test_backends_refuse_tensors_of_another_device(backend: str) -> None:
    device = _selection.device_of((3, [torch.ones(1, device="meta")]))
    assert "tensors, got meta" in (_availability.why_not(backend, "any", device) or "")


def test_budget_catches_what_it_should() -> None:
    budget = Budget(ulps=2)
    truth = torch.linspace(-3, 3, 101, dtype=torch.float64)
    plain = truth.float()
    assert budget.excess(plain, plain, truth) is None
    ulp = torch.finfo(torch.float32).eps * 3
    assert budget.excess(plain + 1.5 * ulp, plain, truth) is None
    assert "largest error" in (budget.excess(plain + 4 * ulp, plain, truth) or "")
    hole = plain.clone()
    hole[7] = float("nan")
    assert "index 7" in (budget.excess(hole, plain, truth) or "")
    assert "expected torch.float32" in (budget.excess(plain.half(), plain, truth) or "")
    counts = torch.arange(4)
    assert "1 of 4" in (budget.excess(counts.clamp_max(2), counts, counts) or "")
