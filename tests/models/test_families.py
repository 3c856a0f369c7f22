"""Every family: towers, pinned layers, sizes, and that the layers run through the lists found."""

from __future__ import annotations

import pytest
import torch
from tiny import ALL, IMAGE, TINY, tiny_inputs

from interlace.errors import FamilyError, PlanError, ShapeError
from interlace.models import FAMILIES, VLM, family_of, open_model
from interlace.models.check import self_check

LAST = "last layer"
TOWERS = {
    "qwen3_vl": {"text": 8, "vision": 6},
    "qwen3_vl_moe": {"text": 8, "vision": 6},
    "qwen3_5": {"text": 8, "vision": 6},
    "qwen3_5_moe": {"text": 8, "vision": 6},
    "glm4v": {"text": 8, "vision": 6},
    "gemma3": {"text": 8, "vision": 6},
    "paligemma": {"text": 8, "vision": 6},
    "internvl": {"text": 8, "vision": 6},
    "mistral3": {"text": 8, "vision": 6},
    "idefics3": {"text": 8, "vision": 6},
    "smolvlm": {"text": 8, "vision": 6},
    "qwen2_vl": {"text": 8, "vision": 6},
    "qwen2_5_vl": {"text": 8, "vision": 6},
    "llava": {"text": 8, "vision": 6},
    "llava_next": {"text": 8, "vision": 6},
    "llava_onevision": {"text": 8, "vision": 6},
    "clip": {"text": 6, "vision": 6},
    "metaclip_2": {"text": 6, "vision": 6},
    "chinese_clip": {"text": 6, "vision": 6},
    "siglip": {"text": 6, "vision": 6},
    "siglip2": {"text": 6, "vision": 6},
    "blip_caption": {"text": 6, "vision": 6},
    "blip_vqa": {"text": 6, "text_encoder": 6, "vision": 6},
    "blip2_opt": {"text": 6, "vision": 6, "qformer": 8},
    "blip2_t5": {"text": 6, "text_encoder": 7, "vision": 6, "qformer": 8},
}
OBJECTIVES = {
    "clip": "contrastive",
    "metaclip_2": "contrastive",
    "chinese_clip": "contrastive",
    "siglip": "contrastive",
    "siglip2": "contrastive",
    "blip_caption": "caption",
    "blip_vqa": "vqa",
    "blip2_opt": "caption",
    "blip2_t5": "caption",
}
# Positions that are pinned beside the last layer of every tower, and the unread ones.
PINNED = {
    "qwen3_vl": {"text": [0, 1, 7], "vision": [1, 3, 5]},
    "qwen3_vl_moe": {"text": [0, 1, 7], "vision": [1, 3, 5]},
    "llava": {"text": [7], "vision": [4]},
    "llava_next": {"text": [7], "vision": [4]},
}


@pytest.fixture(scope="module", params=list(ALL))
def opened(request: pytest.FixtureRequest) -> tuple[str, VLM]:
    return request.param, open_model(ALL[request.param]())


def test_towers_have_their_names_and_depths(opened: tuple[str, VLM]) -> None:
    name, vlm = opened
    assert {tower.name: tower.num_layers for tower in vlm.towers.values()} == TOWERS[name]
    assert list(vlm.towers) == list(TOWERS[name])
    assert vlm.family.objective == OBJECTIVES.get(name, "chat")
    for tower in vlm.towers.values():
        assert vlm.model.get_submodule(tower.path) is tower.layers
        assert tower.original == tuple(range(tower.num_layers))
        assert all(field.value == tower.num_layers for field in tower.depth_fields)
        assert any(":" not in field.path for field in tower.depth_fields)


def test_pinned_layers(opened: tuple[str, VLM]) -> None:
    name, vlm = opened
    for tower in vlm.towers.values():
        expected = PINNED.get(name, {}).get(tower.name, [tower.num_layers - 1])
        assert list(tower.pinned) == expected
        assert set(tower.bound) <= set(tower.pinned)
    if name == "qwen3_vl":
        assert list(vlm.towers["text"].bound) == [0, 1]
        assert list(vlm.towers["vision"].bound) == [1, 3]
        assert "DeepStack" in vlm.towers["text"].pinned[0]
        assert LAST in vlm.towers["text"].pinned[7]
    if name == "llava":
        assert vlm.towers["vision"].unread == (5,)
    if name == "llava_onevision":
        assert "vision_feature_layer" in vlm.towers["vision"].pinned[5]
    if name.startswith("blip2"):
        assert vlm.towers["qformer"].cross_attention_layers == (0, 2, 4, 6)


def test_shape_counts_every_parameter_once(opened: tuple[str, VLM]) -> None:
    name, vlm = opened
    shape = vlm.shape()
    assert shape.total_parameters == sum(p.numel() for p in vlm.model.parameters())
    assert shape.bytes_per_parameter == 4
    for tower in vlm.towers.values():
        sizes = shape.towers[tower.name]
        assert sizes.hidden_size == 32
        assert sizes.head_dim * sizes.num_heads == 32
        assert sizes.num_layers == tower.num_layers
    assert shape.towers["vision"].causal is False
    assert shape.towers["text"].causal is (not name.startswith(("siglip", "chinese_clip")))
    if name == "qwen3_vl":
        assert shape.towers["text"].num_kv_heads == 2
    assert shape.towers["text"].cross_attention is (
        name in ("blip_caption", "blip_vqa", "blip2_t5")
    )


def test_image_token(opened: tuple[str, VLM]) -> None:
    name, vlm = opened
    expected = IMAGE if vlm.family.objective == "chat" or name.startswith("blip2") else None
    assert vlm.family.image_token_id(vlm.model) == expected


def test_layers_run_through_the_lists_in_order(opened: tuple[str, VLM]) -> None:
    name, vlm = opened
    self_check(vlm.model, vlm.family.stacks(vlm.model), tiny_inputs(name, vlm.model))


def test_fingerprint_follows_weights_and_config() -> None:
    vlm, twin = open_model(TINY["clip"](seed=1)), open_model(TINY["clip"](seed=1))
    before = vlm.fingerprint
    assert twin.fingerprint == before
    weight = vlm.towers["vision"].layers[2].mlp.fc1.weight
    with torch.no_grad():
        weight[7, 11] += 1e-3
    assert vlm.fingerprint != before
    with torch.no_grad():
        weight.copy_(twin.towers["vision"].layers[2].mlp.fc1.weight)
    assert vlm.fingerprint == before
    with torch.no_grad():
        # The same values in another order: the sum alone would not see it.
        weight.copy_(weight.flip(0))
    assert vlm.fingerprint != before
    twin.model.config.text_config.layer_norm_eps = 0.5
    assert twin.fingerprint != before
    assert open_model(TINY["clip"](seed=2)).fingerprint != before


def test_position_of_an_original_layer() -> None:
    tower = open_model(TINY["clip"]()).towers["text"]
    assert tower.position(3) == 3
    with pytest.raises(ShapeError, match=r"no layer 9.*\[0, 1, 2, 3, 4, 5\]"):
        tower.position(9)


def test_a_class_without_the_needed_parts_is_refused() -> None:
    import transformers

    config = TINY["blip_caption"]().config
    with pytest.raises(FamilyError, match=r"BlipModel.*BlipForConditionalGeneration"):
        family_of(transformers.BlipModel(config))


def test_depth_in_config_must_match() -> None:
    model = TINY["siglip"]()
    model.config.text_config.num_hidden_layers = 5
    with pytest.raises(FamilyError, match="has 6 layers, but its config states"):
        open_model(model)


def test_shared_depth_is_refused_in_words() -> None:
    family = family_of(TINY["blip_vqa"]())
    family.check_depths({"text": 4, "text_encoder": 4, "vision": 2})
    with pytest.raises(PlanError, match=r"text 4, text_encoder 6.*same number"):
        family.check_depths({"text": 4, "text_encoder": 6, "vision": 2})


def test_families_cover_each_class_once() -> None:
    classes = [name for family in FAMILIES for name in family.architectures]
    assert len(classes) == len(set(classes))
