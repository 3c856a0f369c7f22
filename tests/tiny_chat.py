"""Tiny chat models with a vision tower of square images and a projector: what came after LLaVA."""

from __future__ import annotations

from typing import Any

import transformers as tf
from tiny_base import built, text_config, vision_config
from tiny_batches import IMAGE, PAD, VISION_END, VISION_START


def gemma3(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """Gemma 3: text layers 3 and 7 see everything, the others 16 tokens; norms behind parts too."""
    kinds = [*["sliding_attention"] * 3, "full_attention"] * text
    config = tf.Gemma3Config(
        text_config=text_config(
            text,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=kinds[:text],
        ),
        vision_config=tf.SiglipVisionConfig(**vision_config(vision, vision_use_head=False)),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    model = built(tf.Gemma3ForConditionalGeneration, config, seed)
    # without a cache it would look for an image behind what was generated
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def paligemma(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """PaliGemma: SigLIP tower, Gemma text that sees image and prompt both ways."""
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(
            **vision_config(vision, vision_use_head=False, projection_dim=32)
        ),
        text_config=tf.GemmaConfig(**text_config(text, head_dim=8)),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return built(tf.PaliGemmaForConditionalGeneration, config, seed)


def internvl(
    seed: int = 0, *, text: int = 8, vision: int = 6, feature_layer: int = -1, **more: Any
) -> tf.PreTrainedModel:
    """InternVL: its own vision tower, whose patches are merged four to one, and Qwen2 text."""
    sides: Any = {"image_size": [32, 32], "patch_size": [8, 8], **more}
    config = tf.InternVLConfig(
        vision_config=vision_config(vision) | sides,
        text_config=text_config(text) | {"model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=feature_layer,
    )
    return built(tf.InternVLForConditionalGeneration, config, seed)


def idefics3(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """Idefics3: tiles of images beside a batch of rows, patches shuffled four to one, Llama."""
    return _idefics3(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration, seed, text, vision)


def smolvlm(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """SmolVLM: an Idefics3 of its own classes."""
    return _idefics3(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration, seed, text, vision)


def _idefics3(config: Any, model: Any, seed: int, text: int, vision: int) -> tf.PreTrainedModel:
    made = config(
        vision_config=vision_config(vision),
        text_config=text_config(text) | {"model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return built(model, made, seed)


def mistral3(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """Mistral 3: Pixtral tower, all images in one row, patches merged four to one."""
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**vision_config(vision, head_dim=8)),
        text_config=tf.MistralConfig(**text_config(text, head_dim=8, sliding_window=None)),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return built(tf.Mistral3ForConditionalGeneration, config, seed)
