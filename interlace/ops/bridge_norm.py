"""bridge_norm - the step between two blocks: residual add, bridge, norm of the next block.

Letters: T tokens, D hidden size, R rank of a low-rank bridge.

A bridge stands where layers were removed, and stands in for them: a factor for the whole residual
stream, a factor per channel, or a low-rank map beside the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interlace.errors import ShapeError
from interlace.ops import _bridge_norm_reference as meaning
from interlace.ops import _bridge_norm_samples as samples
from interlace.ops import _extension, _overlap
from interlace.ops._autograd import Backward
from interlace.ops._registry import Backend, Op

__all__ = ["bridge_norm"]

KINDS = ("rms", "layer")
# the numbers that compiled kernels know them by
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# a row is in the registers of 512 threads
_CUDA_MAX_WIDTH = 16384
# what it sums up for a chunk of columns is in registers
_TRITON_MAX_RANK = 64


def bridge_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the residual, cross the bridge, and normalise for the next block.

        h = x + residual                     s = scale * h
        r = s + up (down s)                  new_residual = r
        normed = r / sqrt(mean(r^2) + eps) * weight + bias                       for "rms"
        normed = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias              for "layer"

    The scale comes first: the low-rank map sees scaled values. Without scale, s = h; without down
    and up, r = s; without bias, it is 0.

    Args:
        x: output of a sublayer [..., D], D >= 1, fp32 | bf16 | fp16 | fp64.
        residual: residual stream [..., D] like x; None for h = x.
        weight: of the norm [D], in the dtype of x or fp32.
        bias: of the norm [D], in the dtype of x or fp32.
        eps: added to the mean square or variance, > 0.
        kind: "rms" (RMSNorm) or "layer" (LayerNorm).
        scale: one factor [1] or one per channel [D], in the dtype of x or fp32.
        down: the low-rank map into R >= 1 dimensions [R, D], in the dtype of x.
        up: the low-rank map back [D, R], in the dtype of x.
        backend: "auto", "cuda", "triton", "cpp" or "torch". Gradients come from the same backend,
            and "cuda" and "cpp" have none: ask for "auto" to train.

    Returns:
        normed and new_residual, both [..., D] in the dtype of x. Gradients flow through both, to
        all tensors; x and residual receive the same gradient, computed and written once.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, or an option is unknown.
        BackendError: a named backend cannot run these arguments; the message says why.

    Numerics: fp32 throughout (fp64 for fp64 input), each output rounded once; the norm is taken of
    r before it is rounded. What enters a low-rank product is rounded to the dtype of x, as matrix
    units take it ("cpp" spares it that), its sums are not. Squares have to stay within fp32
    (|r| < 1e18). Gradients see r as new_residual holds it, unless a scale makes x and residual
    necessary anyway. Deterministic, on the CPU whatever the number of threads.
    Cost: reads x and residual, writes normed and new_residual, each once; a low-rank bridge on a
    GPU reads x and residual three times, the second and third time from the cache.
    """
    _check(x, residual, weight, bias, eps, kind, scale, down, up)
    options = (weight, bias, eps, kind, scale, down, up)
    # no view where none is needed: x and residual receive one gradient tensor, and behind views
    # torch could not tell that two leaves are about to share it
    if x.dim() == 2:
        normed, new_residual, _, _ = OP(x, residual, *options, backend=backend)
        return normed, new_residual
    flat = x.reshape(-1, x.shape[-1])
    flat_residual = None if residual is None else residual.reshape(flat.shape)
    normed, new_residual, _, _ = OP(flat, flat_residual, *options, backend=backend)
    return normed.view(x.shape), new_residual.view(x.shape)


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ShapeError(
            f"bridge_norm expects x [..., D] of a floating-point type with D >= 1, got {_spell(x)}."
        )
    if kind not in KINDS:
        raise ShapeError(f"kind is {kind!r}; expected 'rms' or 'layer'.")
    if not eps > 0:
        raise ShapeError(f"eps is {eps}; expected more than 0.")
    if bias is not None and kind == "rms":
        raise ShapeError(
            "bias is given, but an RMSNorm has none; leave it out or use kind='layer'."
        )
    if (down is None) != (up is None):
        raise ShapeError("down and up make one low-rank bridge; give both or neither.")
    width, dtype, device = x.shape[-1], x.dtype, x.device
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, dtype):
        raise ShapeError(f"residual is {_spell(residual)}, but x is {_spell(x)}; expected alike.")
    if residual is not None and residual.device != device:
        raise ShapeError(f"residual is on {residual.device}, but x is on {device}.")
    rank = max(1, down.shape[0]) if down is not None and down.dim() else 1
    # the parameters, the shapes that each may have, and whether it may be fp32 beside a narrow x
    row = ((width,),)
    for name, tensor, shapes, may_be_wide in (
        ("weight", weight, row, True),
        ("bias", bias, row, True),
        ("scale", scale, ((1,), (width,)), True),
        ("down", down, ((rank, width),), False),
        ("up", up, ((width, rank),), False),
    ):
        if tensor is None:
            continue
        fits = tensor.dtype == dtype or (may_be_wide and tensor.dtype == torch.float32)
        if not fits or tensor.shape not in shapes:
            dtypes = sorted({str(dtype), str(torch.float32)} if may_be_wide else {str(dtype)})
            raise ShapeError(
                f"{name} is {_spell(tensor)}; expected {' or '.join(map(str, shapes))} in "
                f"{' or '.join(dtypes)}, since x is {_spell(x)}."
            )
        if tensor.device != device:
            raise ShapeError(f"{name} is on {tensor.device}, but x is on {device}.")


def _spell(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _keep(outputs: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the backward op needs.

    Without a bridge new_residual is enough: that is one tensor to keep and to read instead of two,
    at the price of one rounding of r, no larger than that of dx itself. The gradient of a scale
    needs h, from which r follows for free; that of a low-rank map needs s, but getting r from it
    costs a product that reading new_residual spares.
    """
    _, new_residual, rstd, mean = outputs
    x, residual, weight, bias, _, kind, scale, down, up = args
    if scale is None and down is None:
        x = residual = None
    elif down is None:
        new_residual = None
    return new_residual, rstd, mean, x, residual, weight, bias, kind, scale, down, up


def _dtype_why_not(dtype: torch.dtype) -> str | None:
    return None if dtype in _NUMBERS else f"works on fp32, bf16 and fp16, got {dtype}"


def _triton_why_not(first: Tensor, *others: Any) -> str | None:
    # up comes last, forward and backward
    up = others[-1]
    if up is not None and up.shape[1] > _TRITON_MAX_RANK:
        return f"takes a low-rank bridge of R <= {_TRITON_MAX_RANK}, got {up.shape[1]}"
    return _dtype_why_not(first.dtype)


def _call(
    function: Callable[..., None],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    **others: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call a compiled kernel with what all of them take, and with others."""
    x = _side_by_side(x)
    weight = weight.contiguous()
    residual = None if residual is None else _side_by_side(residual)
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    num_rows, width = x.shape
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_residual = torch.empty_like(normed)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd)
    function(
        x=x.data_ptr(),
        residual=_address(residual),
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        dtype=_NUMBERS[x.dtype],
        weight=weight.data_ptr(),
        weight_dtype=_NUMBERS[weight.dtype],
        bias=_address(bias),
        bias_dtype=0 if bias is None else _NUMBERS[bias.dtype],
        scale=_address(scale),
        scale_dtype=0 if scale is None else _NUMBERS[scale.dtype],
        scale_size=0 if scale is None else scale.numel(),
        num_rows=num_rows,
        width=width,
        eps=eps,
        is_layer_norm=kind == "layer",
        normed=normed.data_ptr(),
        new_residual=new_residual.data_ptr(),
        rstd=rstd.data_ptr(),
        mean=mean.data_ptr(),
        **others,
    )
    return normed, new_residual, rstd, mean


def _side_by_side(rows: Tensor) -> Tensor:
    # rows may lie anywhere, but the elements of a row lie side by side
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cpp_why_not(x: Tensor, *others: Any) -> str | None:
    return _dtype_why_not(x.dtype)


def _cpp(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    *,
    max_lanes: int = 16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    down = None if down is None else down.contiguous()
    up = None if up is None else up.contiguous()
    return _call(
        _extension.extension().bridge_norm,
        *(x, residual, weight, bias, eps, kind, scale),
        down=_address(down),
        up=_address(up),
        rank=0 if down is None else len(down),
        num_threads=torch.get_num_threads(),
        max_lanes=max_lanes,
    )


def _cuda_why_not(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> str | None:
    if x.dtype not in _NUMBERS or down is not None:
        return _dtype_why_not(x.dtype) or "takes no low-rank bridge"
    width, pack = x.shape[1], 16 // x.element_size()
    if width > _CUDA_MAX_WIDTH or width % pack:
        return f"takes D up to {_CUDA_MAX_WIDTH} in multiples of {pack} for {x.dtype}, got {width}"
    for name, tensor in (("x", x), ("residual", residual)):
        # rows whose elements do not lie side by side are copied, and then lie well
        if tensor is None or tensor.stride(1) != 1:
            continue
        if tensor.data_ptr() % 16 or (len(x) > 1 and tensor.stride(0) % pack):
            return f"reads 16 bytes at a time, and not all rows of {name} begin at a multiple of 16"
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale)):
        if tensor is not None and len(tensor) == width and tensor.data_ptr() % 16:
            return f"reads 16 bytes at a time, and {name} does not begin at a multiple of 16"
    return None


def _cuda(
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
    index = x.get_device()
    return _call(
        _extension.extension().bridge_norm_cuda,
        *(x, residual, weight, bias, eps, kind, scale),
        device=index,
        stream=torch._C._cuda_getCurrentRawStream(index),
        overlap=_overlap.allowed(x.device),
    )


def _size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _bytes_moved(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *others: Any
) -> int:
    _, _, scale, down, up = others
    statistics = 2 * len(x) * max(4, x.element_size())
    return _size(x, residual, weight, bias, scale, down, up, x, x) + statistics


def _flops(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *others: Any
) -> int:
    _, kind, scale, down, _ = others
    # square, sum, two products; LayerNorm takes the mean away twice over
    each = 4 + 3 * (kind == "layer") + (residual is not None) + (bias is not None)
    return int(x.numel() * (each + (scale is not None) + _low_rank_flops(down, 2)))


def _backward_bytes_moved(grad_normed: Tensor, grad_residual: Tensor, *kept: Any) -> int:
    *tensors, weight, bias, _, scale, down, up = kept
    parameters = _size(weight, bias, scale, down, up)
    return _size(grad_normed, grad_residual, *tensors, grad_normed) + 2 * parameters


def _backward_flops(grad_normed: Tensor, grad_residual: Tensor, *kept: Any) -> int:
    *_, residual, _, bias, kind, scale, down, _ = kept
    each = 11 + 2 * (kind == "layer") + (residual is not None) + (bias is not None)
    return int(grad_normed.numel() * (each + 4 * (scale is not None) + _low_rank_flops(down, 5)))


def _low_rank_flops(down: Tensor | None, num_products: int) -> int:
    return 0 if down is None else num_products * (2 * len(down) + 1)


BACKWARD = Op(
    "bridge_norm_bwd",
    meaning.backward_reference,
    fake=meaning.backward_fake,
    samples=lambda device, dtype: samples.backward(device, dtype, _keep),
    bytes_moved=_backward_bytes_moved,
    flops=_backward_flops,
    backends=(
        Backend("triton", "interlace.triton_kernels.bridge_norm:backward", why_not=_triton_why_not),
    ),
)

OP = Op(
    "bridge_norm",
    meaning.reference,
    fake=meaning.fake,
    samples=samples.forward,
    bytes_moved=_bytes_moved,
    flops=_flops,
    backends=(
        Backend("cuda", _cuda, why_not=_cuda_why_not),
        Backend("triton", "interlace.triton_kernels.bridge_norm:forward", why_not=_triton_why_not),
        Backend("cpp", _cpp, why_not=_cpp_why_not),
    ),
    backward=Backward(
        BACKWARD,
        wrt=("x", "residual", "weight", "bias", "scale", "down", "up"),
        constant=(2, 3),
        keep=_keep,
        same={"residual": "x"},
    ),
)
