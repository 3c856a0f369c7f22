"""Inputs made from a model's config alone, to run it without data: checks and comparisons of loads.

Legend: B batch (2), T tokens, C channels, S image side, P patch side, N patches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from interlace._torch_utils import accepts
from interlace.models.discovery import find_towers
from interlace.models.family import token_id
from interlace.models.handle import to_model
from interlace.models.llava import PIXTRAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    Inputs = dict[str, torch.Tensor]

_BATCH = 2
_NUM_WORDS = 6
_SEED = 0


def image_features(model: PreTrainedModel, inputs: Inputs) -> Any:
    """Run what comes before the text tower on images alone."""
    owner: Any = model if hasattr(model, "get_image_features") else model.base_model
    return owner.get_image_features(**inputs)


def synthetic_images(model: PreTrainedModel) -> Inputs:
    """Return images alone, as the last of `synthetic_inputs`."""
    return to_model(_pixels(model), model)


def synthetic_inputs(model: PreTrainedModel) -> Iterator[Callable[[], Inputs]]:
    """Yield makers of inputs for a model's forward, the most telling first.

    They give image and text, then text, then image, on the model's device and in its dtype. A maker
    may raise where its inputs do not suit the model.
    """
    yield lambda: to_model(_with_decoder(model, _image_and_text(model)), model)
    yield lambda: to_model(_with_decoder(model, _text(model)), model)
    yield lambda: synthetic_images(model)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _image_and_text(model: PreTrainedModel) -> Inputs:
    images = _pixels(model)
    image_token = token_id(model, "image")
    if image_token is None or not model.can_generate():
        return images | _text(model)
    count = _image_tokens(model, images)
    words = _text(model)["input_ids"]
    image = torch.full((_BATCH, count), image_token)
    ids = torch.cat([words[:, :2], image, words[:, 2:]], dim=1)
    inputs = images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if accepts(model, "mm_token_type_ids"):
        inputs["mm_token_type_ids"] = (ids == image_token).to(torch.int32)
    return inputs


def _text(model: PreTrainedModel) -> Inputs:
    """Token ids [B, T] that avoid every special token, with the end token last."""
    text: Any = model.config.get_text_config()
    special = _special_ids(model.config) | _special_ids(text)
    words = [i for i in range(int(text.vocab_size)) if i not in special]
    chosen = torch.randint(len(words), (_BATCH, _NUM_WORDS), generator=_generator())
    ids = torch.tensor(words)[chosen]
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if isinstance(end, int) and 0 <= end < int(text.vocab_size):
        ids[:, -1] = end
    inputs = {"input_ids": ids}
    if accepts(model, "attention_mask"):
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for key, value in vars(config).items():
        if key.endswith(("_token_id", "_token_index")):
            found |= {value} if isinstance(value, int) else set(value or ())
    return found


def _with_decoder(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Add what the separate decoder of an encoder-decoder reads."""
    if accepts(model, "decoder_input_ids") and "text_encoder" in find_towers(model):
        words = inputs["input_ids"][:, -4:].contiguous()
        inputs = inputs | {"decoder_input_ids": words, "labels": words}
    return inputs


def _pixels(model: PreTrainedModel) -> Inputs:
    """Random images in the layout that the model's vision tower takes."""
    config: Any = model.config
    vision: Any = config.vision_config
    channels: Any = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    patch = vision.patch_size
    if accepts(model, "image_grid_thw"):
        side = 2 * getattr(vision, "spatial_merge_size", 2)
        width = channels * getattr(vision, "temporal_patch_size", 1) * patch * patch
        return {
            "pixel_values": _noise(_BATCH * side * side, width),
            "image_grid_thw": torch.tensor([[1, side, side]] * _BATCH),
        }
    if accepts(model, "spatial_shapes"):
        side = math.isqrt(vision.num_patches)
        return {
            "pixel_values": _noise(_BATCH, side * side, channels * patch * patch),
            "pixel_attention_mask": torch.ones(_BATCH, side * side, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[side, side]] * _BATCH),
        }
    side = vision.image_size
    if accepts(model, "image_sizes") and getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        size = min(config.image_grid_pinpoints, key=math.prod)
        tiles = image_size_to_num_patches(list(size), config.image_grid_pinpoints, side)
        return {
            "pixel_values": _noise(_BATCH, tiles, channels, side, side),
            "image_sizes": torch.tensor([list(size)] * _BATCH),
        }
    height, width = (side, side) if isinstance(side, int) else side
    if accepts(model, "pixel_attention_mask"):
        # Idefics: the tiles of each row
        return {"pixel_values": _noise(_BATCH, 1, channels, height, width)}
    images = {"pixel_values": _noise(_BATCH, channels, height, width)}
    if vision.model_type == PIXTRAL:
        images["image_sizes"] = torch.tensor([[height, width]] * _BATCH)
    return images


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator())


def _image_tokens(model: PreTrainedModel, images: Inputs) -> int:
    """How many tokens one image takes in the prompt."""
    config: Any = model.config
    fixed = getattr(config, "num_query_tokens", None)
    if isinstance(fixed, int):
        return fixed
    merge = getattr(config.vision_config, "spatial_merge_size", None)
    if "image_grid_thw" in images and isinstance(merge, int):
        return int(images["image_grid_thw"][0].prod()) // merge**2
    with torch.no_grad():
        found = image_features(model, to_model(images, model))
    features = getattr(found, "pooler_output", found)
    return len(features[0])
