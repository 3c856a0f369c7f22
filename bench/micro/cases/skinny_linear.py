"""skinny_linear in the language model: the products of one token of decoding, and of a few rows.

Baselines are what a decoder runs: PyTorch's linear map, and the gate as kernels of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as functional

from interlace.microbenchmarks.case import Case, Setup, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from interlace.microbenchmarks.shapes import ModelShape, Tower

# a vocabulary, as Qwen's, whose product is the largest of a token
VOCABULARY = 151936
# elements of a weight of which the reference may make an fp32 copy
_LARGEST_COPIED = 1 << 28


def cases(shape: ModelShape, setup: Setup) -> Iterator[Case]:
    """Yield the products of a layer for one row, then the head and more rows."""
    tower = shape.text
    products = _products(tower)
    for name, (n, k, gated) in products.items():
        yield _case(name, setup, 1, n, k, gated=gated)
    n, k, gated = products["gate-up"]
    yield _case("gate-up", setup, 4, n, k, gated=gated)
    if setup.quick or shape.name == "tiny":
        return
    n, k, gated = products["qkv"]
    for rows in (2, 4):
        yield _case("qkv", setup, rows, n, k, gated=gated)
    if setup.is_cuda:
        yield _case("head", setup, 1, VOCABULARY, tower.hidden, gated=False)


def _products(tower: Tower) -> dict[str, tuple[int, int, bool]]:
    """N, K and whether there is a gate, of the merged projections of a layer."""
    heads = tower.query_heads * tower.head_dim
    return {
        "qkv": (heads + 2 * tower.kv_heads * tower.head_dim, tower.hidden, False),
        "out": (tower.hidden, heads, False),
        "gate-up": (2 * tower.intermediate, tower.hidden, True),
        "down": (tower.hidden, tower.intermediate, False),
    }


def _case(name: str, setup: Setup, rows: int, n: int, k: int, *, gated: bool) -> Case:
    x, weight = setup.randn(1, rows, k), setup.randn(n, k) / k**0.5
    left_out = {"torch": "the reference makes a copy of the weight in fp32"}
    return Case(
        f"{name}-n{n}-k{k}-m{rows}",
        args=(x, weight, None, gated),
        baselines=_baselines(x, weight, gated=gated),
        left_out=left_out if weight.numel() > _LARGEST_COPIED else {},
    )


def _baselines(x: Tensor, weight: Tensor, *, gated: bool) -> dict[str, Callable[[], object] | str]:
    if not gated:
        return {
            "F.linear": lambda: functional.linear(x, weight),
            "torch.compile of F.linear": compiled(functional.linear, x, weight),
            "torch.compile of F.linear, max-autotune": compiled(
                functional.linear, x, weight, mode="max-autotune-no-cudagraphs"
            )
            if x.is_cuda
            else "is for GPUs",
        }
    return {
        "F.linear, silu(gate) * up": lambda: swiglu(x, weight),
        "torch.compile of F.linear, silu(gate) * up": compiled(swiglu, x, weight),
    }


def swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """The first half of a SwiGLU part as a decoder with a merged projection writes it."""
    gate, up = functional.linear(x, weight).chunk(2, -1)
    return functional.silu(gate) * up
