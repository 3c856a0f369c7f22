"""Attention in layers of other widths than a config can state, without kernels of our own.

Legend: B batch, T queries, S keys, H query heads, K key and value heads, D size of a head.

A module whose groups are of unequal size holds the KV head of each query head in `kv_map`. Keys and
values are gathered by it and handed to transformers' SDPA attention, through its own interface.
Modules without the map are served as by "sdpa".

Where a layer has lost its attention, the attentions of the tower are numbered anew: a KV cache is
one list in the order of `layer_idx`, and its length is read from the first entry.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from interlace.errors import BackendError, ShapeError, unknown_name
from interlace.models.parts import blank, is_absent
from interlace.models.sites import KV_MAP, find_sites, resize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    # position -> place in the layer -> query heads of every KV head, or the number of neurons; none
    # where the place was taken out
    Widths = Mapping[int, Mapping[str, Sequence[int]]]

NAME = "sdpa_kv_map"
# those that read the map: this one, and that of interlace.nn
_KNOWING = (NAME, "interlace")
_INDEX = "layer_idx"


def mapped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with k[:, map] and v[:, map].

    Args:
        module: the attention module; `kv_map` holds the KV head of every query head.
        query: [B, H, T, D].
        key: [B, K, S, D].
        value: [B, K, S, D].
        args: as transformers' attention functions take them.
        settings: likewise.

    Returns:
        [B, T, H, D], and None in place of the weights.

    Raises:
        BackendError: continuous batching.
    """
    check_batching(module, args[0] if args else settings.get("attention_mask"), settings)
    heads = getattr(module, KV_MAP, None)
    if heads is not None:
        # an index would be copied to the device in every call
        key, value = (torch.stack([each[:, i] for i in heads], 1) for each in (key, value))
    attended: tuple[torch.Tensor, None]
    attended = sdpa_attention_forward(module, query, key, value, *args, **settings)
    return attended


def check_implementation(module: Any, _: Any) -> None:
    """Refuse attention that knows no map; a hook before every call of a module that has one.

    Some implementations take equal groups for granted wherever the numbers of heads divide.

    Raises:
        BackendError: another implementation was chosen since.
    """
    chosen = module.config._attn_implementation
    if hasattr(module, KV_MAP) and chosen not in _KNOWING:
        raise BackendError(
            f"The key-value heads of this {type(module).__name__} serve unequal numbers of query "
            f"heads, and the attention implementation '{chosen}' knows equal ones only. Choose "
            f"model.set_attn_implementation('{NAME}'), or 'interlace' after import interlace.nn, "
            "which gives attention weights too."
        )


def check_batching(module: Any, mask: torch.Tensor | None, given: Mapping[str, Any]) -> None:
    """Refuse continuous batching without a mask, where every token would see those of other texts.

    transformers makes the mask for the implementations that it knows by name.

    Args:
        module: the attention module.
        mask: of the call.
        given: further arguments of the call; `read_index` is of continuous batching alone.

    Raises:
        BackendError: it is such a call.
    """
    if mask is None and "read_index" in given:
        raise BackendError(
            "Continuous batching (generate_batch) makes no mask for the attention implementation "
            f"'{module.config._attn_implementation}' of this {type(module).__name__}, so texts "
            "would see each other. Use generate, or choose model.set_attn_implementation('sdpa') "
            "before it, which serves unless heads are uneven."
        )


class _CountedHeads:
    """Takes the size of a head from the module, where BLIP divides its width by the heads."""

    def forward(
        self: Any, hidden_states: torch.Tensor, **unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from every token of [B, T, width] to every other; the weights are not returned."""
        batch, tokens = hidden_states.shape[:2]
        mixed = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        rate = getattr(self, "attention_dropout", None)
        rate = self.dropout.p if rate is None else rate
        attended = scaled_dot_product_attention(
            query, key, value, dropout_p=rate if self.training else 0.0, scale=self.scale
        )
        return self.projection(attended.transpose(1, 2).flatten(2)), None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and files name the class that this one is made of."""
        return blank, (_counting, type(self).__bases__[-1]), vars(self)


@functools.cache
def _counting(kind: Any) -> Any:
    return type(f"Narrow{kind.__name__}", (_CountedHeads, kind), {"__module__": __name__})


def adapt(layers: nn.ModuleList) -> None:
    """Let the attentions of a tower compute with the widths that they have been given."""
    for layer in layers:
        for site in find_sites(layer).values():
            module: Any = site.module
            if site.kind == "ffn":
                continue
            if hasattr(module, KV_MAP):
                AttentionInterface.register(NAME, mapped_attention)
                AttentionMaskInterface.register(NAME, sdpa_mask)
                module.config._attn_implementation = NAME
                if check_implementation not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(check_implementation)
            divides = type(module).__name__ in ("BlipAttention", "Blip2Attention")
            kind: Any = type(module)
            if divides and site.num_units * site.head_dim != module.embed_dim:
                module.__class__ = _counting(kind)
    _number(layers)


def _number(layers: nn.ModuleList) -> None:
    """Give the attentions that are left the first places in the KV cache, in order.

    Places keep their kind: a cache has other entries for attention in a window.
    """
    by_window: dict[int | None, list[tuple[int, Any]]] = {}
    for position, layer in enumerate(layers):
        for site in find_sites(layer).values():
            module: Any = site.module
            if site.kind == "heads" and not site.cross and hasattr(module, _INDEX):
                window = getattr(module, "sliding_window", None)
                by_window.setdefault(window, []).append((position, module))
    own = [each for found in by_window.values() for each in found]
    if not any(is_absent(module) for _, module in own):
        return
    for found in by_window.values():
        present_first = sorted(found, key=lambda each: is_absent(each[1]))
        for (place, _), (_, module) in zip(found, present_first, strict=True):
            setattr(module, _INDEX, place)


def set_widths(layers: nn.ModuleList, widths: Widths) -> None:
    """Give layers the widths that their config cannot state; their projections are new and empty.

    Args:
        layers: as built from the config.
        widths: of the places to change, by position.

    Raises:
        ShapeError: a layer lacks a place, or cannot have such a width.
    """
    for position, by_site in widths.items():
        sites = find_sites(layers[position])
        for name, groups in by_site.items():
            if name not in sites:
                raise ShapeError(unknown_name("place of the layer", name, sites))
            if sites[name].groups != tuple(groups):
                resize(sites[name], groups)
    adapt(layers)
