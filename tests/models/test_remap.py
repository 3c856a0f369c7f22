"""Index maps after a cut: the student computes what the whole model does with layers skipped.

A skipped layer still runs in the whole model, but hands its input on. Equality is to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import TINY, tiny_inputs
from torch import nn

from interlace.errors import PlanError
from interlace.models import VLM, open_model


def cut(
    vlm: VLM, tower_name: str, drop: tuple[int, ...], allow_pinned: bool = False
) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """Take layers out of a copy and let the family bring its maps in line."""
    model = copy.deepcopy(vlm.model)
    stack = vlm.family.stack(model, tower_name)
    lists = vlm.family.per_layer_lists(model, tower_name)
    layers = list(stack.layers)
    kept = tuple(i for i in range(len(layers)) if i not in drop)
    owner, _, leaf = stack.path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.ModuleList(layers[i] for i in kept))
    for entry in lists:
        values = getattr(entry.config, entry.key)
        setattr(entry.config, entry.key, [values[i] for i in kept])
    for site in stack.sites:
        setattr(site.config, site.key, len(kept))
    for position, i in enumerate(kept):
        for module in layers[i].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position
    changes = vlm.family.remap(
        model, model.config, tower_name, kept, layers=layers, allow_pinned=allow_pinned
    )
    return model, changes


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    for key in ("logits", "logits_per_image", "loss"):
        if result.get(key) is not None:
            return result[key]
    raise AssertionError(list(result))


def skipping(vlm: VLM, tower_name: str, drop: tuple[int, ...], inputs: Any) -> torch.Tensor:
    """The whole model's output with layers that hand their input on."""

    def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *result[1:]) if isinstance(result, tuple) else given

    layers = vlm.towers[tower_name].layers
    # Before the hooks by which transformers records hidden states.
    handles = [layers[i].register_forward_hook(hook, with_kwargs=True, prepend=True) for i in drop]
    try:
        return output(vlm.model, inputs)
    finally:
        for handle in handles:
            handle.remove()


CASES = [
    ("qwen3_vl", {}, "text", (3, 5), {}),
    ("qwen3_vl", {}, "vision", (0, 4), {"vision_config.deepstack_visual_indexes": [0, 2]}),
    ("qwen3_vl", {}, "vision", (1,), {"vision_config.deepstack_visual_indexes": [0, 2]}),
    ("qwen2_vl", {"window": 4}, "text", (1, 5), {}),
    ("qwen2_vl", {}, "vision", (2, 3), {}),
    ("qwen2_5_vl", {}, "vision", (0, 3), {"vision_config.fullatt_block_indexes": [1, 3]}),
    ("qwen2_5_vl", {}, "vision", (2,), None),
    ("llava", {}, "vision", (1,), {}),
    ("llava", {}, "vision", (4,), {}),
    ("llava", {}, "vision", (5,), {"vision_feature_layer": -1}),
    ("llava", {"feature_layer": 4}, "vision", (1, 3), {"vision_feature_layer": 2}),
    ("llava", {"feature_layer": 3}, "vision", (0, 1, 2), {"vision_feature_layer": -4}),
    ("llava", {"feature_layer": [-2, 3]}, "vision", (0,), {"vision_feature_layer": [-2, 2]}),
    ("llava_next", {}, "vision", (2,), {}),
    ("llava_onevision", {}, "vision", (0, 5), {}),
    ("clip", {}, "vision", (0, 5), {}),
    ("siglip2", {}, "text", (2,), {}),
    ("blip_caption", {}, "text", (1, 4), {}),
    ("blip2_opt", {}, "qformer", (2, 3), {}),
    ("blip2_opt", {}, "qformer", (1, 3, 5, 7), {"qformer_config.cross_attention_frequency": 1}),
    ("blip2_t5", {}, "text", (0, 3), {}),
    ("blip2_t5", {}, "text_encoder", (0,), {}),
    ("blip2_t5", {}, "text_encoder", (0, 1), {"text_config.decoder_layers": 6}),
]


@pytest.mark.parametrize(
    ("name", "options", "tower", "drop", "expected"), CASES, ids=lambda value: str(value)
)
def test_student_equals_skipping(
    name: str, options: Any, tower: str, drop: tuple[int, ...], expected: Any
) -> None:
    vlm = open_model(TINY[name](**options))
    inputs = tiny_inputs(name, vlm.model)
    whole = output(vlm.model, inputs)
    model, changes = cut(vlm, tower, drop, allow_pinned=True)
    if expected is not None:
        assert {key: after for key, (_, after) in changes.items()} == expected
    found = output(model, inputs)
    if expected is not None:
        assert torch.equal(found, skipping(vlm, tower, drop, inputs))
    unread = set(drop) <= set(vlm.towers[tower].unread)
    assert torch.equal(found, whole) is unread
    # The model that was cut from is as it was.
    assert torch.equal(output(vlm.model, inputs), whole)


def test_a_dropped_full_attention_layer_leaves_the_list() -> None:
    model, changes = cut(open_model(TINY["qwen2_5_vl"]()), "vision", (2,))
    assert changes == {"vision_config.fullatt_block_indexes": ([2, 5], [4])}
    assert list(model.model.visual.fullatt_block_indexes) == [4]


def test_deepstack_feature_goes_with_its_text_layer() -> None:
    vlm = open_model(TINY["qwen3_vl"]())
    inputs = tiny_inputs("qwen3_vl", vlm.model)
    with pytest.raises(PlanError, match=r"layer 0: the feature of vision layer 1"):
        cut(vlm, "text", (0, 4))
    model, changes = cut(vlm, "text", (0, 4), allow_pinned=True)
    assert changes == {"vision_config.deepstack_visual_indexes": ([1, 3], [3])}
    assert len(model.model.visual.deepstack_merger_list) == 1
    found = output(model, inputs)
    # The feature of vision layer 3 still stands after text layer 1, that of vision layer 1 is gone.
    first = vlm.model.model.visual.deepstack_merger_list[0]
    handle = first.register_forward_hook(lambda module, args, result: torch.zeros_like(result))
    try:
        assert torch.equal(found, skipping(vlm, "text", (0, 4), inputs))
    finally:
        handle.remove()


def test_deepstack_taps_must_stay_apart() -> None:
    vlm = open_model(TINY["qwen3_vl"]())
    with pytest.raises(PlanError, match="other parts refer to"):
        cut(vlm, "vision", (3,))
    with pytest.raises(PlanError, match="after the same kept vision layer"):
        cut(vlm, "vision", (2, 3), allow_pinned=True)
    with pytest.raises(PlanError, match="before the first layer"):
        cut(vlm, "vision", (0, 1), allow_pinned=True)


def test_qformer_pattern_that_no_frequency_gives() -> None:
    vlm = open_model(TINY["blip2_opt"]())
    with pytest.raises(PlanError, match="cross cross self cross"):
        cut(vlm, "qformer", (1,))


def test_t5_position_bias_is_shared_not_copied() -> None:
    vlm = open_model(TINY["blip2_t5"]())
    family = vlm.family
    model = copy.deepcopy(vlm.model)
    stack = family.stack(model, "text_encoder")
    layers = list(stack.layers)
    model.language_model.encoder.block = nn.ModuleList(layers[1:])
    for site in stack.sites:
        setattr(site.config, site.key, len(layers) - 1)
    kept = tuple(range(1, len(layers)))
    family.remap(model, model.config, "text_encoder", kept, layers=layers)
    moved = model.language_model.encoder.block[0].layer[0].SelfAttention
    held = layers[0].layer[0].SelfAttention
    assert moved.has_relative_attention_bias
    assert moved.relative_attention_bias.weight is held.relative_attention_bias.weight
