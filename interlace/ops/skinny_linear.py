"""skinny_linear - a few rows times a weight matrix, as every token of decoding needs it.

Letters: M rows of x, N rows of the weight, K columns of both.

The time of such a product is that of reading the weight. While decoding, the small kernels between
two products cost almost as much as a product, so this one may ask for its first weights before its
input is complete (`interlace/ops/_overlap.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from interlace.errors import ShapeError
from interlace.ops._registry import Backend, Op
from interlace.ops._skinny_linear_samples import samples
from interlace.ops._spelling import spell

__all__ = ["MAX_ROWS", "skinny_linear"]

# rows that a kernel keeps sums for; from about there on matrix units pay
MAX_ROWS = 4

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Multiply a few rows with a weight matrix, and gate the outputs of a SwiGLU part.

        y = x weight^T + bias
        out = y                                                             without a gate
        out = silu(y[..., :N / 2]) y[..., N / 2:],   silu(a) = a / (1 + exp(-a))    gated

    M, the product of the leading axes of x, is meant to be small: kernels serve up to MAX_ROWS
    rows, the reference serves any number, slowly. No gradient flows.

    Args:
        x: rows [..., K], fp32 | bf16 | fp16 | fp64.
        weight: [N, K], in the dtype of x; kernels want the elements of a row side by side.
        bias: [N], in the dtype of x; None for none.
        gated: the first N / 2 rows of weight and bias are the gate, the others the up projection.
        backend: "auto", "triton" or "torch".

    Returns:
        [..., N], or [..., N / 2] if gated, in the dtype of x.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit.
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: products, sums and the gate in fp32 (fp64 for fp64 input), rounded once at the end;
    deterministic.
    Cost: reads the weight once. The reference makes a copy of it in fp32.
    """
    _check(x, weight, bias, gated=gated)
    out: Tensor = OP(
        x.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        gated,
        backend=backend,
    )
    return out


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """The meaning: a linear map in full precision, the gate before anything is rounded."""
    exact = torch.promote_types(x.dtype, torch.float32)
    out = functional.linear(x.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    if gated:
        gate, up = out.chunk(2, -1)
        out = functional.silu(gate) * up
    return out.to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0]))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"x is {spell(x)}; expected floating-point rows [..., K].")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ShapeError(
            f"weight is {spell(weight)}; expected [N, {x.shape[-1]}], since x is {spell(x)}."
        )
    if gated and weight.shape[0] % 2:
        raise ShapeError(
            f"weight has {weight.shape[0]} rows; expected an even number with gated=True, as many "
            "for the gate as for the up projection."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias is {spell(bias)}; expected [{weight.shape[0]}] as weight has rows.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ShapeError(
                f"{name} is {spell(tensor)}; expected {x.dtype} on {x.device} as x is."
            )


def _num_rows(x: Tensor) -> int:
    # numel() / K would fail for K = 0
    return x.shape[:-1].numel()


def _triton_why_not(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> str | None:
    if x.dtype not in _DTYPES:
        return f"works on fp32, bf16 and fp16, got {x.dtype}"
    if _num_rows(x) > MAX_ROWS:
        return f"works on up to {MAX_ROWS} rows, got {_num_rows(x)}"
    if weight.shape[1] == 0:
        return "works on rows of one element or more, got none"
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        return "the elements of a row of the weight have to lie side by side"
    return None


def _bytes_moved(x: Tensor, weight: Tensor, *others: Any) -> int:
    bias, gated = others
    outputs = _num_rows(x) * weight.shape[0] // (2 if gated else 1)
    elements = x.numel() + weight.numel() + (0 if bias is None else bias.numel()) + outputs
    return int(elements * x.element_size())


def _flops(x: Tensor, weight: Tensor, *others: Any) -> int:
    bias, gated = others
    # a gate: exponential, sum, quotient, product, for every two rows of the weight
    each = 2 * weight.shape[1] + (bias is not None) + 2 * gated
    return int(_num_rows(x) * weight.shape[0] * each)


OP = Op(
    "skinny_linear",
    reference,
    fake=_fake,
    samples=samples,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend(
            "triton",
            "interlace.triton_kernels.skinny_linear:skinny_linear",
            why_not=_triton_why_not,
        ),
    ),
)
