"""BLIP-2: a Q-Former between the vision tower and an OPT or T5 language model.

Q-Former layer i attends to the image where i % `cross_attention_frequency` == 0, so only cuts that
leave such a pattern exist. T5 keeps the relative position bias of a whole stack in block 0, so it
moves to the first kept block; and transformers makes the KV cache of its decoder as deep as its
encoder unless the config says `decoder_layers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from interlace.errors import PlanError
from interlace.models.discovery import has_cross_attention
from interlace.models.family import Changes, Family, Shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

_KEY = "cross_attention_frequency"
_CACHE_KEY = "decoder_layers"


def frequency_of(crossing: Sequence[bool], preferred: int) -> int | None:
    """Find f such that layer i crosses exactly where i % f == 0.

    Args:
        crossing: whether each layer has cross-attention.
        preferred: taken where it fits.

    Returns:
        f in 1..len(crossing), or `preferred`; None where no f gives this pattern.
    """
    frequency: int
    for frequency in (preferred, *range(1, len(crossing) + 1)):
        if all(has == (i % frequency == 0) for i, has in enumerate(crossing)):
            return frequency
    return None


def _remap_qformer(cut: Shortened) -> Changes:
    config: Any = cut.model.config
    before = int(config.qformer_config.cross_attention_frequency)
    crossing = [has_cross_attention(cut.layers[i]) for i in cut.kept]
    after = frequency_of(crossing, before)
    if after is None:
        pattern = " ".join("cross" if has else "self" for has in crossing)
        raise PlanError(
            f"The Q-Former can only state 'every {_KEY}-th layer attends to the image, starting at "
            f"layer 0', but the kept layers {list(cut.kept)} would be: {pattern}. Drop a cross "
            "layer together with the self layers that follow it, or all self layers."
        )
    if after == before:
        return {}
    config.qformer_config.cross_attention_frequency = after
    return {f"qformer_config.{_KEY}": (before, after)}


def _move_position_bias(cut: Shortened, stack: nn.ModuleList) -> None:
    """Give the first kept T5 block the position bias that all blocks of its stack share."""
    old: Any = cut.layers[0]
    new: Any = stack[0]
    if cut.kept[0] == 0 or not hasattr(old, "layer"):
        return
    source, target = old.layer[0].SelfAttention, new.layer[0].SelfAttention
    if not getattr(source, "has_relative_attention_bias", False):
        return
    weight = source.relative_attention_bias.weight
    # On the meta device, so that no second table is made: the weight is shared with the model
    # before the cut.
    num_buckets, num_heads = weight.shape
    bias = nn.Embedding(num_buckets, num_heads, device="meta")
    bias.weight = weight
    target.relative_attention_bias = bias
    target.has_relative_attention_bias = True


def _state_cache_depth(cut: Shortened) -> Changes:
    """State the depth of a T5 decoder that is deeper than its encoder where the KV cache reads it.

    `PreTrainedConfig.get_text_config(decoder=True)` takes it from `decoder_layers`, which T5 itself
    neither has nor reads; without it generation runs out of cache layers.
    """
    config: Any = cut.model.config
    depth = getattr(config.text_config, "num_decoder_layers", None)
    if depth is None or depth <= config.text_config.num_layers:
        return {}
    before = getattr(config.text_config, _CACHE_KEY, None)
    if before == depth:
        return {}
    setattr(config.text_config, _CACHE_KEY, depth)
    return {f"text_config.{_CACHE_KEY}": (before, depth)}


def _remap(cut: Shortened) -> Changes:
    changes = _remap_qformer(cut) if cut.tower_name == "qformer" else {}
    if cut.tower_name in ("text", "text_encoder") and cut.kept:
        _move_position_bias(cut, BLIP2.stack(cut.model, cut.tower_name).layers)
    return changes | _state_cache_depth(cut)


BLIP2 = Family(
    name="blip2",
    model_types=("blip-2",),
    objective="caption",
    architectures=("Blip2ForConditionalGeneration",),
    remapping=_remap,
)
