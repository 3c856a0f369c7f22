"""Norm and rotary embedding of queries and keys.

Letters: B batch, T tokens, Hq query heads, Hkv key-value heads, H both, D head size, F frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from interlace import ops
from interlace.nn.routes import needs_grad, rope_op_serves


def norm_and_rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Any = None,
    k_norm: Any = None,
    joint: Tensor | None = None,
    *,
    by_op: bool = True,
) -> tuple[Tensor, Tensor]:
    """Norm the heads of queries and keys, where there are norms, and rotate them.

    Args:
        q: [..., T, Hq, D].
        k: [..., T, Hkv, D].
        cos: [..., T, 2 F] with every number twice, as transformers makes it.
        sin: alike.
        q_norm: RMSNorm of a head: weight [D] and variance_epsilon; None without.
        k_norm: alike.
        joint: queries and keys in one tensor [..., T, H, D], where they lie side by side.
        by_op: qk_norm_rope may serve.

    Returns:
        Queries and keys in the shapes and the dtype of q and k.
    """
    frequencies = cos.shape[-1] // 2
    if by_op and rope_op_serves(q):
        return ops.qk_norm_rope(
            q,
            k,
            cos[..., :frequencies],
            sin[..., :frequencies],
            q_weight=None if q_norm is None else q_norm.weight,
            k_weight=None if k_norm is None else k_norm.weight,
            eps=1e-6 if q_norm is None else q_norm.variance_epsilon,
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if joint is None or needs_grad(joint):
        if q_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)
    num_queries = q.shape[-2]
    if q_norm is not None:
        weights = (q_norm.weight.expand(num_queries, -1), k_norm.weight.expand(k.shape[-2], -1))
        joint = rms_norm(joint, joint.shape[-1:], None, q_norm.variance_epsilon)
        joint = joint.mul_(torch.cat(weights))
    rotated = _rotated(joint, cos, sin)
    return rotated[..., :num_queries, :], rotated[..., num_queries:, :]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 F elements of heads; computed in the wider dtype of tables and heads."""
    dtype, width = x.dtype, cos.shape[-1]
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    half = width // 2
    turned, rest = x[..., :width], x[..., width:]
    out = turned * cos
    x1, x2 = turned[..., :half], turned[..., half:]
    if needs_grad(x):
        out = out + torch.cat((-x2, x1), -1) * sin
    else:
        out[..., :half].addcmul_(x2, sin[..., :half], value=-1)
        out[..., half:].addcmul_(x1, sin[..., half:])
    out = out.to(dtype)
    return out if rest.shape[-1] == 0 else torch.cat((out, rest), -1)
