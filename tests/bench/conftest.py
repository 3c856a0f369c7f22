"""A small case of the retention benchmark, and an op that takes no time: with a backward, a good
kernel and room for bad ones.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import retention
import torch
from methods import Sizes
from torch import Tensor

from interlace.microbenchmarks.case import Setup
from interlace.microbenchmarks.ceilings import Ceilings
from interlace.microbenchmarks.measure import Bench
from interlace.microbenchmarks.timing import CpuClock, Effort
from interlace.ops import _availability
from interlace.ops._autograd import Backward
from interlace.ops._registry import OPS, Backend, Op, OpSample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from methods import Case

_NUMBERS = itertools.count()


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def scaled_bwd(gradient: Tensor, x: Tensor, factor: float) -> Tensor:
    return gradient * factor


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    return [OpSample("seven", (torch.linspace(-1, 1, 7, device=device, dtype=dtype), 3.0))]


def backward_samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    x = torch.linspace(-1, 1, 7, device=device, dtype=dtype)
    return [OpSample("seven", (x.flip(0), x, 3.0))]


@pytest.fixture
def make_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Op]]:
    """Register the op with given implementations; it is gone after the test."""
    # what is called a cpp kernel here is Python
    monkeypatch.setattr(_availability, "why_not", lambda backend, op, device: None)
    made: list[str] = []

    def make(
        kernel: Callable[..., Tensor] = scaled, backward_kernel: Callable[..., Tensor] = scaled_bwd
    ) -> Op:
        # a name can be defined once per process
        name = f"bench_toy_{next(_NUMBERS)}"
        common = {
            "bytes_moved": lambda *args: 8 * args[-2].numel(),
            "flops": lambda *args: args[-2].numel(),
            "dtypes": (torch.float32,),
        }
        backward = Op(
            f"{name}_bwd",
            scaled_bwd,
            fake=lambda gradient, x, factor: torch.empty_like(x),
            samples=backward_samples,
            backends=(Backend("cpp", backward_kernel, why_not=lambda *_: None),),
            **common,
        )
        op = Op(
            name,
            scaled,
            fake=lambda x, factor: torch.empty_like(x),
            samples=samples,
            backends=(Backend("cpp", kernel, why_not=lambda *_: None),),
            backward=Backward(backward, wrt=("x",)),
            **common,
        )
        made.extend((op.name, backward.name))
        return op

    yield make
    for name in made:
        del OPS[name]


@pytest.fixture
def bench() -> Bench:
    """A bench that measures for a moment only."""
    return Bench(
        Setup.seeded(torch.device("cpu"), torch.float32, quick=True),
        CpuClock(),
        Effort(rounds=2, turn_seconds=1e-3),
        Ceilings(10.0, 0.5, copy_bytes=1, matmul_side=1),
    )


@pytest.fixture(scope="session")
def quarter() -> Case:
    """A quarter of the bundled CLIP model is to go, by very few samples."""
    sizes = Sizes(calibration=6, heal_samples=4, heal_batch=4, held_out=4)
    return retention.Bench(sizes).case("clip", 0.25, 0)
