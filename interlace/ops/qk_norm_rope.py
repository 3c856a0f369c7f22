"""qk_norm_rope - RMSNorm of every query and key head, then the rotary embedding, in one pass.

Letters: B batch, T tokens, H heads (Hq of queries, Hk of keys), D head size, F frequencies.

The backward needs no outputs of the forward: it has to read x anyway, and one over the root mean
square of a head that is already in registers costs no bytes.

Source: RMSNorm, Zhang and Sennrich 2019, equation 4; rotary embedding as in `_rope.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interlace.errors import ShapeError
from interlace.ops import _rope
from interlace.ops._autograd import Backward
from interlace.ops._qk_norm_rope_samples import backward_samples, samples
from interlace.ops._registry import Backend, Op
from interlace.ops._spelling import spell

__all__ = ["qk_norm_rope"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    sections: Sequence[int] | None = None,
    interleaved: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Norm the heads of queries and keys and rotate them by the positions of their tokens.

    With n = x / sqrt(mean(x^2) + eps) * weight for every head x (n = x without a weight), and the
    first 2F elements of n seen as two halves n1 and n2, as transformers' `rotate_half` does,

        y1 = n1 cos - n2 sin,   y2 = n2 cos + n1 sin,   y = n in the other D - 2F elements.

    NaN and infinity stay within their head.

    Args:
        q: queries [T, Hq, D] or [B, T, Hq, D], fp32 | bf16 | fp16 | fp64. Tokens and heads may lie
            anywhere, as in slices of a merged projection or in a transposed [B, H, T, D]; elements
            of a head that do not lie side by side are copied first.
        k: keys [T, Hk, D] or [B, T, Hk, D], of the same dtype.
        cos: cosines [T, F] or [B, T, F], 1 <= F <= D / 2, as `rope_tables` makes them; with
            `sections` the three axes in front, [3, T, F] or [3, B, T, F]. Any floating-point type;
            fp32 is the exact one.
        sin: sines, like `cos`.
        q_weight: norm weight [D]; None leaves the queries without a norm.
        k_weight: norm weight [D]; None leaves the keys without a norm.
        eps: added to the mean square, 0 or more.
        sections: frequencies (time, height, width) that add up to F.
        interleaved: True for Qwen3-VL's layout: frequency f reads height if f % 3 = 1 and
            f < 3 * sections[1], width if f % 3 = 2 and f < 3 * sections[2], else time. False for
            Qwen2-VL's: time, height and width one after the other.
        backend: "auto", "triton" or "torch".

    Returns:
        q and k, normed and rotated: new contiguous tensors of the shapes and dtype of `q` and `k`.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, or the tables require a gradient, which
            this op does not give.
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: fp32 within (fp64 for fp64), rounded once; deterministic. transformers rounds after
    the norm and after every product. Gradients flow to q, k and the weights.
    Cost: reads and writes q and k once, reads the tables once per token.
    """
    _check(q, k, cos, sin, q_weight, k_weight, eps, sections)
    q_out, k_out = OP(
        q, k, cos, sin, q_weight, k_weight, eps, sections, interleaved, backend=backend
    )
    return q_out, k_out


def reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    sections: Sequence[int] | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The meaning."""
    cos, sin = (_table(each, q.dtype, sections, interleaved) for each in (cos, sin))
    q_out, k_out = (
        _rotate(_normed(x, weight, eps), cos, sin).to(x.dtype).contiguous()
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q_out, k_out


def reference_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    sections: Sequence[int] | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and norm weights, written out."""
    cos, sin = (_table(each, q.dtype, sections, interleaved) for each in (cos, sin))
    dq, dq_weight = _backward_of_one(dq_out, q, cos, sin, q_weight, eps)
    dk, dk_weight = _backward_of_one(dk_out, k, cos, sin, k_weight, eps)
    return dq, dk, dq_weight, dk_weight


def _table(
    table: Tensor, dtype: torch.dtype, sections: Sequence[int] | None, interleaved: bool
) -> Tensor:
    if sections is not None:
        table = _rope.merge(table, sections, interleaved)
    return table.to(torch.promote_types(dtype, torch.float32)).unsqueeze(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if weight is None else x * _scale(x, eps) * weight.to(x.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _backward_of_one(
    dy: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of one input and of its weight; an empty tensor where there is no weight."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    # a rotation is undone by its opposite
    dn = _rotate(dy.to(exact.dtype), cos, -sin)
    if weight is None:
        return dn.to(x.dtype).contiguous(), x.new_empty(0)
    scale = _scale(exact, eps)
    unit = exact * scale
    dweight = (dn * unit).flatten(0, -2).sum(0)
    du = dn * weight.to(exact.dtype)
    dx = scale * (du - unit * (du * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    sections: Sequence[int] | None,
) -> None:
    if q.dim() not in (3, 4) or not q.is_floating_point():
        raise ShapeError(
            f"q is {spell(q)}; expected floating-point [T, H, D] or [B, T, H, D]. Give heads that "
            "stand before tokens as q.transpose(1, 2), which copies nothing."
        )
    tokens, width = q.shape[:-2], q.shape[-1]
    if (k.dtype, k.device, k.dim()) != (q.dtype, q.device, q.dim()) or (
        (k.shape[:-2], k.shape[-1]) != (tokens, width)
    ):
        raise ShapeError(
            f"k is {spell(k)} and q is {spell(q)}; they may differ in the number of heads only."
        )
    lead = () if sections is None else (_rope.AXES,)
    fitting = [(*lead, *tokens), (*lead, tokens[-1])]
    if len(tokens) == 2:
        fitting.append((*lead, 1, tokens[-1]))
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape[:-1]) not in fitting or not table.is_floating_point():
            raise ShapeError(
                f"{name} is {spell(table)}; expected floating-point {_listed(fitting)} for q "
                f"{tuple(q.shape)}"
                + (", with the three axes in front because of the sections." if lead else ".")
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise ShapeError(f"{name} requires a gradient, which this op does not give; detach it.")
    half = cos.shape[-1]
    if (sin.shape, sin.dtype, sin.device, cos.device) != (
        (cos.shape, cos.dtype, q.device, q.device)
    ):
        raise ShapeError(f"cos is {spell(cos)} and sin is {spell(sin)}; expected two alike by q.")
    if not 1 <= half <= width // 2:
        raise ShapeError(
            f"The tables have {half} frequencies; expected 1..{width // 2} for heads of {width} "
            "elements. Tables that hold every number twice are cut in half, cos[..., :F]."
        )
    if sections is not None:
        _rope.check_sections(sections, half)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (
            weight.shape != (width,) or weight.device != q.device or not weight.is_floating_point()
        ):
            raise ShapeError(
                f"{name} is {spell(weight)}; expected floating-point ({width},) on {q.device}."
            )
    if not eps >= 0:
        raise ShapeError(f"eps is {eps}; expected 0 or more.")


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(f"[{', '.join(map(str, shape))}, F]" for shape in dict.fromkeys(shapes))


def _fake(q: Tensor, k: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_weight, dk_weight = (
        q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for weight in (q_weight, k_weight)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *others: object,
) -> str | None:
    for tensor in (q, cos, q_weight, k_weight):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"works on fp32, bf16 and fp16, got {tensor.dtype}"
    return None


def _triton_backward_why_not(dq_out: Tensor, dk_out: Tensor, *args: Any) -> str | None:
    return _triton_why_not(*args)


def _bytes_moved(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    sections: Sequence[int] | None,
    interleaved: bool,
) -> int:
    # one cosine and sine per token and frequency, whatever the number of axes they come from
    tables = 2 * _bytes(cos) // (1 if sections is None else _rope.AXES)
    return 2 * _bytes(q, k) + _bytes(q_weight, k_weight) + tables


def _bytes_moved_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *others: Any,
) -> int:
    # without a norm the inputs are not needed; with one, its gradient is written
    normed = [x for x, weight in ((q, q_weight), (k, k_weight)) if weight is not None]
    forward = _bytes_moved(q, k, cos, sin, q_weight, k_weight, *others)
    return forward + _bytes(*normed, q_weight, k_weight)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _flops(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *others: object,
) -> int:
    return _count(q, k, cos, q_weight, k_weight, per_normed=4)


def _flops_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *others: object,
) -> int:
    return _count(q, k, cos, q_weight, k_weight, per_normed=11)


def _count(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    per_normed: int,
) -> int:
    """Operations: three per rotated element, and some per normed one."""
    heads = (q.numel() + k.numel()) // q.shape[-1]
    normed = sum(x.numel() for x, w in ((q, q_weight), (k, k_weight)) if w is not None)
    return 3 * heads * 2 * cos.shape[-1] + per_normed * normed


BACKWARD = Op(
    "qk_norm_rope_bwd",
    reference_backward,
    fake=_fake_backward,
    samples=backward_samples,
    bytes_moved=_bytes_moved_backward,
    flops=_flops_backward,
    backends=(
        Backend(
            "triton",
            "interlace.triton_kernels.qk_norm_rope:backward",
            why_not=_triton_backward_why_not,
        ),
    ),
)

OP = Op(
    "qk_norm_rope",
    reference,
    fake=_fake,
    samples=samples,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend("triton", "interlace.triton_kernels.qk_norm_rope:forward", why_not=_triton_why_not),
    ),
    backward=Backward(BACKWARD, wrt=("q", "k", "q_weight", "k_weight")),
)
