"""Whole models with random weights in the sizes of real ones, and what they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from interlace.models import VLM, family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = 4, 5, 6, 7, 10
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its prompt.

    Attributes:
        family: "qwen3_vl", "llava" or "clip".
        text: fields of the text config.
        vision: fields of the vision config.
        image_side: of the square image, in pixels.
        words: of the prompt, beside the image's tokens.
    """

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image_side: int
    words: int


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, words: int) -> Any:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    }


def _qwen_vision(depth: int, hidden: int, inner: int, out: int, deepstack: list[int]) -> Any:
    return {
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_heads": 16,
        "out_hidden_size": out,
        "deepstack_visual_indexes": deepstack,
        "num_position_embeddings": 2304,
    }


_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# as the config.json of each checkpoint gives them, "small" apart
SIZES = {
    "qwen3-vl-8b": Size(
        "qwen3_vl",
        _text(4096, 12288, 36, 32, 8, 151936),
        _qwen_vision(27, 1152, 4304, 4096, [8, 16, 24]),
        image_side=768,
        words=128,
    ),
    "qwen3-vl-4b": Size(
        "qwen3_vl",
        _text(2560, 9728, 36, 32, 8, 151936),
        _qwen_vision(24, 1024, 4096, 2560, [5, 11, 17]),
        image_side=768,
        words=128,
    ),
    "llava-1.5-7b": Size(
        "llava",
        _text(4096, 11008, 32, 32, 32, 32064),
        {**_CLIP_L, "image_size": 336},
        image_side=336,
        words=128,
    ),
    "clip-l": Size(
        "clip",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        {**_CLIP_L, "image_size": 224},
        image_side=224,
        words=77,
    ),
    # the proportions of Qwen3-VL in a size for two CPU cores
    "small": Size(
        "qwen3_vl",
        _text(1024, 3072, 20, 16, 8, 16384),
        _qwen_vision(4, 256, 1024, 1024, [0, 1, 2]),
        image_side=384,
        words=112,
    ),
}


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model of a size with random weights."""
    torch.manual_seed(0)
    special = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    if size.family == "qwen3_vl":
        rope = {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        }
        config: Any = tf.Qwen3VLConfig(
            text_config={**size.text, "rope_parameters": rope},
            vision_config=size.vision,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            **special,
        )
        made: Any = tf.Qwen3VLForConditionalGeneration
    elif size.family == "llava":
        config = tf.LlavaConfig(
            text_config=tf.LlamaConfig(**size.text),
            vision_config=tf.CLIPVisionConfig(**size.vision),
            image_token_index=IMAGE,
        )
        made = tf.LlavaForConditionalGeneration
    else:
        config = tf.CLIPConfig(text_config=size.text, vision_config=size.vision)
        made = tf.CLIPModel
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = made(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def evenly(vlm: VLM, count: int) -> tuple[int, ...]:
    """Choose so many text layers that may go, evenly spread."""
    tower = vlm.towers["text"]
    free = [layer for layer in range(tower.num_layers) if layer not in tower.pinned]
    return tuple(free[round((i + 0.5) * len(free) / count - 0.5)] for i in range(count))


def without_a_quarter(model: Any) -> Any:
    """The same model without 25 % of its text layers, evenly spread; weights are shared."""
    vlm = VLM(model, family_of(model))
    depth = vlm.towers["text"].num_layers
    plan = Plan({"text": TowerPlan(depth, drop=evenly(vlm, depth // 4))})
    return prune(vlm, plan).model.requires_grad_(False)


def inputs_of(size: Size, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """One image and a prompt per row, of random pixels and words."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = size.text.get("vocab_size", 49408)
    words = torch.randint(FIRST_WORD, vocabulary - 10, (batch, size.words), generator=generator)
    if size.family == "qwen3_vl":
        side = size.image_side // 16
        pixels = torch.randn(batch * side * side, 3 * 2 * 16 * 16, generator=generator)
        image = torch.full((batch, side * side // 4), IMAGE)
        start, end = (torch.full((batch, 1), each) for each in (VISION_START, VISION_END))
        ids = torch.cat((words[:, :8], start, image, end, words[:, 8:]), dim=1)
        found = {
            "pixel_values": pixels.to(dtype),
            "image_grid_thw": torch.tensor([[1, side, side]] * batch),
            "mm_token_type_ids": (ids == IMAGE).to(torch.int32),
        }
    else:
        pixels = torch.randn(batch, 3, size.image_side, size.image_side, generator=generator)
        ids, found = words, {"pixel_values": pixels.to(dtype)}
        if size.family == "llava":
            image = torch.full((batch, (size.image_side // 14) ** 2), IMAGE)
            ids = torch.cat((words[:, :8], image, words[:, 8:]), dim=1)
    found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(device) for name, value in found.items()}


def text_parameters(model: Any) -> int:
    """Weights that every generated token is multiplied with: the text layers and the head."""
    vlm = VLM(model, family_of(model))
    layers = sum(p.numel() for p in vlm.towers["text"].layers.parameters())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return layers + (0 if head is None else head.weight.numel())


def parameters_at_work(model: Any, inputs: Inputs) -> int:
    """Multiplications of one forward pass in the layers of all towers: weights x tokens."""
    vlm = VLM(model, family_of(model))
    total = 0
    for name, tower in vlm.towers.items():
        weights = sum(p.numel() for p in tower.layers.parameters())
        if name != "vision":
            tokens = inputs["input_ids"].numel()
        elif "image_grid_thw" in inputs:
            tokens = inputs["pixel_values"].shape[0]
        else:
            pixels, patch = inputs["pixel_values"], tower.config.patch_size
            tokens = pixels.shape[0] * ((pixels.shape[-1] // patch) ** 2 + 1)
        total += weights * tokens
    return total
