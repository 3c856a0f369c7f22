"""Inputs for the tiny models of `tiny`, built directly, without any processor.

Legend: B batch, T tokens, C channels (3), S image side in pixels (32), N patches (16).

Rows are of unequal length and padded, and every image placeholder stands for one image feature.
"""

from __future__ import annotations

import math
from typing import Any

import torch

VOCAB = 128
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END = 120, 121, 122, 123
# Lengths of the prompts of a batch cycle through these, so that batches are padded.
PROMPT_LENGTHS = (7, 4, 6)
IMAGE_SIDE, PATCH_SIDE = 32, 8
NUM_PATCHES = (IMAGE_SIDE // PATCH_SIDE) ** 2
# families whose processors pack the patches of all images into rows, with their grids
PACKED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen2_vl", "qwen2_5_vl", "glm4v")
# families that compare images and texts
PAIRS = ("clip", "metaclip_2", "chinese_clip", "siglip", "siglip2")
# families whose image tokens each stand for four patches of a square image
_MERGED = ("gemma3", "internvl", "idefics3", "smolvlm", "mistral3")


def _image_grid(index: int) -> tuple[int, int, int]:
    """Patch grid (time, height, width) of an image of a packed batch; sizes are unequal."""
    return (1, 4, 4) if index % 2 == 0 else (1, 4, 6)


def _packed_images(
    batch: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], list[int]]:
    grids = [_image_grid(i) for i in range(batch)]
    rows = sum(math.prod(grid) for grid in grids)
    pixels = torch.randn(rows, 3 * PATCH_SIDE * PATCH_SIDE, generator=generator)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
    return inputs, [math.prod(grid) // 4 for grid in grids]


def _square_images(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)


def _chat_images(
    name: str, model: Any, batch: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Image inputs of a chat model, and how many tokens each image takes in the prompt."""
    if name in PACKED:
        return _packed_images(batch, generator)
    if name in ("llava", "paligemma"):
        return {"pixel_values": _square_images(batch, generator=generator)}, [NUM_PATCHES] * batch
    if name in _MERGED:
        # tiles of every row
        shape = (batch, 1) if name in ("idefics3", "smolvlm") else (batch,)
        inputs = {"pixel_values": _square_images(*shape, generator=generator)}
        if name == "mistral3":
            inputs["image_sizes"] = torch.tensor([[IMAGE_SIDE, IMAGE_SIDE]] * batch)
        return inputs, [NUM_PATCHES // 4] * batch
    if name.startswith("blip2"):
        inputs = {"pixel_values": _square_images(batch, generator=generator)}
        return inputs, [model.config.num_query_tokens] * batch
    inputs = {
        "pixel_values": _square_images(batch, 2, generator=generator),
        "image_sizes": torch.tensor([[IMAGE_SIDE, IMAGE_SIDE]] * batch),
    }
    with torch.no_grad():
        features = model.model.get_image_features(**inputs).pooler_output
    return inputs, [len(feature) for feature in features]


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(5, 100, (count,), generator=generator).tolist()


def _padded(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of token ids to one length: ids [B, T] and attention mask [B, T]."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = [PAD] * (width - len(row))
        ids.append(gap + row if left else row + gap)
        on, off = [1] * len(row), [0] * len(gap)
        mask.append(off + on if left else on + off)
    return torch.tensor(ids), torch.tensor(mask)


def _chat_inputs(
    name: str, model: Any, batch: int, generator: torch.Generator, *, left: bool
) -> dict[str, torch.Tensor]:
    inputs, lengths = _chat_images(name, model, batch, generator)
    rows = []
    for i, length in enumerate(lengths):
        image = [IMAGE] * length
        if name in PACKED:
            image = [VISION_START, *image, VISION_END]
        words = _words(PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)], generator)
        rows.append([*words[:2], *image, *words[2:]] if name in PACKED else [*image, *words])
    ids, mask = _padded(rows, left=left)
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if name in PACKED:
        inputs["mm_token_type_ids"] = (ids == IMAGE).to(torch.int32)
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma" and not left:
        # the answer, which sees what is before it alone
        ends = mask.sum(1, keepdim=True)
        inputs["token_type_ids"] = (torch.arange(ids.shape[1]) >= ends - 3).long() * mask
    return inputs


def _answers(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[BOS, *_words(3 + i % 2, generator), EOS] for i in range(batch)]
    return _padded(rows, left=False)


def _pair_inputs(name: str, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs of a model that compares images and texts."""
    end = 3 if name == "clip" else EOS
    rows = [[BOS, *_words(PROMPT_LENGTHS[i % 3], generator), end] for i in range(batch)]
    ids, mask = _padded(rows, left=False)
    inputs = {"input_ids": ids}
    if name in ("clip", "metaclip_2", "chinese_clip"):
        inputs["attention_mask"] = mask
    if name != "siglip2":
        return inputs | {"pixel_values": _square_images(batch, generator=generator)}
    shapes = torch.tensor([[4, 4] if i % 2 == 0 else [3, 4] for i in range(batch)])
    pixels = torch.randn(batch, NUM_PATCHES, 3 * PATCH_SIDE**2, generator=generator)
    real = torch.arange(NUM_PATCHES)[None, :] < shapes.prod(1)[:, None]
    return inputs | {
        "pixel_values": pixels * real[..., None],
        "pixel_attention_mask": real.to(torch.int32),
        "spatial_shapes": shapes,
    }


def tiny_inputs(name: str, model: Any, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `model(**inputs)`: right-padded rows of unequal length, one image each.

    Models with a separate decoder also get decoder inputs and labels (padding -100).
    """
    generator = torch.Generator().manual_seed(seed)
    if name in PAIRS:
        return _pair_inputs(name, batch, generator)
    if name.startswith("blip_"):
        rows = [[BOS, *_words(PROMPT_LENGTHS[i % 3], generator), EOS] for i in range(batch)]
        ids, mask = _padded(rows, left=False)
        inputs = {
            "pixel_values": _square_images(batch, generator=generator),
            "input_ids": ids,
            "attention_mask": mask,
        }
    else:
        inputs = _chat_inputs(name, model, batch, generator, left=False)
    if name in ("blip_vqa", "blip2_t5"):
        ids, mask = _answers(batch, generator)
        inputs |= {
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }
    return inputs


def generation_inputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    """Inputs of `model.generate(**inputs)`: prompts of unequal length, padded on the left.

    BLIP's captioner drops the last prompt token itself (the separator its processor adds).
    """
    batch, generator = 2, torch.Generator().manual_seed(0)
    if name == "blip_vqa":
        inputs = tiny_inputs(name, model, batch)
        return {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    if name == "blip_caption":
        rows = [[BOS, *_words(PROMPT_LENGTHS[i % 3], generator), EOS] for i in range(batch)]
        ids, mask = _padded(rows, left=True)
        pixels = _square_images(batch, generator=generator)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    return _chat_inputs(name, model, batch, generator, left=True)
