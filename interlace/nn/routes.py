"""When an op of this package serves, and when torch's own functions are the better choice.

Letters: B batch, T queries, K keys, Hkv key-value heads, D head size.

On a GPU the ops serve. On the CPU an op serves where it has a compiled kernel and the work is worth
the call, which costs some tens of microseconds more than one of torch's. A backend that was asked
for (`interlace.ops.backend`, INTERLACE_BACKEND) is obeyed wherever the op can compute the result.
Compiled code (torch.compile) on the CPU stays with torch, whose functions the compiler can fuse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interlace.nn.masks import pattern_of
from interlace.ops import _extension, _selection

MAX_HEAD_DIM = 256
# keys and values of one layer, in elements, from which ragged_decode on the CPU pays
_DECODE_ELEMENTS = 1 << 19
# rows x width from which bridge_norm on the CPU pays
NORM_ELEMENTS = 1 << 17
# rows x heads x width from which qk_norm_rope on the CPU pays
_ROPE_ELEMENTS = 1 << 16


def decode_op_serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Tell whether ragged_decode computes attention of a single query per row."""
    if not _alike(query, key, value):
        return False
    if query.shape[3] > MAX_HEAD_DIM or needs_grad(query, key, value):
        return False
    if mask is not None and pattern_of(mask) is None:
        return False
    return _serves("ragged_decode", query.device, 2 * key.numel() >= _DECODE_ELEMENTS)


def prefill_op_serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Tell whether ragged_attention computes attention of many queries per row."""
    if not _alike(query, key, value):
        return False
    if query.shape[3] > MAX_HEAD_DIM:
        return False
    if mask is not None and pattern_of(mask) is None:
        return False
    # on the CPU its gradient is the plain reference, slower than torch's
    worth = not needs_grad(query, key, value)
    return _serves("ragged_attention", query.device, worth)


def packed_op_serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether ragged_attention computes attention of sequences one after the other."""
    if (
        torch.compiler.is_compiling()
        and query.shape[3] <= MAX_HEAD_DIM
        and _alike(query, key, value)
    ):
        # the other way takes the sequences apart by lengths that compiled code does not know
        return True
    return prefill_op_serves(query, key, value, None)


def norm_op_serves(x: Tensor) -> bool:
    """Tell whether bridge_norm adds and normalises rows."""
    return _serves("bridge_norm", x.device, x.numel() >= NORM_ELEMENTS)


def rope_op_serves(heads: Tensor) -> bool:
    """Tell whether qk_norm_rope norms and rotates queries and keys."""
    return _serves("qk_norm_rope", heads.device, heads.numel() >= _ROPE_ELEMENTS)


def activation_op_serves(gate: Tensor) -> bool:
    """Tell whether silu_mul activates a feed-forward part."""
    # on the CPU torch does it in place
    return _serves("silu_mul", gate.device, worth=False)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether a gradient will be asked of a function of the tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether all have one dtype; under autocast rotated ones may be wider than values."""
    return query.dtype == key.dtype == value.dtype


def _serves(op: str, device: torch.device, worth: bool) -> bool:
    if device.type == "cuda":
        return True
    if torch.compiler.is_compiling():
        return False
    requested = _selection.resolve("auto")
    if requested != "auto":
        return True
    return worth and device.type == "cpu" and _extension.why_not(op) is None
