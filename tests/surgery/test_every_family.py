"""What holds for every family and every tower: each test runs on all of tests/tiny.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GENERATIVE, TINY, generation_inputs

from interlace.records import Plan, TowerPlan
from interlace.surgery import prune


def test_dropping_nothing_is_bit_equal(dense: Any, kit: Any) -> None:
    nothing = dict.fromkeys(dense.vlm.towers, ())
    student = prune(dense.vlm, kit.plan_of(dense.vlm, nothing))
    assert kit.bit_equal(kit.outputs(student.model, dense.inputs), dense.outputs)
    assert student.model.config.to_dict() == dense.vlm.model.config.to_dict()
    assert student.fingerprint == dense.fingerprint
    assert student.record.config_changes == {}
    assert student.record.dropped == {}
    source = dict(dense.vlm.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        assert parameter.requires_grad == source[name].requires_grad


def test_a_quarter_of_every_tower_equals_skipping_those_layers(
    dense: Any, kit: Any, cut: Any
) -> None:
    drop, _, student = cut
    with kit.skipping(dense.vlm, drop):
        expected = kit.outputs(dense.vlm.model, dense.inputs)
    assert not kit.bit_equal(expected, dense.outputs)
    assert kit.bit_equal(kit.outputs(student.model, dense.inputs), expected)


def test_depths_and_layer_numbers_are_right_everywhere(dense: Any, cut: Any) -> None:
    drop, _, student = cut
    for name, tower in student.towers.items():
        whole = dense.vlm.towers[name].num_layers
        kept = tuple(layer for layer in range(whole) if layer not in drop[name])
        assert tower.original == kept == student.record.towers[name]
        assert student.record.dropped[name] == drop[name]
        assert all(field.value == len(kept) for field in tower.depth_fields)
        for position, layer in enumerate(tower.layers):
            for module in layer.modules():
                for key in ("layer_idx", "layer_num"):
                    assert getattr(module, key, position) in (position, None)
        types = getattr(tower.config, "layer_types", None)
        assert types is None or len(types) == len(kept)
    assert student.record.parameters_before == dense.vlm.num_parameters()
    assert student.record.parameters_after == student.num_parameters()
    assert student.record.parameters_after < student.record.parameters_before
    assert student.record.inputs["model"] == dense.fingerprint
    assert student.record.plan_fingerprint == student.plan.fingerprint


def test_frozen_weights_are_shared_and_only_tuned_layers_train(dense: Any, cut: Any) -> None:
    _, tune, student = cut
    shared = {p.data_ptr() for p in dense.vlm.model.parameters()}
    tuned = {
        f"{tower.path}.{tower.position(layer)}."
        for name, tower in student.towers.items()
        for layer in tune[name]
    }
    assert tuned
    flags = {p: p.requires_grad for p in dense.vlm.model.parameters()}
    for name, parameter in student.model.named_parameters():
        own = name.startswith(tuple(tuned))
        assert parameter.requires_grad == own, name
        assert (parameter.data_ptr() in shared) == (not own), name
    assert all(flags.values())
    assert not any(p.is_meta for p in student.model.parameters())
    assert not any(b.is_meta for b in student.model.buffers())
    theirs = {b.data_ptr() for b in dense.vlm.model.buffers()}
    assert not theirs & {b.data_ptr() for b in student.model.buffers()}


def test_training_the_student_leaves_the_teacher_bit_equal(dense: Any, kit: Any, cut: Any) -> None:
    _, _, student = cut
    trained = [p for p in student.model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    before = kit.outputs(student.model, dense.inputs)
    sum(t.float().sum() for t in _floats(student.model(**dense.inputs))).backward()
    try:
        assert all((p.grad is not None) <= p.requires_grad for p in student.model.parameters())
        assert any(p.grad is not None for p in trained)
        torch.optim.SGD(trained, lr=0.1).step()
        assert not kit.bit_equal(kit.outputs(student.model, dense.inputs), before)
        assert kit.bit_equal(kit.outputs(dense.vlm.model, dense.inputs), dense.outputs)
        assert all(p.grad is None for p in dense.vlm.model.parameters())
        assert dense.vlm.fingerprint == dense.fingerprint
    finally:
        # the student is shared with the other tests
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _floats(output: Any) -> list[torch.Tensor]:
    for key in ("logits", "logits_per_image", "loss"):
        if output.get(key) is not None:
            return [output[key]]
    raise AssertionError(f"no scalar to train on in {list(output)}")


def test_pruning_again_composes_the_original_numbers(dense: Any, kit: Any, cut: Any) -> None:
    drop, _, student = cut
    # two layers at once where a Q-Former needs it; the second cut names layers of the first model
    second = {}
    for name, tower in student.towers.items():
        free = [layer for layer in tower.original if layer not in tower.pinned]
        second[name] = (4, 5) if tower.cross_attention_layers is not None else (free[-1],)
    plan = Plan(
        {
            name: TowerPlan(
                dense.vlm.towers[name].num_layers,
                drop=layers,
                tune=(student.towers[name].original[0],),
            )
            for name, layers in second.items()
        }
    )
    again = prune(student, plan)
    both = {name: tuple(sorted((*drop[name], *layers))) for name, layers in second.items()}
    with kit.skipping(dense.vlm, both):
        expected = kit.outputs(dense.vlm.model, dense.inputs)
    assert kit.bit_equal(kit.outputs(again.model, dense.inputs), expected)
    assert again.record.dropped == both
    assert again.record.parameters_before == dense.vlm.num_parameters()
    for key, (before, after) in again.record.config_changes.items():
        assert before == _entry(dense.vlm.model.config, key), key
        assert after == _entry(again.model.config, key), key


def _entry(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return list(config) if isinstance(config, tuple) else config


@pytest.mark.parametrize("name", [name for name in GENERATIVE if name in TINY])
def test_generation_with_a_cache_equals_generation_without(name: str, kit: Any) -> None:
    dense = kit.opened(name)
    _, _, student = kit.quartered(name)
    inputs = generation_inputs(name, dense.vlm.model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        cached = student.model.generate(**inputs, **settings, use_cache=True)
        plain = student.model.generate(**inputs, **settings, use_cache=False)
        whole = dense.vlm.model.generate(**inputs, **settings, use_cache=True)
    assert torch.equal(cached, plain)
    assert cached.shape == whole.shape
    assert cached.shape[0] == 2
