"""Triton kernels in triton's interpreter, on the CPU, against the references.

The interpreter truncates when it stores bf16 and gets bf16 products wrong; kernels upcast under it,
and the budget's units in the last place cover the truncation. It sees no races and no alignment.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from interlace.ops._check import in_fp64, outputs
from interlace.ops._registry import OPS, Op

pytest.importorskip("triton")

CASES = [
    pytest.param(op, sample.args, id=f"{op.name}-{str(dtype).split('.')[1]}-{sample.name}")
    for op in OPS.values()
    for backend in op.backends
    if backend.name == "triton"
    for dtype in op.dtypes
    for sample in op.samples(torch.device("cpu"), dtype)
    if backend.why_not(*sample.args) is None
]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is present; the gpu lane runs these"
)
# numpy, which interprets, warns of what NaN and infinity in a sample come to
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("op", "args"), CASES)
def test_interpreted_kernels_keep_the_error_budget(op: Op, args: tuple[Any, ...]) -> None:
    truth = outputs(op.reference(*in_fp64(args)))
    plain = outputs(op.reference(*args))
    found = outputs(op.run("triton", *args))
    for place, each in enumerate(zip(found, plain, truth, strict=True)):
        excess = op.budget.excess(*each)
        assert excess is None, f"output {place}: {excess}"


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is present; the gpu lane runs these"
)
@pytest.mark.parametrize(
    "op",
    [op for op in OPS.values() if any(each.name == "triton" for each in op.backends)],
    ids=lambda op: op.name,
)
def test_kernels_are_launched_on_the_device_of_the_tensors(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    from triton.runtime.interpreter import GridExecutor

    from interlace.triton_kernels import qk_norm_rope

    inside, launches = [], []
    stock = GridExecutor.__call__

    class Device:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> None:
            inside.append(self)

        def __exit__(self, *_: Any) -> None:
            inside.pop()

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(bool(inside))
        return stock(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    monkeypatch.setattr(torch.cuda, "device_of", Device)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(qk_norm_rope, "_on", Device)
    op.run("triton", *op.samples(torch.device("cpu"), torch.float32)[0].args)
    assert launches
    assert all(launches)
