"""Norms, alone and together with the residual add before them.

Letters: D hidden size.

A layer ends with an add and the next begins with a norm of the sum. The layer that ends computes
both in one op and lets the sum bear the norm; the norm takes it from there if the sum reaches it
untouched. Where something is added in between, there is another sum, and the norm is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from interlace import ops
from interlace.nn.routes import norm_op_serves
from interlace.nn.swap import Fused, autocasting, hooked

_BORNE = "interlace_normed"


def rms_why_not(norm: nn.Module) -> str | None:
    """Say why a module is not the RMSNorm that we know; None if it is."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1 and isinstance(eps, float):
        return None
    return f"{type(norm).__name__} has no weight [D] and variance_epsilon"


class FusedNorm(Fused):
    """An RMSNorm of transformers in one pass."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise [..., D]; the dtype stays."""
        if hidden_states.dtype != self.weight.dtype or autocasting(hidden_states):
            stock: Tensor = super().forward(hidden_states)
            return stock
        if not torch.compiler.is_compiling():
            borne = _taken(hidden_states, self)
            if borne is not None:
                return borne
        # on a GPU torch's own kernel, which writes no copy of its input
        if not hidden_states.is_cuda and norm_op_serves(hidden_states):
            return ops.bridge_norm(hidden_states, None, self.weight, eps=self.variance_epsilon)[0]
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def joins(norm: nn.Module, x: Tensor) -> bool:
    """Tell whether a norm may be computed here instead of by a call of its module."""
    if hooked(norm) or autocasting(x):
        return False
    if isinstance(norm, FusedNorm):
        return norm.weight.dtype == x.dtype
    return type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.weight.dtype == x.dtype


def add_and_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum; all [..., D]."""
    if joins(norm, x) and x.dtype == residual.dtype and norm_op_serves(x):
        return _by_op(x, residual, norm)
    total = residual + x
    return norm(total), total


def add_before(x: Tensor, residual: Tensor, norm: nn.Module | None) -> Tensor:
    """Return x + residual, which bears its norm where the next module is going to take it.

    Args:
        x: output of a sublayer [..., D].
        residual: residual stream, alike.
        norm: what reads the sum next, as far as is known.
    """
    if (
        norm is None
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        # a change in place would go unseen
        or torch.is_inference_mode_enabled()
        or not isinstance(norm, FusedNorm)
        or not joins(norm, x)
        or x.dtype != residual.dtype
        or not norm_op_serves(x)
    ):
        return residual + x
    normed, total = _by_op(x, residual, norm)
    bear(total, norm, normed)
    return total


def bear(total: Tensor, norm: nn.Module, normed: Tensor) -> None:
    """Let a sum bear its norm, as long as nothing changes the sum."""
    setattr(total, _BORNE, (norm, normed, total._version))


def borne_by(total: Tensor) -> tuple[nn.Module, Tensor] | None:
    """Return the module and the norm that a sum bears; None if it bears none."""
    borne = getattr(total, _BORNE, None)
    return None if borne is None else borne[:2]


def _by_op(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    if isinstance(norm, FusedNorm):
        return ops.bridge_norm(x, residual, norm.weight, eps=norm.variance_epsilon)
    return ops.bridge_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, kind="layer")


def _taken(total: Tensor, norm: FusedNorm) -> Tensor | None:
    """Take the norm that a sum bears, if it is this norm's and the sum is what it was."""
    borne = getattr(total, _BORNE, None)
    if borne is None:
        return None
    delattr(total, _BORNE)
    owner, normed, version = borne
    return normed if owner is norm and version == total._version else None
