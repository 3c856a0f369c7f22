"""Tiny random models of every kind, with processors that know the words of the scenes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import tiny
import transformers as tf
from tiny_chat_processors import (
    gemma3_processor,
    glm4v_processor,
    idefics3_processor,
    internvl_processor,
    mistral3_processor,
    paligemma_processor,
    smolvlm_processor,
)
from tiny_processors_base import SIDE, chat_template, word_tokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import (
    ChineseCLIPImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interlace.models import open_model
from interlace.models.processor import without_video

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.models import VLM


def _size() -> dict[str, int]:
    return {"height": SIDE, "width": SIDE}


def qwen_processor() -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=tiny.PATCH_SIDE,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2},
    )
    return without_video(
        tf.Qwen3VLProcessor,
        images,
        word_tokenizer(limit=256),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def blip_processor() -> Any:
    return tf.BlipProcessor(
        BlipImageProcessorPil(size=_size()), word_tokenizer(frame=("[BOS]", "[EOS]"))
    )


def blip2_processor() -> Any:
    tokenizer = word_tokenizer()
    images = BlipImageProcessorPil(size=_size())
    processor = tf.Blip2Processor(images, tokenizer, num_query_tokens=5)
    # ids stay those of the tiny config, where the image token is no word of the tokenizer
    processor.image_token = tf.AddedToken("<|image_pad|>", normalized=False, special=True)
    return processor


def clip_processor() -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_size())
    return tf.CLIPProcessor(images, word_tokenizer(frame=("[BOS]", "[END]")))


def metaclip_2_processor() -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_size())
    return tf.CLIPProcessor(images, word_tokenizer(frame=("[BOS]", "[EOS]")))


def chinese_clip_processor() -> Any:
    images = ChineseCLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_size())
    return tf.ChineseCLIPProcessor(images, word_tokenizer(frame=("[BOS]", "[EOS]")))


def siglip_processor() -> Any:
    return tf.SiglipProcessor(SiglipImageProcessorPil(size=_size()), word_tokenizer(limit=64))


BUILT: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "qwen3_vl": (tiny.qwen3_vl, qwen_processor),
    "qwen3_vl_moe": (tiny.qwen3_vl_moe, qwen_processor),
    "qwen3_5": (tiny.qwen3_5, qwen_processor),
    "glm4v": (tiny.glm4v, glm4v_processor),
    "gemma3": (tiny.gemma3, gemma3_processor),
    "paligemma": (tiny.paligemma, paligemma_processor),
    "internvl": (tiny.internvl, internvl_processor),
    "idefics3": (tiny.idefics3, idefics3_processor),
    "smolvlm": (tiny.smolvlm, smolvlm_processor),
    "mistral3": (tiny.mistral3, mistral3_processor),
    "blip_caption": (tiny.blip_caption, blip_processor),
    "blip_vqa": (tiny.blip_vqa, blip_processor),
    "blip2_opt": (tiny.blip2_opt, blip2_processor),
    "blip2_t5": (tiny.blip2_t5, blip2_processor),
    "clip": (tiny.clip, clip_processor),
    "metaclip_2": (tiny.metaclip_2, metaclip_2_processor),
    "chinese_clip": (tiny.chinese_clip, chinese_clip_processor),
    "siglip": (tiny.siglip, siglip_processor),
}


@cache
def with_processor(name: str, seed: int = 0) -> VLM:
    """A tiny model by family name and seed; models are shared between tests."""
    build, processor = BUILT[name]
    return open_model(build(seed), processor=processor())
