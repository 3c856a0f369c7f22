"""Models of unknown type: accepted after the self-check, or refused with the reason in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from tiny import IMAGE, TINY, randomise
from torch import nn

from interlace.errors import FamilyError
from interlace.models import open_model, token_units
from interlace.models.check import self_check
from interlace.models.synthetic import synthetic_images

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def altclip() -> Any:
    config = tf.AltCLIPConfig(
        text_config=TEXT | {"project_dim": 24},
        vision_config=VISION | {"projection_dim": 24},
        projection_dim=24,
    )
    return randomise(tf.AltCLIPModel(config), 0)


def aya_vision() -> Any:
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.LlamaConfig(**TEXT),
        vision_feature_layer=-2,
        downsample_factor=2,
        image_token_index=IMAGE,
    )
    return randomise(tf.AyaVisionForConditionalGeneration(config), 0)


def lighton_ocr() -> Any:
    config = tf.LightOnOcrConfig(
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
        text_config=TEXT | {"model_type": "qwen3", "head_dim": 8},
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return randomise(tf.LightOnOcrForConditionalGeneration(config), 0)


def test_an_unknown_type_is_run_on_images_in_the_layout_of_its_tower() -> None:
    vlm = open_model(lighton_ocr())
    assert list(vlm.towers) == ["text", "vision"]
    images = synthetic_images(vlm.model)
    units, _ = token_units(vlm, "vision", images, torch.zeros(1, 32, 32))
    assert units.bincount().tolist() == [16, 16]


def test_an_unknown_type_passes_the_self_check() -> None:
    vlm = open_model(altclip())
    assert vlm.family.name == "altclip"
    assert vlm.family.objective == "contrastive"
    assert {name: tower.num_layers for name, tower in vlm.towers.items()} == {
        "text": 3,
        "vision": 4,
    }


def test_an_unknown_type_with_a_feature_layer_is_handled_as_llava() -> None:
    vlm = open_model(aya_vision())
    assert vlm.family.name == "aya_vision"
    assert vlm.family.objective == "chat"
    assert "vision_feature_layer" in vlm.towers["vision"].pinned[2]


def test_equal_depths_do_not_mix_configs() -> None:
    config = tf.GitConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vision_config=VISION,
    )
    vlm = open_model(randomise(tf.GitForCausalLM(config), 0))
    assert [field.path for field in vlm.towers["text"].depth_fields] == ["num_hidden_layers"]
    assert [field.path for field in vlm.towers["vision"].depth_fields] == [
        "vision_config.num_hidden_layers"
    ]


def test_configs_that_number_layers_are_refused() -> None:
    model = altclip()
    model.config.text_config.global_attn_indexes = [1]
    with pytest.raises(
        FamilyError, match=r"text_config\.global_attn_indexes.*Known families: qwen3_5"
    ):
        open_model(model)


def test_two_stacks_of_one_name_are_refused() -> None:
    model = altclip()
    encoder = model.vision_model.encoder
    encoder.more = nn.ModuleList([type(encoder.layers[0])(encoder.config) for _ in range(2)])
    with pytest.raises(FamilyError, match="two stacks that would both be the tower 'vision'"):
        open_model(model)


def test_a_model_without_a_stack_is_refused() -> None:
    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    with pytest.raises(FamilyError, match="no stack of equal transformer layers"):
        open_model(tf.ResNetForImageClassification(config))


def test_layers_that_run_out_of_order_are_found() -> None:
    model = TINY["clip"]()
    encoder = model.text_model.encoder
    held = list(encoder.layers)

    def forward(inputs_embeds: Any, **kwargs: Any) -> Any:
        for layer in reversed(held):
            inputs_embeds = layer(inputs_embeds, **kwargs)
        return type("Output", (), {"last_hidden_state": inputs_embeds})()

    encoder.forward = forward
    vlm = open_model(model)
    from tiny import tiny_inputs

    with pytest.raises(FamilyError, match=r"in the order \[5, 4, 3, 2, 1, 0\]"):
        self_check(model, vlm.family.stacks(model), tiny_inputs("clip", model))
