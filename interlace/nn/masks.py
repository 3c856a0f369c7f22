"""Masks of attention with what kernels need to know of them: where the visible keys begin and end.

Letters: B batch, T queries, K keys.

A model of transformers makes one mask per forward pass and hands it to all of its layers. Ours is
the Boolean mask [B, 1, T, K] that "sdpa" gets as well, so whatever else the model does with it
stays right, and it bears a `Pattern` beside its numbers: lengths instead of all pairs. Where the
pattern cannot be told in lengths (packed sequences, chunks, masks with holes), or was lost on a
copy of the mask, attention reads the numbers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_ATTRIBUTE = "interlace_pattern"


@dataclass(frozen=True, eq=False)
class Pattern:
    """What a mask says, in lengths.

    Attributes:
        causal: no query sees a key behind its own position.
        window: keys that a query sees counted back from its own position; None for all.
        starts: first key that the last query of a row sees, [B] int32.
        lengths: where the keys end that it sees, [B] int32.
        cuts: queries and keys of all rows cut into left padding, tokens and the rest, which is what
            `ragged_attention` takes for sequences: twice [3 B + 1] int32; None for a single query.
    """

    causal: bool
    window: int | None
    starts: Tensor
    lengths: Tensor
    cuts: tuple[Tensor, Tensor] | None = None


def interlace_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """Make the mask of the attention implementation "interlace"; called by transformers.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: K, the capacity of the cache where there is a static one.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: the pattern, as transformers builds it.
        attention_mask: tokens that are no padding, [B, tokens so far] bool.
        use_vmap: the pattern is not one of transformers' own.
        others: what the mask function of "sdpa" takes besides.

    Returns:
        What "sdpa" gets: None where no mask is needed, or [B, 1, T, K] bool, with its `Pattern` if
        there is one. Code that is being compiled gets the mask alone, since it cannot look at the
        padding.
    """
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **others,
    )
    if mask is None or use_vmap or torch.compiler.is_compiling():
        return mask
    kind = _kind(mask_function)
    tokens = _tokens(attention_mask, kv_length, kv_offset, batch_size, mask.device)
    if kind is not None and tokens is not None:
        # the key that the first query stands at
        offset = q_offset - kv_offset
        pattern = _pattern(*kind, *tokens, offset=offset, num_queries=q_length, num_keys=kv_length)
        attach(mask, pattern)
    return mask


def attach(mask: Tensor, pattern: Pattern) -> None:
    """Let a mask bear its pattern."""
    setattr(mask, _ATTRIBUTE, pattern)


def pattern_of(mask: Tensor) -> Pattern | None:
    """Return the pattern of a mask; None where it bears none."""
    found = getattr(mask, _ATTRIBUTE, None)
    return found if isinstance(found, Pattern) else None


def _kind(function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """Tell whether a mask function is causal, and its window; None if it is neither known."""
    if function is causal_mask_function:
        return True, None
    if function is bidirectional_mask_function:
        return False, None
    # transformers builds a window anew every time: a function that closes over its two parts, of
    # which one closes over the width; functions of one definition share their code
    if getattr(function, "__code__", None) is not _WINDOWED.__code__:
        return None
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    if getattr(parts[0], "__code__", None) is not _OVERLAY.__code__:
        return None
    window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
    return (True, window) if isinstance(window, int) else None


_WINDOWED = sliding_window_causal_mask_function(1)
_OVERLAY = sliding_window_overlay(1)


def _tokens(
    attention_mask: Tensor | None,
    kv_length: int,
    kv_offset: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """Find where the tokens of every row begin and end among the keys; None if one has holes."""
    if attention_mask is None:
        nothing = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return nothing, nothing + kv_length
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    count = mask.sum(-1)
    # argmax gives the first of equal values
    first = mask.int().argmax(-1)
    last = torch.where(count > 0, mask.shape[1] - mask.flip(-1).int().argmax(-1), first)
    # waits for the device once per forward pass, as the mask of transformers itself does
    if not bool((last - first == count).all()):
        return None
    return first.to(torch.int32), last.to(torch.int32)


def _pattern(
    causal: bool,
    window: int | None,
    first: Tensor,
    last: Tensor,
    *,
    offset: int | Tensor,
    num_queries: int,
    num_keys: int,
) -> Pattern:
    """Put a pattern together; nothing waits for the device.

    Args:
        causal: see `Pattern`.
        window: see `Pattern`.
        first: where the tokens of every row begin among the keys, [B] int32.
        last: where they end.
        offset: which key the first query stands at.
        num_queries: T.
        num_keys: K.
    """
    zero = torch.zeros_like(first)
    if not causal:
        # queries may be other tokens than the keys, so none of them counts as padding
        cuts = _cut(zero, zero + num_queries, num_queries), _cut(first, last, num_keys)
        return Pattern(False, None, first, last, cuts)
    # a static cache is not filled behind the last query
    end = zero + (offset + num_queries)
    last = torch.minimum(last, end)
    first = torch.minimum(first, last)
    starts = first if window is None else torch.maximum(first, end - window)
    if num_queries == 1:
        return Pattern(True, window, starts.to(torch.int32), last.to(torch.int32))
    lead = (first - offset).clamp(0, num_queries)
    stop = torch.maximum((last - offset).clamp(0, num_queries), lead)
    cuts = _cut(lead, stop, num_queries), _cut(first, last, num_keys)
    return Pattern(True, window, starts.to(torch.int32), last.to(torch.int32), cuts)


def _cut(first: Tensor, last: Tensor, size: int) -> Tensor:
    """Bounds of three parts of every row of a packed batch: [B], [B] -> [3 B + 1] int32."""
    row = torch.arange(len(first), device=first.device)[:, None] * size
    cuts = torch.stack((first, last, torch.full_like(first, size)), -1) + row
    return torch.cat((cuts.new_zeros(1), cuts.flatten())).to(torch.int32)
