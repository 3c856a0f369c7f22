"""Tiny random-weight models of every family, and inputs that their forward and generate accept.

Every model is seeded, in eval mode, fp32, with weights of its own in every layer (norms and biases
included), so that a wrong order, a lost layer or a feature at the wrong place changes the output.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from tiny_batches import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_SIDE,
    NUM_PATCHES,
    PAD,
    PATCH_SIDE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    generation_inputs,
    tiny_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = [
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


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter: matrices by fan-in, norm weights around 1, biases small, none zero."""
    generator = torch.Generator().manual_seed(seed)
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    }
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in norms:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() < 2:
                parameter.copy_(0.1 * noise)
            else:
                fan_in = math.prod(parameter.shape[1:])
                parameter.copy_(noise * min(0.3, 0.8 / math.sqrt(fan_in)))
    return model.eval()


def _text(num_layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **extra,
    }


def _vision(num_layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH_SIDE,
        **extra,
    }


def _qwen_special() -> dict[str, int]:
    names = ("image", "video", "vision_start", "vision_end")
    ids = (IMAGE, VIDEO, VISION_START, VISION_END)
    return {f"{name}_token_id": i for name, i in zip(names, ids, strict=True)}


def qwen3_vl(
    seed: int = 0,
    *,
    text: int = 8,
    vision: int = 6,
    deepstack: tuple[int, ...] = (1, 3),
    tie: bool = False,
) -> tf.PreTrainedModel:
    """Qwen3-VL: DeepStack features of vision blocks 1 and 3 go in after text layers 0 and 1."""
    config = tf.Qwen3VLConfig(
        text_config=_text(
            text,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            tie_word_embeddings=tie,
        ),
        vision_config={
            "depth": vision,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH_SIDE,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(deepstack),
        },
        tie_word_embeddings=tie,
        **_qwen_special(),
    )
    return _build(tf.Qwen3VLForConditionalGeneration, config, seed)


def _qwen2_text(num_layers: int, window: int | None, full_layers: int) -> dict[str, Any]:
    return _text(
        num_layers,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        },
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=full_layers,
    )


def qwen2_vl(
    seed: int = 0, *, text: int = 8, vision: int = 6, window: int | None = None
) -> tf.PreTrainedModel:
    """Qwen2-VL; with `window` text layers 4 and up use sliding attention of that many tokens."""
    config = tf.Qwen2VLConfig(
        text_config=_qwen2_text(text, window, 4),
        vision_config={
            "depth": vision,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH_SIDE,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
        },
        **_qwen_special(),
    )
    return _build(tf.Qwen2VLForConditionalGeneration, config, seed)


def qwen2_5_vl(
    seed: int = 0,
    *,
    text: int = 8,
    vision: int = 6,
    full_attention: tuple[int, ...] = (2, 5),
    window: int | None = None,
) -> tf.PreTrainedModel:
    """Qwen2.5-VL: vision blocks 2 and 5 see the whole image, the others windows of 2x2 patches."""
    config = tf.Qwen2_5_VLConfig(
        text_config=_qwen2_text(text, window, 4),
        vision_config={
            "depth": vision,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH_SIDE,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": list(full_attention),
        },
        **_qwen_special(),
    )
    return _build(tf.Qwen2_5_VLForConditionalGeneration, config, seed)


def llava(
    seed: int = 0, *, text: int = 8, vision: int = 6, feature_layer: int | list[int] = -2
) -> tf.PreTrainedModel:
    """LLaVA-1.5: CLIP vision tower read at `vision_feature_layer`, Llama text."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_vision(vision)),
        text_config=tf.LlamaConfig(**_text(text)),
        image_token_index=IMAGE,
        vision_feature_layer=feature_layer,
        image_seq_length=NUM_PATCHES,
    )
    return _build(tf.LlavaForConditionalGeneration, config, seed)


def llava_next(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """LLaVA-NeXT: one base tile and the grid tiles of each image, with row separators."""
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_vision(vision)),
        text_config=tf.MistralConfig(**_text(text, sliding_window=None)),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
        image_seq_length=NUM_PATCHES,
    )
    return _build(tf.LlavaNextForConditionalGeneration, config, seed)


def llava_onevision(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """LLaVA-OneVision: SigLIP vision tower without head, Qwen2 text, all patches kept."""
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_vision(vision, vision_use_head=False)),
        text_config=tf.Qwen2Config(**_text(text)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[IMAGE_SIDE, IMAGE_SIDE]],
    )
    return _build(tf.LlavaOnevisionForConditionalGeneration, config, seed)


def _encoder_text(num_layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **extra,
    }


def clip(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """CLIP with an end-of-text token that its pooling looks for."""
    config = tf.CLIPConfig(
        text_config=_encoder_text(text, eos_token_id=3, projection_dim=24),
        vision_config=_vision(vision, projection_dim=24),
        projection_dim=24,
    )
    return _build(tf.CLIPModel, config, seed)


def siglip(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """SigLIP with its attention-pooling head."""
    config = tf.SiglipConfig(text_config=_encoder_text(text), vision_config=_vision(vision))
    return _build(tf.SiglipModel, config, seed)


def siglip2(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """SigLIP 2 (NaFlex: patches, their mask and the grid of each image)."""
    vision_config = _vision(vision, num_patches=NUM_PATCHES)
    del vision_config["image_size"]
    config = tf.Siglip2Config(text_config=_encoder_text(text), vision_config=vision_config)
    return _build(tf.Siglip2Model, config, seed)


def _blip(num_text: int, num_vision: int) -> tf.PretrainedConfig:
    text = _encoder_text(num_text, sep_token_id=EOS, projection_dim=24, encoder_hidden_size=32)
    return tf.BlipConfig(
        text_config=text,
        vision_config=_vision(num_vision),
        projection_dim=24,
        image_text_hidden_size=24,
    )


def blip_caption(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """BLIP captioner: a text decoder that attends to the image."""
    return _build(tf.BlipForConditionalGeneration, _blip(text, vision), seed)


def blip_vqa(seed: int = 0, *, text: int = 6, vision: int = 6) -> tf.PreTrainedModel:
    """BLIP for questions: text encoder and decoder of the same depth."""
    return _build(tf.BlipForQuestionAnswering, _blip(text, vision), seed)


def _blip2(
    seed: int, text_config: tf.PretrainedConfig, vision: int, qformer: int
) -> tf.PreTrainedModel:
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**_vision(vision)),
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
    return _build(tf.Blip2ForConditionalGeneration, config, seed)


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


def _build(cls: Any, config: tf.PretrainedConfig, seed: int) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    model = cls(config)
    randomise(model, seed)
    if model.can_generate():
        model.generation_config.pad_token_id = PAD
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = EOS
    return model


TINY: dict[str, Callable[..., tf.PreTrainedModel]] = {
    "qwen3_vl": qwen3_vl,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "blip_caption": blip_caption,
    "blip_vqa": blip_vqa,
    "blip2_opt": blip2_opt,
    "blip2_t5": blip2_t5,
}
GENERATIVE = tuple(name for name in TINY if name not in ("clip", "siglip", "siglip2"))
