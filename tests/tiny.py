"""Tiny random-weight models of every family, and inputs that their forward and generate accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers as tf
from tiny_base import built, encoder_config, randomise, text_config, vision_config
from tiny_batches import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_SIDE,
    NUM_PATCHES,
    PAD,
    PAIRS,
    PATCH_SIDE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    generation_inputs,
    tiny_inputs,
)
from tiny_chat import gemma3, idefics3, internvl, mistral3, paligemma, smolvlm
from tiny_packed import glm4v, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ALL",
    "BOS",
    "EOS",
    "GENERATIVE",
    "IMAGE",
    "IMAGE_SIDE",
    "NUM_PATCHES",
    "PAD",
    "PATCH_SIDE",
    "TINY",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "VOCAB",
    "generation_inputs",
    "randomise",
    "tiny_inputs",
]


def llava(
    seed: int = 0, *, text: int = 8, vision: int = 6, feature_layer: int | list[int] = -2
) -> tf.PreTrainedModel:
    """LLaVA-1.5: CLIP vision tower read at `vision_feature_layer`, Llama text."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision_config(vision)),
        text_config=tf.LlamaConfig(**text_config(text)),
        image_token_index=IMAGE,
        vision_feature_layer=feature_layer,
        image_seq_length=NUM_PATCHES,
    )
    return built(tf.LlavaForConditionalGeneration, config, seed)


def llava_next(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """LLaVA-NeXT: one base tile and the grid tiles of each image, with row separators."""
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**vision_config(vision)),
        text_config=tf.MistralConfig(**text_config(text, sliding_window=None)),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
        image_seq_length=NUM_PATCHES,
    )
    return built(tf.LlavaNextForConditionalGeneration, config, seed)


def llava_onevision(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """LLaVA-OneVision: SigLIP vision tower without head, Qwen2 text, all patches kept."""
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_config(vision, vision_use_head=False)),
        text_config=tf.Qwen2Config(**text_config(text)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
    )
    return built(tf.LlavaOnevisionForConditionalGeneration, config, seed)


def clip(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """CLIP with an end-of-text token that its pooling looks for."""
    config = tf.CLIPConfig(
        text_config=encoder_config(text, eos_token_id=3, projection_dim=24),
        vision_config=vision_config(vision, projection_dim=24),
        projection_dim=24,
    )
    return built(tf.CLIPModel, config, seed)


def metaclip_2(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """MetaCLIP 2: a CLIP of its own classes."""
    config = tf.MetaClip2Config(
        text_config=encoder_config(text, projection_dim=24),
        vision_config=vision_config(vision, projection_dim=24),
        projection_dim=24,
    )
    return built(tf.MetaClip2Model, config, seed)


def chinese_clip(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """Chinese-CLIP: a BERT beside CLIP's vision tower."""
    config = tf.ChineseCLIPConfig(
        text_config=encoder_config(text),
        vision_config=vision_config(vision, projection_dim=24),
        projection_dim=24,
    )
    model = built(tf.ChineseCLIPModel, config, seed)
    # transformers clears what stands for padding whenever it loads this model
    words = model.text_model.embeddings.word_embeddings
    words.weight.data[words.padding_idx] = 0
    return model


def siglip(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """SigLIP with its attention-pooling head."""
    config = tf.SiglipConfig(text_config=encoder_config(text), vision_config=vision_config(vision))
    return built(tf.SiglipModel, config, seed)


def siglip2(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """SigLIP 2 (NaFlex: patches, their mask and the grid of each image)."""
    patches = vision_config(vision, num_patches=NUM_PATCHES)
    del patches["image_size"]
    config = tf.Siglip2Config(text_config=encoder_config(text), vision_config=patches)
    return built(tf.Siglip2Model, config, seed)


def _blip(num_text: int, num_vision: int) -> tf.PretrainedConfig:
    text = encoder_config(num_text, sep_token_id=EOS, projection_dim=24, encoder_hidden_size=32)
    return tf.BlipConfig(
        text_config=text,
        vision_config=vision_config(num_vision),
        projection_dim=24,
        image_text_hidden_size=24,
    )


def blip_caption(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """BLIP captioner: a text decoder that attends to the image."""
    return built(tf.BlipForConditionalGeneration, _blip(text, vision), seed)


def blip_vqa(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """BLIP for questions: text encoder and decoder of the same depth."""
    return built(tf.BlipForQuestionAnswering, _blip(text, vision), seed)


def _blip2(
    seed: int, text_config: tf.PretrainedConfig, vision: int, qformer: int
) -> tf.PreTrainedModel:
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**vision_config(vision)),
        qformer_config=tf.Blip2QFormerConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=qformer,
            num_attention_heads=4,
            cross_attention_frequency=2,
            encoder_hidden_size=32,
        ),
        text_config=text_config,
        num_query_tokens=5,
        image_token_index=IMAGE,
    )
    return built(tf.Blip2ForConditionalGeneration, config, seed)


def blip2_opt(
    seed: int = 0, *, text: int = 6, vision: int = 6, qformer: int = 8
) -> tf.PreTrainedModel:
    """BLIP-2 with an OPT decoder; Q-Former layers 0, 2, 4, 6 attend to the image."""
    text_config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=text,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _blip2(seed, text_config, vision, qformer)


def blip2_t5(
    seed: int = 0, *, text: int = 6, text_encoder: int = 7, vision: int = 6, qformer: int = 8
) -> tf.PreTrainedModel:
    """BLIP-2 with a T5: encoder and decoder of unequal depth, position bias in block 0 of each."""
    text_config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=text_encoder,
        num_decoder_layers=text,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return _blip2(seed, text_config, vision, qformer)


TINY: dict[str, Callable[..., tf.PreTrainedModel]] = {
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "glm4v": glm4v,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "internvl": internvl,
    "idefics3": idefics3,
    "mistral3": mistral3,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "clip": clip,
    "chinese_clip": chinese_clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "blip_caption": blip_caption,
    "blip_vqa": blip_vqa,
    "blip2_opt": blip2_opt,
    "blip2_t5": blip2_t5,
}
# Their classes have names of their own and the code of Idefics3 and of CLIP.
COPIES: dict[str, Callable[..., tf.PreTrainedModel]] = {
    "smolvlm": smolvlm,
    "metaclip_2": metaclip_2,
}
ALL = {**TINY, **COPIES}
GENERATIVE = tuple(name for name in ALL if name not in PAIRS)
