"""The meaning of bridge_norm and of its gradients, in plain PyTorch.

Letters: T tokens, D hidden size, R rank of a low-rank bridge.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add, bridge, normalise; see `interlace.ops.bridge_norm` for the formulas.

    Returns:
        normed and new_residual [T, D] in the dtype of x; rstd [T], one over the root of the mean
        square (or variance) and eps, and mean [T] (0 for "rms"), both at least fp32.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    s, _ = _scaled(x, residual, scale)
    bridged = s
    if down is not None and up is not None:
        z = operand(s, x.dtype) @ down.to(exact).mT
        bridged = s + operand(z, x.dtype) @ up.to(exact).mT
    mean = bridged.mean(-1) if kind == "layer" else bridged.new_zeros(len(x))
    centred = bridged - mean[:, None] if kind == "layer" else bridged
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    normed = centred * rstd[:, None] * weight.to(exact)
    if bias is not None:
        normed = normed + bias.to(exact)
    # without a residual and a bridge, and in fp32, it is x itself
    rounded = bridged.clone() if bridged is x else bridged.to(x.dtype)
    return normed.to(x.dtype), rounded, rstd, mean


def backward_reference(
    grad_normed: Tensor,
    grad_residual: Tensor,
    new_residual: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of normed and new_residual, written out.

    With r the bridged sum, n = (r - mean) rstd the normed values before weight and bias, and g the
    gradient of normed:
        dr = rstd (w g - n <w g, n> / D [- <w g, 1> / D for "layer"]) + grad_residual
        ds = dr + down^T dz,  dz = up^T dr;  dx = scale ds

    Args:
        grad_normed: gradient of normed [T, D].
        grad_residual: gradient of new_residual [T, D].
        new_residual: r as the forward op rounded it [T, D]; None where x and residual give r.
        rstd: of the forward op [T].
        mean: of the forward op [T].
        x: of the forward op [T, D]; None where new_residual is enough.
        residual: of the forward op [T, D] or None.
        weight: of the forward op [D].
        bias: of the forward op [D] or None; only its dtype counts.
        kind: "rms" or "layer".
        scale: of the forward op, [1] or [D], or None.
        down: of the forward op [R, D] or None.
        up: of the forward op [D, R] or None.

    Returns:
        dx [T, D], which is the gradient of residual too, and dweight, dbias, dscale, ddown, dup,
        each like its argument, or [0] where that is None.
    """
    exact = torch.promote_types(grad_normed.dtype, torch.float32)
    dtype = grad_normed.dtype
    s, h = _scaled(x, residual, scale) if x is not None else (None, None)
    r = new_residual.to(exact) if new_residual is not None else s
    assert r is not None
    n = (r - mean[:, None]) * rstd[:, None]
    g = grad_normed.contiguous().to(exact)
    wg = g * weight.to(exact)
    dn = wg - n * (wg * n).mean(-1, keepdim=True)
    if kind == "layer":
        dn = dn - wg.mean(-1, keepdim=True)
    ds = dn * rstd[:, None] + grad_residual.to(exact)
    dbias, dscale, ddown, dup = (grad_normed.new_empty(0) for _ in range(4))
    if bias is not None:
        dbias = g.sum(0).to(bias.dtype)
    if down is not None and up is not None:
        assert s is not None
        narrow_s, narrow_dr = operand(s, dtype), operand(ds, dtype)
        z = operand(narrow_s @ down.to(exact).mT, dtype)
        dz = operand(narrow_dr @ up.to(exact), dtype)
        ddown = (dz.mT @ narrow_s).to(down.dtype)
        dup = (narrow_dr.mT @ z).to(up.dtype)
        ds = ds + dz @ down.to(exact)
    dx = ds
    if scale is not None:
        assert h is not None
        terms = ds * h
        dscale = (terms.sum(0) if len(scale) > 1 else terms.sum()[None]).to(scale.dtype)
        dx = ds * scale.to(exact)
    dweight = (g * n).sum(0).to(weight.dtype)
    return dx.to(dtype), dweight, dbias, dscale, ddown, dup


def operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round what enters a low-rank product to dtype, as matrix units take it; the sum stays wide.

    The gradient passes as if nothing was rounded.
    """
    return values.to(dtype).to(values.dtype)


def _scaled(x: Tensor, residual: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum h = x + residual, and h times scale."""
    exact = torch.promote_types(x.dtype, torch.float32)
    # outputs have the layout of what they are computed from first
    h = x.contiguous().to(exact)
    if residual is not None:
        h = h + residual.to(exact)
    return (h if scale is None else h * scale.to(exact)), h


def fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the forward op, without contents."""
    exact = torch.promote_types(x.dtype, torch.float32)
    normed, new_residual = (x.new_empty(x.shape) for _ in range(2))
    rstd, mean = (x.new_empty(x.shape[0], dtype=exact) for _ in range(2))
    return normed, new_residual, rstd, mean


def backward_fake(
    grad_normed: Tensor,
    grad_residual: Tensor,
    new_residual: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the backward op, without contents."""

    def like(parameter: Tensor | None) -> Tensor:
        if parameter is None:
            return grad_normed.new_empty(0)
        return parameter.new_empty(parameter.shape)

    dx = grad_normed.new_empty(grad_normed.shape)
    dweight, dbias, dscale, ddown, dup = map(like, (weight, bias, scale, down, up))
    return dx, dweight, dbias, dscale, ddown, dup
