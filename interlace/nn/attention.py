"""The attention implementation "interlace" of transformers, on the ops of this package.

Letters: B batch, T queries, K keys, Hq query heads, Hkv key-value heads, D head size.

Importing `interlace.nn` registers it, and `attn_implementation="interlace"` works from then on, in
`from_pretrained` and `set_attn_implementation`, for every model that takes attention from there.

A layer whose key-value heads serve unequal numbers of query heads says so in `module.kv_map`: for
every query head the key-value head that it reads, ascending, such as (0, 0, 0, 1, 2).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop_out
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from interlace import ops
from interlace.errors import BackendError, ShapeError
from interlace.models.attention import check_batching
from interlace.nn.masks import interlace_mask, pattern_of
from interlace.nn.routes import decode_op_serves, prefill_op_serves

if TYPE_CHECKING:
    from torch import nn

NAME = "interlace"

# changes of the scores that none of our paths knows
_UNKNOWN = ("softcap", "s_aux", "sinks")
# what only the implementation "sdpa" of transformers can do
_ONLY_SDPA = ("position_bias", "cache")


def register() -> None:
    """Make "interlace" known to transformers; a second time changes nothing."""
    AttentionInterface.register(NAME, interlace_attention)
    # without a mask function of its own an implementation gets no mask at all
    AttentionMaskInterface.register(NAME, interlace_mask)


def interlace_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend for one layer of a transformers model; called by the layer.

    Args:
        module: the layer; `kv_map` and `is_causal` are read from it.
        query: [B, Hq, T, D].
        key: [B, Hkv, K, D], the cached keys included.
        value: [B, Hkv, K, D].
        attention_mask: what `interlace_mask` made, or a mask of the caller's own: [B or 1, Hq or 1,
            T, K] bool (True is visible) or floating-point (added to the scores).
        scaling: factor of the scores; None is D ** -0.5.
        dropout: of the attention weights, 0..1.
        is_causal: where there is no mask, whether queries see only earlier keys; None takes it from
            the module.
        others: further arguments of the model. `output_attentions` is heeded.

    Returns:
        Output [B, T, Hq, D], and the attention weights [B, Hq, T, K] if they were asked for.

    Raises:
        ShapeError: the heads do not fit, or `kv_map` does not describe them.
        BackendError: the model changes scores in a way that this implementation does not know, or
            it is continuous batching.
    """
    for name in _UNKNOWN:
        if others.get(name) is not None:
            raise BackendError(
                f"{type(module).__name__} asks for attention with {name}, which the attention "
                f"implementation '{NAME}' does not compute. Load the model with "
                "attn_implementation='eager'."
            )
    check_batching(module, attention_mask, others)
    q_start = head_groups(module, query.shape[1], key.shape[1])
    if any(others.get(name) is not None for name in _ONLY_SDPA):
        return _by_transformers(
            module, query, key, value, attention_mask, q_start,
            scaling=scaling, dropout=dropout, is_causal=is_causal, **others,
        )  # fmt: skip
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if others.get("output_attentions") or _asked(module):
        return _with_weights(query, key, value, attention_mask, q_start, scale, dropout, is_causal)
    plain = dropout == 0.0 and key.shape == value.shape
    if query.shape[2] == 1 and plain and decode_op_serves(query, key, value, attention_mask):
        return _decode(query, key, value, attention_mask, q_start, scale), None
    if query.shape[2] > 1 and plain and prefill_op_serves(query, key, value, attention_mask):
        return _prefill(query, key, value, attention_mask, q_start, scale, is_causal), None
    return _by_torch(query, key, value, attention_mask, q_start, scale, dropout, is_causal), None


def _asked(module: nn.Module) -> bool:
    """Tell whether the weights were asked of a layer that does not pass the request on."""
    return bool(getattr(getattr(module, "interlace_state", None), "weights", False))


def head_groups(module: nn.Module, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Say where the query heads of every key-value head begin: `q_start` of the ops.

    Args:
        module: an attention layer, perhaps with a `kv_map`.
        num_heads: Hq.
        num_kv_heads: Hkv.

    Raises:
        ShapeError: `kv_map` does not fit the heads, or there is none and they do not divide.
    """
    kv_map = getattr(module, "kv_map", None)
    if kv_map is None:
        if num_heads % num_kv_heads:
            raise ShapeError(
                f"{type(module).__name__} has {num_heads} query heads for {num_kv_heads} key-value "
                "heads, and no kv_map that says which reads which."
            )
        return tuple(range(0, num_heads + 1, num_heads // num_kv_heads))
    heads = tuple(int(head) for head in kv_map)
    ascending = all(one <= other for one, other in pairwise(heads))
    if len(heads) != num_heads or not ascending or not heads or heads[-1] >= num_kv_heads:
        raise ShapeError(
            f"kv_map is {heads}; expected for each of {num_heads} query heads the key-value head, "
            f"0..{num_kv_heads - 1}, that it reads, in ascending order."
        )
    return ops.q_start_of([heads.count(head) for head in range(num_kv_heads)])


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    q_start: tuple[int, ...],
    scale: float,
) -> Tensor:
    pattern = None if mask is None else pattern_of(mask)
    if pattern is None:
        starts = None
        lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
    else:
        starts, lengths = pattern.starts, pattern.lengths
    return ops.ragged_decode(
        query.transpose(1, 2),
        key,
        value,
        lengths=lengths,
        starts=starts,
        q_start=q_start,
        scale=scale,
    )


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    q_start: tuple[int, ...],
    scale: float,
    is_causal: bool,
) -> Tensor:
    batch, num_heads, num_queries, width = query.shape
    pattern = None if mask is None else pattern_of(mask)
    causal, window = is_causal, None
    if pattern is not None and pattern.cuts is not None:
        causal, window = pattern.causal, pattern.window
        cu_q, cu_kv = pattern.cuts
    else:
        key, value = _filled(key, value, num_queries, is_causal)
        row = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        cu_q, cu_kv = row * num_queries, row * key.shape[2]
    # one after the other; of a single row that is a view
    packed = [
        each.transpose(1, 2).reshape(-1, each.shape[1], width) for each in (query, key, value)
    ]
    out, _ = ops.ragged_attention(
        *packed,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv,
        max_seqlen_q=num_queries,
        max_seqlen_kv=key.shape[2],
        q_start=q_start,
        causal=causal,
        window=window,
        scale=scale,
    )
    return out.view(batch, num_queries, num_heads, width)


def _filled(key: Tensor, value: Tensor, num_queries: int, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Leave out what no query sees where no mask says so: the end of an empty static cache."""
    if is_causal and 1 < num_queries < key.shape[2]:
        return key[:, :, :num_queries], value[:, :, :num_queries]
    return key, value


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    q_start: tuple[int, ...],
    scale: float,
    dropout: float,
    is_causal: bool,
) -> Tensor:
    """Attend by scaled_dot_product_attention, which may have a key-value head per query head."""
    batch, num_heads, num_queries, width = query.shape
    if mask is None:
        key, value = _filled(key, value, num_queries, is_causal)
    num_groups = key.shape[1]
    uniform = _group_size(q_start)
    shared = mask is None or mask.shape[1] == 1
    if num_queries == 1 and uniform is not None and shared:
        # the query heads of a group as so many queries: the keys are read once
        query = query.reshape(batch, num_groups, uniform, width)
    elif uniform != 1:
        key, value = (_repeated(each, q_start) for each in (key, value))
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        is_causal=is_causal and mask is None and num_queries > 1,
    )
    return out.reshape(batch, num_heads, num_queries, -1).transpose(1, 2).contiguous()


def _with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    q_start: tuple[int, ...],
    scale: float,
    dropout: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attend in single steps, which leave the weights behind."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    key, value = (_repeated(each, q_start) for each in (key, value))
    scores = query @ key.mT * scale
    if mask is None and is_causal and num_queries > 1:
        # aligned at the left, as where a mask is left out
        every = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = every.tril()[None, None]
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = drop_out(weights.to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _by_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    q_start: tuple[int, ...],
    **others: Any,
) -> tuple[Tensor, None]:
    """Leave the layer to the implementation "sdpa" of transformers."""
    if _group_size(q_start) is None:
        raise BackendError(
            f"{type(module).__name__} has a kv_map and asks for attention with a position bias or "
            "a paged cache, which needs equal groups of query heads. Generate without continuous "
            "batching."
        )
    return sdpa_attention_forward(module, query, key, value, mask, **others)  # type: ignore[no-any-return]


def _group_size(q_start: tuple[int, ...]) -> int | None:
    """Query heads per key-value head; None where they differ."""
    sizes = {stop - start for start, stop in pairwise(q_start)}
    return sizes.pop() if len(sizes) == 1 else None


def _repeated(each: Tensor, q_start: tuple[int, ...]) -> Tensor:
    """Give every query head its key-value head: [B, Hkv, K, D] -> [B, Hq, K, D]."""
    size = _group_size(q_start)
    if size == 1:
        return each
    if size is not None:
        return each.repeat_interleave(size, dim=1)
    # an index would be copied to the device in every call
    heads = [head for head, (a, b) in enumerate(pairwise(q_start)) for _ in range(b - a)]
    return torch.stack([each[:, head] for head in heads], 1)
