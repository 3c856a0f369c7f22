"""LLaVA, InternVL and Mistral 3: image features are hidden states of the vision tower, by number.

`vision_feature_layer` counts hidden states: 0 is the input of layer 0, f the output of layer f - 1,
negative numbers count from the end. The state is taken before the tower's final norm. With -2 the
last layer runs for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from interlace.errors import PlanError
from interlace.models.family import Changes, Family, PerImage, Shortened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_KEY = "vision_feature_layer"
# A tower that is given the patches of all images in one row.
PIXTRAL = "pixtral"
# Towers whose last hidden state is the raw output of the last layer, so that -1 reads what -2 read
# before.
_RAW_LAST = ("clip_vision_model", "siglip_vision_model", PIXTRAL)


def _as_list(value: int | list[int] | tuple[int, ...]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _states(model: PreTrainedModel, num_layers: int) -> list[int]:
    """The hidden states that are read, counted from 0 (the input of layer 0) to num_layers."""
    config: Any = model.config
    return [f if f >= 0 else num_layers + 1 + f for f in _as_list(config.vision_feature_layer)]


def _depth(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(config.vision_config.num_hidden_layers)


def _advised(model: PreTrainedModel, tower_name: str) -> dict[int, str]:
    if tower_name != "vision":
        return {}
    states = _states(model, _depth(model))
    return {
        f - 1: f"vision_feature_layer reads the output of vision layer {f - 1}" for f in states if f
    }


def _unread(model: PreTrainedModel, tower_name: str) -> dict[int, str]:
    if tower_name != "vision":
        return {}
    depth = _depth(model)
    first = max(_states(model, depth))
    return dict.fromkeys(range(first, depth), "above vision_feature_layer, read by nothing")


def _remap(cut: Shortened) -> Changes:
    if cut.tower_name != "vision":
        return {}
    config: Any = cut.model.config
    before = config.vision_feature_layer
    states = _states(cut.model, cut.num_layers)
    new = [cut.below(state) for state in states]
    depth = len(cut.kept)
    # A dropped layer passes its input through: its output is that of the nearest kept layer below.
    for state, now in zip(states, new, strict=True):
        kind = config.vision_config.model_type
        if now == depth and state < cut.num_layers and kind not in _RAW_LAST:
            raise PlanError(
                f"The plan drops every vision layer above hidden state {state}, which {_KEY} "
                f"reads. The last state of a '{kind}' tower passes its final norm, the one read so "
                "far does not. Keep the last layer."
            )
    # The state in front of all layers is always counted from the end: transformers takes a plain 0
    # for "no hidden states wanted" and fails.
    after_list = [
        now if given >= 0 and now > 0 else now - (depth + 1)
        for given, now in zip(_as_list(before), new, strict=True)
    ]
    after = after_list[0] if isinstance(before, int) else after_list
    if after == before:
        return {}
    setattr(config, _KEY, after)
    return {_KEY: (before, after)}


def _tiles(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Tiles that every image of a batch is cut into by LLaVA-NeXT and OneVision: [images]."""
    pixels, sizes = batch.get("pixel_values"), batch.get("image_sizes")
    if pixels is None or pixels.dim() != 5 or sizes is None:
        return None
    config: Any = model.config
    side = config.vision_config.image_size
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, side)
        for size in sizes.tolist()
    ]
    per_sample = batch.get("batch_num_images")
    if per_sample is not None:
        # OneVision cuts single images alone
        alone = [number == 1 for number in per_sample.tolist() for _ in range(number)]
        counts = [count if cut else 1 for count, cut in zip(counts, alone, strict=True)]
    return torch.tensor(counts)


def _samples(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Tiles that InternVL cuts the images of every sample into: [samples with images]."""
    ids: torch.Tensor | None = batch.get("input_ids")
    if ids is None:
        return None
    config: Any = model.config
    seen: torch.Tensor = (ids == config.image_token_id).sum(1) // config.image_seq_length
    return seen[seen > 0]


def _patches(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Patches of every image in the one row that Pixtral sees: [images]."""
    config: Any = model.config
    sizes: torch.Tensor | None = batch.get("image_sizes")
    if sizes is None or config.vision_config.model_type != PIXTRAL:
        return None
    grids: torch.Tensor = sizes // config.vision_config.patch_size
    return grids.prod(-1)


def _family(name: str, architecture: str, tiles: PerImage = _tiles) -> Family:
    return Family(
        name=name,
        model_types=(name,),
        objective="chat",
        architectures=(architecture,),
        advised=_advised,
        unread=_unread,
        remapping=_remap,
        tiles=tiles,
        patches=_patches,
    )


LLAVA = _family("llava", "LlavaForConditionalGeneration")
LLAVA_NEXT = _family("llava_next", "LlavaNextForConditionalGeneration")
LLAVA_ONEVISION = _family("llava_onevision", "LlavaOnevisionForConditionalGeneration")
MISTRAL3 = _family("mistral3", "Mistral3ForConditionalGeneration")
INTERNVL = _family("internvl", "InternVLForConditionalGeneration", tiles=_samples)
