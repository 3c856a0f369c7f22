"""Gradients of every op that has them: written out right, and the same when compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from interlace.ops._check import outputs
from interlace.ops._registry import OPS, Op

if TYPE_CHECKING:
    from collections.abc import Callable

WITH_GRADIENTS = [pytest.param(op, id=op.name) for op in OPS.values() if op.backward is not None]
# gradcheck calls the op twice per element
MOST_ELEMENTS = 400


def with_leaves(op: Op, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The same arguments, with fresh leaves for those that receive a gradient."""
    names = list(op.parameters)
    fresh = [
        arg.detach().clone().requires_grad_()
        if name in op.backward.wrt and isinstance(arg, torch.Tensor)
        else arg
        for name, arg in zip(names, args, strict=True)
    ]
    return tuple(fresh), [a for a in fresh if isinstance(a, torch.Tensor) and a.requires_grad]


def gradients(
    call: Callable[..., Any], op: Op, args: tuple[Any, ...]
) -> tuple[torch.Tensor | None, ...]:
    args, leaves = with_leaves(op, args)
    found = [out for n, out in enumerate(outputs(call(*args))) if n not in op.backward.constant]
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in found]
    return torch.autograd.grad(found, leaves, seeds, allow_unused=True)


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_written_out_backward_equals_autograd_of_the_reference(op: Op) -> None:
    for sample in op.samples(torch.device("cpu"), torch.float64):
        written = gradients(lambda *args: op(*args, backend="torch"), op, sample.args)
        derived = gradients(op.reference, op, sample.args)
        for one, other in zip(written, derived, strict=True):
            if other is None:
                assert one is None or not one.any(), sample.name
                continue
            size = float(other.abs().nan_to_num().max()) if other.numel() else 0.0
            torch.testing.assert_close(
                one,
                other,
                rtol=0,
                atol=1e-11 * max(size, 1e-30),
                equal_nan=True,
                msg=lambda text, name=sample.name: f"sample {name}: {text}",
            )


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_gradcheck(op: Op) -> None:
    tried = 0
    for sample in op.samples(torch.device("cpu"), torch.float64):
        args, leaves = with_leaves(op, sample.args)
        count = sum(leaf.numel() for leaf in leaves)
        finite = all(bool(leaf.isfinite().all()) for leaf in leaves)
        if not 0 < count <= MOST_ELEMENTS or not finite:
            continue
        tried += 1

        def call(*values: torch.Tensor, args: tuple[Any, ...] = args) -> Any:
            given = iter(values)
            taken = [
                next(given) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args
            ]
            found = outputs(op(*taken, backend="torch"))
            return tuple(o for n, o in enumerate(found) if n not in op.backward.constant)

        assert torch.autograd.gradcheck(call, tuple(leaves)), sample.name
    assert tried, f"{op.name} has no sample small enough for gradcheck"


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_a_gradient_of_a_gradient_is_refused(op: Op) -> None:
    args, leaves = with_leaves(op, op.samples(torch.device("cpu"), torch.float64)[0].args)
    found = [out for n, out in enumerate(outputs(op(*args))) if n not in op.backward.constant]
    total = sum(out.square().sum() for out in found)
    (first, *_) = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


# torch.compile itself makes an instance of the class while it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_compiled_equals_eager_bit_for_bit(op: Op) -> None:
    sample = op.samples(torch.device("cpu"), torch.float32)[0]
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    eager, traced = (gradients(call, op, sample.args) for call in (op, compiled))
    for one, other in zip(eager, traced, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(outputs(op(*sample.args)), outputs(compiled(*sample.args)), strict=True):
        assert torch.equal(one, other)
