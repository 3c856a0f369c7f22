"""The heart of the contract test: every backend that serves is held to the reference.

Tests and benchmarks share it, so that what is red in a test cannot be timed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from interlace.ops._registry import Op


def violations(op: Op, args: tuple[Any, ...]) -> list[str]:
    """Say how backends break the contract of an op on given arguments.

    Args:
        op: the op; every backend that serves `args` is run twice.
        args: the op's arguments.

    Returns:
        One sentence per violation of the error budget or of determinism; none if all keep both.
    """
    truth = outputs(op.reference(*in_fp64(args)))
    plain = outputs(op.reference(*args))
    found = []
    for backend in serving(op, args):
        first = outputs(op(*args, backend=backend))
        for place, (actual, own, exact) in enumerate(zip(first, plain, truth, strict=True)):
            excess = op.budget.excess(actual, own, exact)
            if excess is not None:
                found.append(f"{backend}: output {place}: {excess}")
        if op.deterministic:
            second = outputs(op(*args, backend=backend))
            if not all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True)):
                found.append(f"{backend}: a second run gives other bits")
    return found


def serving(op: Op, args: tuple[Any, ...]) -> list[str]:
    """Name the backends that serve the arguments, in order."""
    return [name for name, reason in op.explain(*args) if reason is None]


def outputs(result: Any) -> tuple[Tensor, ...]:
    """Return an op's result as a tuple, also where it is one tensor."""
    return result if isinstance(result, tuple) else (result,)


def in_fp64(value: Any) -> Any:
    """Turn all floating-point tensors of arguments into fp64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(in_fp64(each) for each in value)
    return value


def bits(tensor: Tensor) -> Tensor:
    """View a tensor as bytes, so that NaN equals NaN."""
    # a copy, since an axis of length 1 may have any stride and still count as contiguous
    packed = tensor.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.uint8) if packed.dim() else packed[None].view(torch.uint8)
