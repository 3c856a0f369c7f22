"""Models of unknown type: accepted after the self-check, or refused with the reason in words."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from tiny import IMAGE, TINY, randomise
from torch import nn

from interlace.errors import FamilyError
from interlace.models import open_model
from interlace.models.check import self_check

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


def idefics3() -> Any:
    config = tf.Idefics3Config(
        vision_config=VISION,
        text_config=TEXT | {"model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return randomise(tf.Idefics3ForConditionalGeneration(config), 0)


def internvl() -> Any:
    vision = VISION | {"image_size": [32, 32], "patch_size": [8, 8]}
    config = tf.InternVLConfig(
        vision_config=vision, text_config=TEXT | {"model_type": "qwen2"}, image_token_id=IMAGE
    )
    return randomise(tf.InternVLForConditionalGeneration(config), 0)


def test_an_unknown_type_passes_the_self_check() -> None:
    vlm = open_model(idefics3())
    assert vlm.family.name == "idefics3"
    assert vlm.family.objective == "chat"
    assert {name: tower.num_layers for name, tower in vlm.towers.items()} == {
        "text": 3,
        "vision": 4,
    }


def test_an_unknown_type_with_a_feature_layer_is_handled_as_llava() -> None:
    vlm = open_model(internvl())
    assert vlm.family.name == "internvl"
    assert "vision_feature_layer" in vlm.towers["vision"].pinned[3]


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
    model = idefics3()
    model.config.text_config.global_attn_indexes = [1]
    with pytest.raises(
        FamilyError, match=r"text_config\.global_attn_indexes.*Known families: qwen3_vl"
    ):
        open_model(model)


def test_two_stacks_of_one_name_are_refused() -> None:
    model = idefics3()
    encoder = model.model.vision_model.encoder
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
