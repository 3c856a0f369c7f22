"""Probes: small synthetic inputs made from a model's config alone, to compare two loads of it.

Legend: B batch (2), T tokens, C channels, S image side, P patch side, N patches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from interlace._torch_utils import accepts
from interlace.models.handle import to_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from interlace.models.handle import VLM

    Inputs = dict[str, torch.Tensor]

_BATCH = 2
_NUM_WORDS = 6
_SEED = 0


def probes(vlm: VLM) -> Iterator[Callable[[], Inputs]]:
    """Yield makers of inputs for a model's forward, the most telling first.

    They give image and text, then text, then image. A maker may raise where its inputs do not suit
    the model.
    """
    yield lambda: _with_decoder(vlm, _image_and_text(vlm))
    yield lambda: _with_decoder(vlm, _text(vlm))
    yield lambda: _pixels(vlm)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _image_and_text(vlm: VLM) -> Inputs:
    images = _pixels(vlm)
    image_token = vlm.family.image_token_id(vlm.model)
    if image_token is None or vlm.family.objective == "contrastive":
        return images | _text(vlm)
    count = _image_tokens(vlm, images)
    words = _text(vlm)["input_ids"]
    image = torch.full((_BATCH, count), image_token)
    ids = torch.cat([words[:, :2], image, words[:, 2:]], dim=1)
    inputs = images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if accepts(vlm.model, "mm_token_type_ids"):
        inputs["mm_token_type_ids"] = (ids == image_token).to(torch.int32)
    return inputs


def _text(vlm: VLM) -> Inputs:
    """Token ids [B, T] that avoid every special token, with the end token last."""
    text: Any = vlm.model.config.get_text_config()
    special = _special_ids(vlm.model.config) | _special_ids(text)
    words = [i for i in range(int(text.vocab_size)) if i not in special]
    chosen = torch.randint(len(words), (_BATCH, _NUM_WORDS), generator=_generator())
    ids = torch.tensor(words)[chosen]
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if isinstance(end, int) and 0 <= end < int(text.vocab_size):
        ids[:, -1] = end
    inputs = {"input_ids": ids}
    if accepts(vlm.model, "attention_mask"):
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for key, value in vars(config).items():
        if key.endswith(("_token_id", "_token_index")):
            found |= {value} if isinstance(value, int) else set(value or ())
    return found


def _with_decoder(vlm: VLM, inputs: Inputs) -> Inputs:
    """Add what the separate decoder of an encoder-decoder reads."""
    if accepts(vlm.model, "decoder_input_ids") and "text_encoder" in vlm.towers:
        words = inputs["input_ids"][:, -4:].contiguous()
        inputs = inputs | {"decoder_input_ids": words, "labels": words}
    return inputs


def _pixels(vlm: VLM) -> Inputs:
    """Random images in the layout that the model's vision tower takes."""
    config: Any = vlm.model.config
    vision: Any = config.vision_config
    channels: Any = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    patch = vision.patch_size
    if accepts(vlm.model, "image_grid_thw"):
        side = 2 * vision.spatial_merge_size
        width = channels * vision.temporal_patch_size * patch * patch
        return {
            "pixel_values": _noise(_BATCH * side * side, width),
            "image_grid_thw": torch.tensor([[1, side, side]] * _BATCH),
        }
    if accepts(vlm.model, "spatial_shapes"):
        side = math.isqrt(vision.num_patches)
        return {
            "pixel_values": _noise(_BATCH, side * side, channels * patch * patch),
            "pixel_attention_mask": torch.ones(_BATCH, side * side, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[side, side]] * _BATCH),
        }
    side = vision.image_size
    if accepts(vlm.model, "image_sizes") and getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        size = min(config.image_grid_pinpoints, key=math.prod)
        tiles = image_size_to_num_patches(list(size), config.image_grid_pinpoints, side)
        return {
            "pixel_values": _noise(_BATCH, tiles, channels, side, side),
            "image_sizes": torch.tensor([list(size)] * _BATCH),
        }
    return {"pixel_values": _noise(_BATCH, channels, side, side)}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator())


def _image_tokens(vlm: VLM, images: Inputs) -> int:
    """How many tokens one image takes in the prompt."""
    config: Any = vlm.model.config
    fixed = getattr(config, "num_query_tokens", None)
    if isinstance(fixed, int):
        return fixed
    merge = getattr(config.vision_config, "spatial_merge_size", None)
    if "image_grid_thw" in images and isinstance(merge, int):
        return int(images["image_grid_thw"][0].prod()) // merge**2
    model: Any = vlm.model
    with torch.no_grad():
        found = model.get_image_features(**to_model(images, vlm))
    features = getattr(found, "pooler_output", found)
    return len(features[0])
