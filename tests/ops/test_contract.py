"""Every op, on every backend, in every dtype, on every sample, against its own reference."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import interlace.ops
from interlace.ops._check import bits, outputs, serving, violations
from interlace.ops._registry import OPS, Op
from interlace.ops._selection import ORDER

# backends that have to serve; a kernel that is skipped without a word must not look like success
EXPECTED = {
    "cpu": {
        "bridge_norm": {"cpp", "torch"},
        "bridge_norm_bwd": {"torch"},
        "layer_similarity": {"cpp", "torch"},
        "qk_norm_rope": {"torch"},
        "qk_norm_rope_bwd": {"torch"},
        "ragged_attention": {"cpp", "torch"},
        "ragged_attention_bwd": {"torch"},
        "ragged_decode": {"cpp", "torch"},
        "silu_mul": {"torch"},
        "silu_mul_bwd": {"torch"},
        "skinny_linear": {"torch"},
    },
    "cuda": {
        "bridge_norm": {"cuda", "triton", "torch"},
        "bridge_norm_bwd": {"triton", "torch"},
        "layer_similarity": {"cuda", "triton", "torch"},
        "qk_norm_rope": {"triton", "torch"},
        "qk_norm_rope_bwd": {"triton", "torch"},
        "ragged_attention": {"triton", "torch"},
        "ragged_attention_bwd": {"triton", "torch"},
        "ragged_decode": {"cuda", "triton", "torch"},
        "silu_mul": {"triton", "torch"},
        "silu_mul_bwd": {"triton", "torch"},
        "skinny_linear": {"triton", "torch"},
    },
}

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
# samples of all dtypes have the same names; making them all only to collect tests takes its time
NAMES = {
    op.name: [sample.name for sample in op.samples(torch.device("cpu"), op.dtypes[0])]
    for op in OPS.values()
}
CASES = [
    pytest.param(op, dtype, name, id=f"{op.name}-{str(dtype).split('.')[1]}-{name}")
    for op in OPS.values()
    for dtype in op.dtypes
    for name in NAMES[op.name]
]
ALL_OPS = [pytest.param(op, id=op.name) for op in OPS.values()]


@functools.cache
def samples(op: Op, device: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    found = {sample.name: sample.args for sample in op.samples(torch.device(device), dtype)}
    assert list(found) == NAMES[op.name]
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ALL_OPS)
def test_expected_backends_serve(op: Op, device: str) -> None:
    if device == "cpu" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler, so no compiled kernels are expected")
    args = samples(op, device, torch.float32)
    reasons = op.explain(*next(iter(args.values())))
    assert {name for name, reason in reasons if reason is None} == EXPECTED[device][op.name], (
        reasons
    )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "dtype", "name"), CASES)
def test_within_error_budget(op: Op, device: str, dtype: torch.dtype, name: str) -> None:
    assert violations(op, samples(op, device, dtype)[name]) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ALL_OPS)
def test_inputs_stay_as_they_are(op: Op, device: str) -> None:
    for args in samples(op, device, torch.float32).values():
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        for backend in serving(op, args):
            op(*args, backend=backend)
        for one, other in zip(before, tensors, strict=True):
            assert torch.equal(bits(one), bits(other.contiguous()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ALL_OPS)
def test_opcheck(op: Op, device: str) -> None:
    args = next(iter(samples(op, device, torch.float32).values()))
    torch.library.opcheck(getattr(torch.ops.interlace, op.name).default, (*args, "auto"))


@pytest.mark.parametrize("op", ALL_OPS)
def test_fake_tells_shapes_and_dtypes(op: Op) -> None:
    for dtype in op.dtypes:
        for args in samples(op, "cpu", dtype).values():
            for real, fake in zip(outputs(op(*args)), outputs(op.fake(*args)), strict=True):
                assert (real.shape, real.dtype, real.device) == (
                    fake.shape,
                    fake.dtype,
                    fake.device,
                )


@pytest.mark.parametrize("op", ALL_OPS)
def test_refused_backends_say_why_and_raise(op: Op) -> None:
    args = next(iter(samples(op, "cpu", torch.float32).values()))
    table = op.explain(*args)
    assert tuple(name for name, _ in table) == ORDER
    for name, reason in table:
        if reason is None:
            continue
        assert len(reason.split()) >= 3
        with pytest.raises(interlace.errors.BackendError, match="was asked for and cannot serve"):
            op(*args, backend=name)


@pytest.mark.parametrize("op", ALL_OPS)
def test_costs_are_counted(op: Op) -> None:
    args = next(iter(samples(op, "cpu", torch.float32).values()))
    half = next(iter(samples(op, "cpu", torch.bfloat16).values()))
    assert op.flops(*args) == op.flops(*half) > 0
    assert op.bytes_moved(*half) < op.bytes_moved(*args)
