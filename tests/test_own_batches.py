"""Every family on the batches that its own processor and collator make, as users give them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_processors import BUILT, with_processor

import interlace as il
from interlace.data.samples import Sample, Turn, scenes_tasks
from interlace.errors import ConfigError
from interlace.records import Plan, TowerPlan

# NumPy about the grids that GLM's processor hands it
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("name", sorted(BUILT))
def test_scores_losses_bridges_and_healing(name: str) -> None:
    vlm = with_processor(name)
    depth = vlm.towers["text"].num_layers
    data = il.samples("scenes", count=4, tasks=scenes_tasks(vlm.family.objective))
    metrics = ("sensitivity", "relevance", "head_taylor")
    scores = il.score(vlm, data, metrics=metrics, towers=("text",), batch_size=2)["text"]
    for metric in metrics[:2]:
        assert all(map(math.isfinite, scores.metrics[metric]))
    assert any(scores.importance["head_taylor"].values())

    # BLIP's encoder of questions and its decoder of answers have one depth
    equal = [group for group in vlm.family.shared_depth if {*group} <= {*vlm.towers}]
    # nothing can be folded into experts, and text layer 5 has none
    gone = 6 if name == "qwen3_vl_moe" else 3
    cut = TowerPlan(depth, drop=(gone,), tune=(gone + 1,))
    plan = Plan(dict.fromkeys(equal[0] if equal else ("text",), cut))
    loss = il.layer_loss(vlm, data, "sleb", batch_size=2)
    assert loss("text", (3,)) > 0.0
    student = il.prune(vlm, plan, bridges="fold", token_weights="fisher", data=data, batch_size=2)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    report = il.heal(student, teacher=vlm, data=data, max_steps=1, batch_size=2, learning_rate=1e-2)
    assert report.steps == 1
    assert all(map(math.isfinite, report.final.values()))
    after = student.model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def _spoken() -> list[Sample]:
    pairs = (("What?", "red"), ("How many?", "two"))
    return [
        Sample(str(number), "chat", (), (Turn("user", asked), Turn("assistant", said)))
        for number, (asked, said) in enumerate(pairs)
    ]


def test_what_images_are_worth_does_not_hang_on_samples_without_any() -> None:
    vlm = with_processor("qwen3_vl")
    seen = il.samples("scenes", count=2, tasks=("vqa",))
    found = [
        il.score(vlm, data, metrics=("relevance", "sensitivity"), batch_size=size)
        for data, size in ((list(seen), 1), ([*_spoken(), *seen], 1), ([*_spoken(), *seen], 4))
    ]
    for each in found:
        assert each["vision"].group_samples["relevance"] == 2
        for metric in ("relevance", "sensitivity")[: 1 + (each is not found[2])]:
            values, expected = (s["vision"].metrics[metric] for s in (each, found[0]))
            assert values == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found[2]["text"].group_samples["relevance"] == 4


def test_a_batch_without_images_trains_nothing_of_the_vision_tower() -> None:
    vlm = with_processor("qwen3_vl")
    depth = vlm.towers["vision"].num_layers
    student = il.prune(vlm, Plan({"vision": TowerPlan(depth, drop=(2,), tune=(1,))}))
    spoken = _spoken()
    seen = il.samples("scenes", count=2, tasks=("vqa",))
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    for data, changes in ((spoken, False), ([*spoken, *seen], True)):
        report = il.heal(student, teacher=vlm, data=data, batch_size=1, learning_rate=1e-2)
        assert report.steps == len(data)
        after = student.model.state_dict()
        found = any(not torch.equal(value, after[name]) for name, value in before.items())
        assert found is changes


@pytest.mark.parametrize("name", ["blip_caption", "blip_vqa", "qwen3_vl"])
def test_recomputed_activations_give_the_same_weights(name: str) -> None:
    vlm = with_processor(name)
    data = il.samples("scenes", count=2, tasks=scenes_tasks(vlm.family.objective))
    depth = vlm.towers["vision"].num_layers
    plan = Plan({"vision": TowerPlan(depth, drop=(2,), tune=(1,))})
    weights = []
    for recompute in (False, True):
        student = il.prune(vlm, plan)
        settings = {"max_steps": 2, "batch_size": 2, "gradient_checkpointing": recompute}
        il.heal(student, teacher=vlm, data=data, learning_rate=1e-3, **settings)
        weights.append(student.model.state_dict())
    assert all(torch.equal(value, weights[1][each]) for each, value in weights[0].items())


def test_single_pairs_are_no_batch_for_a_contrastive_loss() -> None:
    vlm = with_processor("clip")
    data = il.samples("scenes", count=3, tasks=("retrieval",))
    student = il.prune(vlm, Plan({"text": TowerPlan(vlm.towers["text"].num_layers, (1,), (2,))}))
    for call in (
        lambda: il.score(vlm, data, metrics=("relevance",), batch_size=1),
        lambda: il.score(vlm, data[:1], metrics=("head_taylor",), batch_size=4),
        lambda: il.layer_loss(vlm, data, "sleb", batch_size=1),
        lambda: il.heal(student, data=data, batch_size=1),
    ):
        with pytest.raises(ConfigError, match="tells the samples of a batch apart"):
            call()
    assert il.score(vlm, data, metrics=("similarity", "head_norm"), batch_size=1)["text"]


def test_reasons_of_a_second_plan_name_layers_of_the_first_model() -> None:
    vlm = with_processor("qwen3_vl")
    depth = vlm.towers["text"].num_layers
    data = il.samples("scenes", count=2, tasks=("vqa",))
    student = il.prune(vlm, Plan({"text": TowerPlan(depth, drop=(2,))}))
    plan = il.make_plan(il.score(student, data, towers=("text",)), num_drop=1, protect=())["text"]
    second = il.prune(student, Plan({"text": plan}), allow_pinned=True).plan["text"]
    original = student.towers["text"].original
    (gone,), (tuned,) = second.drop, second.tune
    assert gone == original[plan.drop[0]]
    assert f"takes over from layer {gone}" in second.reasons[tuned]
    start = min(gone, tuned)
    named = "-".join(str(layer) for layer in original if start <= layer)[:5]
    assert f"triplet {named} (" in second.reasons[gone]


def test_float16_is_not_trained_on_a_cpu() -> None:
    whole = with_processor("clip")
    vlm = il.open_model(copy.deepcopy(whole.model).half(), processor=whole.processor)
    depth = vlm.towers["text"].num_layers
    student = il.prune(vlm, Plan({"text": TowerPlan(depth, drop=(1,), tune=(2,))}))
    data = il.samples("scenes", count=2, tasks=("retrieval",))
    with pytest.raises(ConfigError, match="float16 on a CPU"):
        il.heal(student, data=data, batch_size=2)
