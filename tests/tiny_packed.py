"""Tiny models whose processors pack the patches of all images, with their grids: Qwen and GLM."""

from __future__ import annotations

from typing import Any

import transformers as tf
from tiny_base import built, text_config
from tiny_batches import IMAGE, IMAGE_SIDE, PATCH_SIDE, VIDEO, VISION_END, VISION_START


def _qwen_special() -> dict[str, int]:
    names = ("image", "video", "vision_start", "vision_end")
    ids = (IMAGE, VIDEO, VISION_START, VISION_END)
    return {f"{name}_token_id": i for name, i in zip(names, ids, strict=True)}


def _interleaved(**extra: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    return {**rope, "mrope_section": [2, 1, 1], **extra}


def _packed_vision(num_layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "depth": num_layers,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": PATCH_SIDE,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        **extra,
    }


def _qwen3_vision(num_layers: int, **extra: Any) -> dict[str, Any]:
    return _packed_vision(num_layers, num_position_embeddings=16, **extra)


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
        text_config=text_config(
            text, head_dim=8, rope_parameters=_interleaved(), tie_word_embeddings=tie
        ),
        vision_config=_qwen3_vision(vision, deepstack_visual_indexes=list(deepstack)),
        tie_word_embeddings=tie,
        **_qwen_special(),
    )
    return built(tf.Qwen3VLForConditionalGeneration, config, seed)


def qwen3_vl_moe(
    seed: int = 0, *, text: int = 8, vision: int = 6, dense: tuple[int, ...] = (0, 5), step: int = 1
) -> tf.PreTrainedModel:
    """Qwen3-VL with experts: text layers 0 and 5 have a plain feed-forward part."""
    config = tf.Qwen3VLMoeConfig(
        text_config=text_config(
            text,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            mlp_only_layers=list(dense),
            decoder_sparse_step=step,
            rope_parameters=_interleaved(),
        ),
        vision_config=_qwen3_vision(vision, deepstack_visual_indexes=[1, 3]),
        **_qwen_special(),
    )
    return built(tf.Qwen3VLMoeForConditionalGeneration, config, seed)


def _recurrent(num_layers: int, **extra: Any) -> dict[str, Any]:
    kinds = ["linear_attention", "linear_attention", "full_attention"] * num_layers
    return text_config(
        num_layers,
        head_dim=8,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=kinds[:num_layers],
        rope_parameters=_interleaved(mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
        **extra,
    )


def qwen3_5(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """Qwen3.5: text layers 2 and 5 attend, with gated outputs; the others are recurrent."""
    config = tf.Qwen3_5Config(
        text_config=_recurrent(text), vision_config=_qwen3_vision(vision), **_qwen_special()
    )
    return built(tf.Qwen3_5ForConditionalGeneration, config, seed)


def qwen3_5_moe(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """Qwen3.5 with experts in every text layer, one of which all tokens share."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = tf.Qwen3_5MoeConfig(
        text_config=_recurrent(text, shared_expert_intermediate_size=24, **experts),
        vision_config=_qwen3_vision(vision),
        **_qwen_special(),
    )
    return built(tf.Qwen3_5MoeForConditionalGeneration, config, seed)


def glm4v(seed: int = 0, *, text: int = 8, vision: int = 6) -> tf.PreTrainedModel:
    """GLM-4.1V: norms before and behind every part of a text layer, partly rotated heads."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = tf.Glm4vConfig(
        text_config=text_config(
            text, head_dim=8, rope_parameters=rope | {"mrope_section": [1, 1, 0]}
        ),
        vision_config=_packed_vision(vision, image_size=IMAGE_SIDE),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=124,
        video_end_token_id=125,
    )
    return built(tf.Glm4vForConditionalGeneration, config, seed)


def _qwen2_text(num_layers: int, window: int | None, full_layers: int) -> dict[str, Any]:
    return text_config(
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
    return built(tf.Qwen2VLForConditionalGeneration, config, seed)


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
        vision_config=_packed_vision(
            vision, window_size=16, fullatt_block_indexes=list(full_attention)
        ),
        **_qwen_special(),
    )
    return built(tf.Qwen2_5_VLForConditionalGeneration, config, seed)
