"""Which backend serves an op for the shapes of a layer, in words for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interlace.nn import routes
from interlace.ops.bridge_norm import OP as BRIDGE_NORM
from interlace.ops.qk_norm_rope import OP as QK_NORM_ROPE
from interlace.ops.ragged_attention import OP as RAGGED_ATTENTION
from interlace.ops.ragged_decode import OP as RAGGED_DECODE

_LONG = 64
# projections whose size tells the number of query heads, and the side of them that does
_SIDES = (("o_proj", "in_features"), ("out_proj", "in_features"), ("q_proj", "out_features"))


def head_counts(layer: Any, head_dim: int) -> tuple[int, int]:
    """Count query and key-value heads of an attention layer that may differ from its config.

    What stands in the place of a projection, such as an adapter, need not say its size.

    Args:
        layer: an attention layer.
        head_dim: size of a head.
    """
    sizes = [getattr(getattr(layer, name, None), side, None) for name, side in _SIDES]
    counts = [size // head_dim for size in sizes if isinstance(size, int)]
    kv_map = getattr(layer, "kv_map", None)
    if kv_map is not None:
        counts.append(len(kv_map))
    counts += [getattr(layer, n) for n in ("num_heads", "num_attention_heads") if hasattr(layer, n)]
    num_heads = counts[0] if counts else int(layer.config.num_attention_heads)
    keys = getattr(getattr(layer, "k_proj", None), "out_features", None)
    if isinstance(keys, int):
        return num_heads, keys // head_dim
    if kv_map is not None:
        return num_heads, max(kv_map) + 1
    return num_heads, num_heads // getattr(layer, "num_key_value_groups", 1)


def attention_backend(
    num_heads: int, q_start: tuple[int, ...], head_dim: int, like: Tensor, *, decodes: bool
) -> tuple[str, str]:
    """Say what computes attention of a layer, and what restricts it.

    Args:
        num_heads: query heads.
        q_start: groups of them.
        head_dim: size of a head.
        like: a weight; gives device and dtype.
        decodes: the layer also attends from single tokens to a cache.
    """
    if head_dim > routes.MAX_HEAD_DIM:
        wide = f"heads of {head_dim} elements are wider than the ops take ({routes.MAX_HEAD_DIM})"
        return "torch (scaled_dot_product_attention)", wide
    if like.device.type not in ("cpu", "cuda"):
        return "torch (scaled_dot_product_attention)", f"no op runs on {like.device.type}"
    num_kv_heads = len(q_start) - 1
    query = like.new_empty(_LONG, num_heads, head_dim)
    key = like.new_empty(_LONG, num_kv_heads, head_dim)
    cuts = torch.tensor([0, _LONG], dtype=torch.int32, device=like.device)
    scale = head_dim**-0.5
    prefill = RAGGED_ATTENTION.choose(
        (query, key, key, None, cuts, cuts, q_start, _LONG, _LONG, True, None, scale)
    )
    cache = like.new_empty(1, num_kv_heads, _LONG, head_dim)
    decode = RAGGED_DECODE.choose(
        (query[None, :1], cache, cache, cuts[1:], None, None, q_start, None, scale, None)
    )
    if like.device.type == "cuda":
        words = f"{prefill} (ragged_attention)"
        return (f"{words}, {decode} (ragged_decode)" if decodes else words), ""
    serves = prefill != "torch"
    words = f"{prefill} (ragged_attention)" if serves else "torch (scaled_dot_product_attention)"
    reason = "" if serves else "ragged_attention has no kernel for the CPU here"
    if decodes and decode != "torch":
        words += f", {decode} (ragged_decode) for long caches"
    return words, reason


def norm_backend(width: int, like: Tensor) -> str:
    """Say what computes add and norm of rows of `width`."""
    x, weight = like.new_empty(2, width), like.new_empty(width)
    if like.device.type not in ("cpu", "cuda"):
        return "torch"
    name = BRIDGE_NORM.choose((x, x, weight, None, 1e-6, "rms", None, None, None))
    if like.device.type == "cuda" or name == "torch":
        return f"{name} (bridge_norm)" if name != "torch" else "torch"
    rows = -(-routes.NORM_ELEMENTS // width)
    return f"{name} (bridge_norm) from {rows} tokens on, torch below"


def rope_backend(num_heads: int, num_kv_heads: int, head_dim: int, like: Tensor) -> str:
    """Say what norms and rotates heads."""
    q, k = like.new_empty(2, num_heads, head_dim), like.new_empty(2, num_kv_heads, head_dim)
    table = like.new_empty(2, head_dim // 2)
    name = QK_NORM_ROPE.choose((q, k, table, table, None, None, 1e-6, None, True))
    return f"{name} (qk_norm_rope)" if name != "torch" else "torch (queries and keys in one)"
