"""What refers to layers by number follows a cut: DeepStack, windows, biases and the like."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import tiny
import torch

from interlace.errors import PlanError
from interlace.models import VLM, family_of
from interlace.surgery import prune


def _vlm(model: Any, name: str) -> VLM:
    return VLM(model, family_of(model), name=name)


def _expected(kit: Any, vlm: VLM, inputs: Any, drop: Any, muted: tuple[int, ...] = ()) -> Any:
    """What the dense model gives with layers skipped, and some DeepStack features muted."""
    with ExitStack() as stack:
        stack.enter_context(kit.skipping(vlm, drop))
        for index in muted:
            merger = vlm.model.model.visual.deepstack_merger_list[index]
            hook = merger.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
            stack.callback(hook.remove)
        return kit.outputs(vlm.model, inputs)


@pytest.mark.parametrize(
    ("drop", "indexes", "muted"),
    [
        ({"vision": (0, 2)}, [0, 1], ()),
        ({"vision": (1,)}, [0, 2], ()),
        ({"vision": (3, 4)}, [1, 2], ()),
        ({"text": (0,)}, [3], (0,)),
        ({"text": (1, 2)}, [1], (1,)),
        ({"text": (0, 1)}, [], (0, 1)),
        ({"text": (0, 4), "vision": (0, 5)}, [2], (0,)),
    ],
)
def test_deepstack_features_stay_at_their_own_layers(
    kit: Any, drop: Any, indexes: list[int], muted: tuple[int, ...]
) -> None:
    dense = kit.opened("qwen3_vl")
    student = prune(dense.vlm, kit.plan_of(dense.vlm, drop), allow_pinned=True)
    assert student.model.config.vision_config.deepstack_visual_indexes == indexes
    expected = _expected(kit, dense.vlm, dense.inputs, drop, muted)
    assert kit.bit_equal(kit.outputs(student.model, dense.inputs), expected)
    assert len(student.record.notes) == sum(
        layer in dense.vlm.towers[name].pinned for name, layers in drop.items() for layer in layers
    )


@pytest.mark.parametrize(
    ("drop", "allowed", "words"),
    [
        ({"text": (1,)}, False, "pinned layers of the text tower .layer 1: DeepStack"),
        ({"vision": (3,)}, False, "pinned layers of the vision tower .layer 3: DeepStack"),
        ({"vision": (2, 3)}, True, "two DeepStack features"),
        ({"vision": (0, 1)}, True, "before the first layer"),
    ],
)
def test_deepstack_cuts_that_cannot_be_stated_are_refused(
    kit: Any, drop: Any, allowed: bool, words: str
) -> None:
    dense = kit.opened("qwen3_vl")
    with pytest.raises(PlanError, match=words):
        prune(dense.vlm, kit.plan_of(dense.vlm, drop), allow_pinned=allowed)
    assert dense.vlm.fingerprint == dense.fingerprint


@pytest.mark.parametrize(
    ("before", "drop", "after"),
    [
        (-2, (5,), -1),
        (-2, (0, 3), -2),
        (-2, (4,), -2),
        (-2, (4, 5), -1),
        (-1, (2,), -1),
        (3, (0, 1), 1),
        (3, (0, 1, 2), -4),
        (4, (1, 3), 2),
        ([2, -2], (1,), [1, -2]),
        ([-2, 3], (0,), [-2, 2]),
    ],
)
def test_vision_feature_layer_reads_what_it_read(
    kit: Any, before: Any, drop: tuple[int, ...], after: Any
) -> None:
    model = tiny.llava(feature_layer=before)
    vlm = _vlm(model, "llava")
    inputs = tiny.tiny_inputs("llava", model)
    whole = kit.outputs(model, inputs)
    student = prune(vlm, kit.plan_of(vlm, {"vision": drop}), allow_pinned=True)
    assert student.model.config.vision_feature_layer == after
    found = kit.outputs(student.model, inputs)
    if drop == (5,):
        # nothing read it
        assert kit.bit_equal(found, whole)
    with kit.skipping(vlm, {"vision": drop}):
        assert kit.bit_equal(found, kit.outputs(model, inputs))


def test_windows_stay_with_their_layers(kit: Any) -> None:
    model = tiny.qwen2_5_vl(window=3)
    vlm = _vlm(model, "qwen2_5_vl")
    inputs = tiny.tiny_inputs("qwen2_5_vl", model)
    drop = {"text": (2, 5), "vision": (1, 2)}
    student = prune(vlm, kit.plan_of(vlm, drop))
    config = student.model.config
    assert config.text_config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert config.text_config.max_window_layers == 3
    assert config.vision_config.fullatt_block_indexes == [3]
    expected = _expected(kit, vlm, inputs, drop)
    assert kit.bit_equal(kit.outputs(student.model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "options", "drop"),
    [
        ("qwen2_vl", {"window": 4}, {"text": (1, 5)}),
        ("llava_onevision", {}, {"vision": (0, 5)}),
        ("clip", {}, {"vision": (0, 5)}),
    ],
)
def test_cuts_that_change_no_index_change_depths_alone(
    kit: Any, name: str, options: Any, drop: Any
) -> None:
    """Windows of the text tower, and towers that lose their last layer, which protection keeps."""
    model = tiny.TINY[name](**options)
    vlm = _vlm(model, name)
    inputs = tiny.tiny_inputs(name, model)
    student = prune(vlm, kit.plan_of(vlm, drop))
    assert all(
        key.endswith(("num_hidden_layers", "layer_types", "max_window_layers"))
        for key in student.record.config_changes
    )
    expected = _expected(kit, vlm, inputs, drop)
    assert kit.bit_equal(kit.outputs(student.model, inputs), expected)


def test_position_bias_of_t5_moves_to_the_first_kept_block(kit: Any) -> None:
    dense = kit.opened("blip2_t5")
    drop = {"text": (0, 1), "text_encoder": (0, 3, 4)}
    student = prune(dense.vlm, kit.plan_of(dense.vlm, drop))
    text_config = student.model.config.text_config
    assert (text_config.num_layers, text_config.num_decoder_layers) == (4, 4)
    for tower in drop:
        moved, held = (vlm.towers[tower].layers[0].layer[0] for vlm in (student, dense.vlm))
        assert moved.SelfAttention.relative_attention_bias.weight.data_ptr() == (
            held.SelfAttention.relative_attention_bias.weight.data_ptr()
        )
    expected = _expected(kit, dense.vlm, dense.inputs, drop)
    assert kit.bit_equal(kit.outputs(student.model, dense.inputs), expected)


@pytest.mark.parametrize(
    ("layers", "drop", "stated"),
    [
        ((6, 6), {"text_encoder": (1, 4)}, 6),
        ((8, 5), {"text": (3,)}, 7),
        ((8, 5), {"vision": (2,)}, 8),
        ((6, 7), {"text_encoder": (1,)}, None),
    ],
)
def test_a_t5_decoder_deeper_than_its_encoder_generates_with_a_cache(
    layers: tuple[int, int], drop: Any, stated: int | None, kit: Any, tmp_path: Any
) -> None:
    model = tiny.blip2_t5(text=layers[0], text_encoder=layers[1])
    vlm = _vlm(model, "blip2_t5")
    student = prune(vlm, kit.plan_of(vlm, drop))
    assert getattr(student.model.config.text_config, "decoder_layers", None) == stated
    student.model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    inputs = tiny.generation_inputs("blip2_t5", model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        plain = student.model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(student.model.generate(**inputs, **settings), plain)
        assert torch.equal(reloaded.generate(**inputs, **settings), plain)
    # the key that was added counts the decoder too when it is cut again
    again = prune(_vlm(reloaded, "blip2_t5"), kit.plan_of(student, {"text": (0,)}))
    text_config = again.model.config.text_config
    assert text_config.num_decoder_layers == student.towers["text"].num_layers - 1
    assert getattr(text_config, "decoder_layers", text_config.num_decoder_layers) == (
        text_config.num_decoder_layers
    )


def test_cross_attention_of_a_qformer_stays_periodic(kit: Any) -> None:
    dense = kit.opened("blip2_opt")
    drop = {"qformer": (1, 3, 5, 7)}
    student = prune(dense.vlm, kit.plan_of(dense.vlm, drop), allow_pinned=True)
    assert student.model.config.qformer_config.cross_attention_frequency == 1
    expected = _expected(kit, dense.vlm, dense.inputs, drop)
    assert kit.bit_equal(kit.outputs(student.model, dense.inputs), expected)
    with pytest.raises(PlanError, match="Q-Former can only state"):
        prune(dense.vlm, kit.plan_of(dense.vlm, {"qformer": (1,)}))


def test_towers_that_share_a_depth_field_must_stay_equally_deep(kit: Any) -> None:
    dense = kit.opened("blip_vqa")
    with pytest.raises(PlanError, match="one config field"):
        prune(dense.vlm, kit.plan_of(dense.vlm, {"text": (1,)}))
    drop = {"text": (1, 2), "text_encoder": (0, 3)}
    student = prune(dense.vlm, kit.plan_of(dense.vlm, drop))
    expected = _expected(kit, dense.vlm, dense.inputs, drop)
    assert kit.bit_equal(kit.outputs(student.model, dense.inputs), expected)


def test_tied_weights_stay_tied_and_early_exit_moves(kit: Any) -> None:
    model = tiny.qwen3_vl(tie=True)
    model.generation_config.assistant_early_exit = 5
    vlm = _vlm(model, "qwen3_vl")
    student = prune(vlm, kit.plan_of(vlm, {"text": (3, 6)}, text=(4,)))
    head, table = student.model.lm_head, student.model.get_input_embeddings()
    assert head.weight is table.weight
    assert head.weight is not model.lm_head.weight
    assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert student.num_parameters() == student.record.parameters_after
    assert student.model.generation_config.assistant_early_exit == 4
    assert model.generation_config.assistant_early_exit == 5


@pytest.mark.parametrize(
    ("name", "drop", "kind"),
    [
        ("qwen3_5", (2, 5), "full_attention"),
        ("gemma3", (3, 7), "full_attention"),
        ("gemma3", (0, 1, 2, 4, 5, 6), "sliding_attention"),
    ],
)
def test_one_layer_of_every_kind_that_is_needed_stays(
    name: str, drop: tuple[int, ...], kind: str, kit: Any
) -> None:
    vlm = kit.opened(name).vlm
    with pytest.raises(PlanError, match=f"no text layer with {kind}"):
        prune(vlm, kit.plan_of(vlm, {"text": drop}), allow_pinned=True)
    student = prune(vlm, kit.plan_of(vlm, {"text": drop[:-1]}), allow_pinned=True)
    assert student.towers["text"].pinned[drop[-1]].endswith(f"with {kind}")


def test_layers_without_experts_stay_those(kit: Any) -> None:
    # with experts in layers 1, 3, 5 and 7
    model = tiny.qwen3_vl_moe(dense=(0,), step=2)
    vlm = _vlm(model, "qwen3_vl_moe")
    inputs, drop = tiny.tiny_inputs("qwen3_vl_moe", model), {"text": (3, 6)}
    student = prune(vlm, kit.plan_of(vlm, drop))
    config = student.model.config.text_config
    assert (config.mlp_only_layers, config.decoder_sparse_step) == ([0, 2, 3], 1)
    assert student.record.config_changes["text_config.decoder_sparse_step"] == [2, 1]
    expected = _expected(kit, vlm, inputs, drop)
    assert kit.bit_equal(kit.outputs(student.model, inputs), expected)
