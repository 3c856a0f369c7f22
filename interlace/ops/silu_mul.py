"""silu_mul - the activation of a gated feed-forward part: silu(gate) * up.

Letters: F width of the feed-forward part.

Source: SwiGLU, Shazeer 2020, equation 5, without its three products with weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from interlace.errors import ShapeError
from interlace.ops._autograd import Backward
from interlace.ops._draw import Draw
from interlace.ops._registry import Backend, Op, OpSample
from interlace.ops._spelling import spell

__all__ = ["silu_mul"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def silu_mul(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply `up` by the SiLU of `gate`, element by element.

        out = silu(gate) up,    silu(x) = x / (1 + exp(-x))

    NaN and infinity stay within their element. As in torch, silu(inf) is inf and silu(-inf) is NaN
    (-inf / inf), although it tends to -0 there; of every finite number silu is finite.

    Args:
        gate: [..., F], fp32 | bf16 | fp16 | fp64. Rows may lie anywhere at a regular distance, as
            in halves of a merged projection [..., 2F], which are read in place; elements of a row
            that do not lie side by side are copied first.
        up: like `gate`, in shape, dtype and device.
        backend: "auto", "triton" or "torch".

    Returns:
        A new contiguous tensor [..., F] in the dtype of `gate`. Gradients flow to both inputs.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit.
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: fp32 within (fp64 for fp64), rounded once; deterministic. torch's `silu(gate) * up`
    rounds after silu too.
    Cost: reads gate and up and writes the result, each once.
    """
    _check(gate, up)
    out: Tensor = OP(gate, up, backend=backend)
    return out


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The meaning."""
    out = functional.silu(_exact(gate)) * _exact(up)
    return out.to(gate.dtype).contiguous()


def reference_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, written out."""
    dtype = gate.dtype
    dout, gate, up = (_exact(each) for each in (dout, gate, up))
    sigmoid = gate.sigmoid()
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dout * functional.silu(gate)
    return dgate.to(dtype).contiguous(), dup.to(dtype).contiguous()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.dim() == 0 or not gate.is_floating_point():
        raise ShapeError(f"gate is {spell(gate)}; expected floating-point [..., F].")
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ShapeError(f"up is {spell(up)} and gate is {spell(gate)}; expected two alike.")


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _triton_why_not(first: Tensor, *others: Tensor) -> str | None:
    return None if first.dtype in _DTYPES else f"works on fp32, bf16 and fp16, got {first.dtype}"


class _Draw(Draw):
    """Draws gates and ups."""

    def pair(self, *size: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return self.normal(*size, scale=scale), self.normal(*size)

    def halves(self, *size: int) -> tuple[Tensor, Tensor]:
        """Gate and up in one tensor, as a merged projection leaves them."""
        *lead, width = size
        gate, up = self.normal(*lead, 2 * width).chunk(2, dim=-1)
        return gate, up

    def far_tail(self, count: int) -> tuple[Tensor, Tensor]:
        """Gates whose silu is next to nothing, beside ups that make as much of all of them."""
        gate = torch.linspace(-80, -5, count, dtype=torch.float64)
        most = torch.finfo(self.dtype).max / 64
        up = torch.randn(count, generator=self.generator) * (-gate).exp()
        return self.cast(gate), self.cast(up.clamp(-most, most))

    def limits(self) -> tuple[Tensor, Tensor]:
        """Gates about the bounds of exp in fp32 and the largest there are, of both signs."""
        most = torch.finfo(self.dtype).max
        ends = [87.0, 87.5, 88.5, 89.0, 104.0, 1e3, most / 64, most]
        gate = torch.tensor([-each for each in ends] + ends[:-1], dtype=torch.float64)
        # many rows: too many elements for finite differences, which fail at such numbers
        gate = gate.expand(16, -1)
        return self.cast(gate), self.normal(*gate.shape).clamp(-1, 1)

    def not_finite(self) -> tuple[Tensor, Tensor]:
        """Every number that is not finite, in gate and in up, beside each other and others."""
        values = torch.tensor([1.5, -1.5, 0.0, float("nan"), float("inf"), float("-inf")])
        gate = self.cast(values)[:, None].expand(6, 6)
        return gate, gate.T


def samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """Odd sizes, halves of a merged projection, other layouts, magnitudes, NaN, nothing."""
    draw = _Draw(device, dtype)
    apart = draw.normal(4, 7, 2)
    irregular = draw.normal(3, 4, 10)
    return [
        OpSample("plain", draw.pair(5, 16)),
        OpSample("halves", draw.halves(7, 24)),
        OpSample("halves_of_batches", draw.halves(2, 3, 40)),
        OpSample("halves_odd", draw.halves(3, 33)),
        OpSample("halves_long", draw.halves(2, 2048)),
        OpSample("halves_long_odd", draw.halves(3, 1031)),
        OpSample("odd", draw.pair(3, 11)),
        OpSample("long", draw.pair(1, 2100)),
        OpSample("one_row", draw.pair(13)),
        OpSample("one_row_halves", draw.halves(1, 20)),
        OpSample("one", draw.pair(1)),
        OpSample("narrow", draw.halves(9, 1)),
        OpSample("no_row", draw.pair(0, 8)),
        OpSample("no_column", draw.halves(3, 0)),
        OpSample("one_apart", (draw.normal(6, 12)[:, 3:8], draw.normal(6, 5))),
        OpSample("elements_apart", (apart[..., 0], apart[..., 1])),
        OpSample("irregular_rows", (irregular[:, :3, :5], irregular[:, 1:, 5:])),
        OpSample("columns_first", (draw.normal(9, 4).T, draw.normal(9, 4).T)),
        OpSample("spread", (draw.normal(8).expand(3, 8), draw.normal(3, 1).expand(3, 8))),
        OpSample("huge", draw.pair(6, 30, scale=3e3)),
        OpSample("tiny", draw.pair(6, 30, scale=1e-6)),
        OpSample("far_tail", draw.far_tail(150)),
        OpSample("limits", draw.limits()),
        OpSample("not_finite", draw.not_finite()),
    ]


def backward_samples(device: torch.device, dtype: torch.dtype) -> list[OpSample]:
    """The samples of the forward op behind gradients of its output."""
    draw = _Draw(device, dtype)
    found = [
        OpSample(each.name, (draw.normal(*each.args[0].shape), *each.args))
        for each in samples(device, dtype)
    ]
    dout, *args = found[1].args
    spread = draw.normal(1).expand(dout.shape)
    turned = draw.normal(*dout.shape[::-1]).T
    found.append(OpSample("spread_gradient", (spread, *args)))
    found.append(OpSample("turned_gradient", (turned, *args)))
    return found


def _bytes_moved(gate: Tensor, up: Tensor) -> int:
    return 3 * gate.numel() * gate.element_size()


def _bytes_moved_backward(dout: Tensor, gate: Tensor, up: Tensor) -> int:
    return 5 * gate.numel() * gate.element_size()


def _flops(gate: Tensor, up: Tensor) -> int:
    # exponential, its sign, sum, quotient, product
    return 5 * gate.numel()


def _flops_backward(dout: Tensor, gate: Tensor, up: Tensor) -> int:
    # four for the sigmoid, six for the gradient of the gate, two for that of up
    return 12 * gate.numel()


BACKWARD = Op(
    "silu_mul_bwd",
    reference_backward,
    fake=_fake_backward,
    samples=backward_samples,
    bytes_moved=_bytes_moved_backward,
    flops=_flops_backward,
    backends=(
        Backend("triton", "interlace.triton_kernels.silu_mul:backward", why_not=_triton_why_not),
    ),
)

OP = Op(
    "silu_mul",
    reference,
    fake=_fake,
    samples=samples,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend("triton", "interlace.triton_kernels.silu_mul:forward", why_not=_triton_why_not),
    ),
    backward=Backward(BACKWARD, wrt=("gate", "up")),
)
