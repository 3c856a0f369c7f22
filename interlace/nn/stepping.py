"""A step of a decoder while it is recorded: what may be left out because only a replay runs it.

A recorded step knows that its cache is static and has room for one token, and that nobody writes
weights. So keys and values go into the cache by one kernel, and the lengths of all layers grow at
once. Where it was asked for, kernels overlap, and products of a few rows have their weights on the
way before their inputs are there.
"""

from __future__ import annotations

import contextlib
import importlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from interlace import ops
from interlace.nn.swap import hooked
from interlace.ops import _availability, _overlap
from interlace.ops.skinny_linear import MAX_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(eq=False)
class _Step:
    """The step that is being recorded.

    Attributes:
        cache: a static cache.
        grown: lengths of its layers that got a token.
    """

    cache: Any
    grown: list[Tensor] = field(default_factory=list)


_STEP: ContextVar[_Step | None] = ContextVar("interlace_step", default=None)


@contextlib.contextmanager
def stepping(cache: Any, *, overlap: bool = False) -> Iterator[None]:
    """Run one step against a static cache, in a form that is worth recording.

    Args:
        cache: of transformers.
        overlap: kernels may start before those in front of them have ended.
    """
    step = _Step(cache)
    token = _STEP.set(step)
    try:
        with _overlap.overlapping() if overlap else contextlib.nullcontext():
            yield
    finally:
        _STEP.reset(token)
    if step.grown:
        torch._foreach_add_(step.grown, 1)


def cached(cache: Any, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Put keys and values into a cache, and return what it holds for a layer.

    Args:
        cache: of transformers.
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].
        layer_idx: the layer.
    """
    step = None if torch.compiler.is_compiling() else _STEP.get()
    if step is None or step.cache is not cache:
        found: tuple[Tensor, Tensor] = cache.update(key, value, layer_idx)
        return found
    layer = cache.layers[layer_idx]
    length = layer.cumulative_length
    new, kept = (key, value), (layer.keys, layer.values)
    if _by_kernel(*new, *kept):
        kernel = importlib.import_module("interlace.triton_kernels._cache_append")
        kernel.append(*new, *kept, length)
    else:
        for source, target in zip(new, kept, strict=True):
            target.index_copy_(2, length.reshape(1), source)
    step.grown.append(length)
    return layer.keys, layer.values


def _by_kernel(*tensors: Tensor) -> bool:
    on_gpu = tensors[0].is_cuda and all(each.stride(-1) == 1 for each in tensors)
    return on_gpu and _availability.why_not("triton", "ragged_decode", tensors[0].device) is None


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias: [..., K] -> [..., N]."""
    if _is_skinny(x):
        return ops.skinny_linear(x, weight, bias)
    return linear(x, weight, bias)


def project_gated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return silu(gate) * up of both projections in one weight; None where one op cannot."""
    return ops.skinny_linear(x, weight, bias, gated=True) if _is_skinny(x) else None


def project_by(module: nn.Module, x: Tensor) -> Tensor:
    """Call a projection, or compute what it does."""
    if (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and _is_skinny(x)
        and not hooked(module)
    ):
        return ops.skinny_linear(x, module.weight, module.bias)
    out: Tensor = module(x)
    return out


def _is_skinny(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not _overlap.allowed(x.device):
        return False
    return x.numel() <= MAX_ROWS * x.shape[-1]
