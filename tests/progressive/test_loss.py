from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_processors import with_processor

import interlace as il
from interlace.data.collate import Collator
from interlace.errors import ConfigError, DataError, PlanError
from interlace.heal.model import HealModel
from interlace.progressive.loss import CompensatedLoss, TaskLoss
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.names import of_use

TASKS = {"clip": ("retrieval",), "blip": ("caption",), "qwen3-vl": ("vqa", "caption")}


@pytest.mark.parametrize("name", TASKS)
def test_skipping_layers_gives_the_loss_of_the_pruned_model(name: str) -> None:
    vlm = il.open_model(f"bundled:{name}", dtype="float32", device="cpu")
    data = il.samples("scenes", count=6, tasks=TASKS[name], processor=vlm.processor)
    before = {key: value.detach().clone() for key, value in vlm.model.named_parameters()}
    loss = TaskLoss(vlm, data, batch_size=4)
    whole = loss()
    for tower, drop in (("text", (4, 7)), ("vision", (2,))):
        plan = Plan(towers={tower: TowerPlan(num_layers=vlm.towers[tower].num_layers, drop=drop)})
        pruned = TaskLoss(prune(vlm, plan), data, batch_size=4)()
        assert loss(tower, drop) == pytest.approx(pruned, rel=1e-5)
        assert pruned != pytest.approx(whole, rel=1e-3)
    assert loss() == whole
    for key, value in vlm.model.named_parameters():
        assert torch.equal(value, before[key])
    assert not any(layer._forward_hooks for layer in vlm.towers["text"].layers)


def test_the_loss_is_the_cross_entropy_of_the_answers() -> None:
    vlm = il.open_model("bundled:qwen3-vl", dtype="float32", device="cpu")
    data = il.samples("scenes", count=5, tasks=("vqa",), processor=vlm.processor)
    batch: dict[str, Any] = Collator.for_model(vlm)(data)
    with torch.no_grad():
        own = float(vlm.model(**batch).loss)
    # over all tokens of all batches, however they are cut
    assert TaskLoss(vlm, data, batch_size=2)() == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_the_compensated_loss_is_lower_where_the_cut_is_repaired(name: str) -> None:
    vlm = il.open_model(f"bundled:{name}", dtype="float32", device="cpu")
    data = il.samples("scenes", count=32, tasks=TASKS[name], processor=vlm.processor)
    before = vlm.fingerprint
    bare, folded = (
        il.layer_loss(vlm, data, batch_size=16, bridges=bridges) for bridges in ("none", "fold")
    )
    assert bare("text", ()) == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < folded("text", (7, 4)) < bare("text", (7, 4))
    assert folded("text", (4, 7)) == folded("text", (7, 4))
    assert vlm.fingerprint == before


def test_the_compensated_loss_of_a_plan_knows_widths_too() -> None:
    vlm = il.open_model("bundled:clip", dtype="float32", device="cpu")
    data = il.samples("scenes", count=64, tasks=("retrieval",), processor=vlm.processor)
    loss = CompensatedLoss(vlm, data, 8, "fold")
    layers = TowerPlan(num_layers=12, drop=(4, 7))
    narrow = replace(layers, cut={"mlp": {5: tuple(range(128))}})
    alone = Plan(towers={"text": replace(narrow, drop=())}, standard=False)
    assert CompensatedLoss(vlm, data, 8, "none").of_plan(alone) > 2 * loss.of_plan(alone)
    assert loss.of_plan(Plan(towers={"text": layers}, standard=False)) == loss("text", (7, 4))
    both = Plan(towers={"text": narrow}, standard=False)
    assert loss.of_plan(both) != loss("text", (4, 7))


def test_students_that_were_judged_leave_no_memory_taken() -> None:
    vlm = il.open_model("bundled:qwen3-vl", dtype="float32", device="cpu")
    data = il.samples("scenes", count=16, tasks=TASKS["qwen3-vl"], processor=vlm.processor)
    loss = CompensatedLoss(vlm, data, 8, "fold")

    def models() -> int:
        return sum(type(each) is type(vlm.model) for each in gc.get_objects())

    gc.collect()
    before = models()
    gc.disable()
    try:
        layers = TowerPlan(16, drop=(4,), cut={"mlp": {5: tuple(range(32))}})
        loss.of_plan(Plan(towers={"text": layers}, standard=False))
        # a GPU that runs out of memory does not wait for Python to look for circles
        assert models() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["qwen3-vl", "clip"])
def test_what_the_whole_model_gives_is_asked_for_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = il.open_model(f"bundled:{name}", dtype="float32", device="cpu")
    data = il.samples("scenes", count=16, tasks=TASKS[name], processor=vlm.processor)
    loss = CompensatedLoss(vlm, data, 4, "fold")
    first = loss("text", (4,))
    said: list[Any] = []
    of_teacher = HealModel.of_teacher
    monkeypatch.setattr(HealModel, "of_teacher", lambda *a: said.append(a) or of_teacher(*a))
    ran: list[Any] = []
    hook = vlm.towers["vision"].layers[0].register_forward_pre_hook(lambda *a: ran.append(a))
    second = loss("text", (9, 3))
    hook.remove()
    assert not said
    if name == "qwen3-vl":
        # its text tower runs behind the vision tower, which is the same in all students
        assert not ran
    fresh = CompensatedLoss(vlm, data, 4, "fold")
    assert fresh("text", (9, 3)) == pytest.approx(second, rel=1e-6)
    assert fresh("text", (4,)) == pytest.approx(first, rel=1e-6)
    # a student whose vision tower is another one is not given what the whole model's gives
    assert fresh("vision", (2,)) == pytest.approx(
        CompensatedLoss(vlm, data, 4, "fold")("vision", (2,)), rel=1e-6
    )


def test_the_compensated_loss_of_parts_is_that_of_their_plan() -> None:
    vlm = il.open_model("bundled:qwen3-vl", dtype="float32", device="cpu")
    data = il.samples("scenes", count=16, tasks=("vqa",), processor=vlm.processor)
    loss = il.layer_loss(vlm, data, "compensated_parts")
    parts = {"mlp": (9, 6), "self_attn": (12,)}
    cut = TowerPlan(16, drop=(4,), parts={"mlp": (6, 9), "self_attn": (12,)})
    plan = Plan(towers={"text": cut}, standard=False)
    assert isinstance(loss, CompensatedLoss)
    assert loss("text", (4,), parts) == loss.of_plan(plan)
    assert loss("text", (4,), parts) != loss("text", (4,))
    # the layers that lost a part are folded as well
    bare = il.layer_loss(vlm, data, "compensated_parts", bridges="none")
    assert 0.0 < loss("text", (), {"mlp": (9, 6)}) < bare("text", (), {"mlp": (9, 6)})


def test_too_few_samples_to_repair_and_judge_are_refused_at_once() -> None:
    vlm = il.open_model("bundled:clip", dtype="float32", device="cpu")
    data = il.samples("scenes", count=6, tasks=("retrieval",), processor=vlm.processor)
    with pytest.raises(DataError, match=r"6 samples are too few.*at least 7"):
        il.layer_loss(vlm, data, batch_size=2)
    assert il.layer_loss(vlm, data, bridges="none", batch_size=2)("text", (4,)) > 0


def test_losses_that_no_rule_asks_for_are_refused() -> None:
    vlm = il.open_model("bundled:clip", dtype="float32", device="cpu")
    data = il.samples("scenes", count=7, tasks=("retrieval",), processor=vlm.processor)
    with pytest.raises(ConfigError, match="asks for no loss"):
        il.layer_loss(vlm, data, "interlace")
    with pytest.raises(ConfigError, match="Did you mean 'fold'"):
        il.layer_loss(vlm, data, bridges="fodl")
    with pytest.raises(DataError, match="holds no sample"):
        il.layer_loss(vlm, data[:0])
    # a tower that gets no bridge is judged as it is cut
    loss = il.layer_loss(vlm, data, bridges={"text": "fold"})
    assert loss("vision", (2, 3, 4, 5)) > 1e-5


def test_towers_that_must_be_equally_deep_are_not_judged_one_at_a_time() -> None:
    vlm = with_processor("blip_vqa")
    data = il.samples("scenes", count=7, tasks=("vqa",))
    loss = il.layer_loss(vlm, data, batch_size=2)
    with pytest.raises(PlanError, match="must keep 'text' as deep as 'text_encoder'"):
        loss("text", (1,))
    scores = il.score(vlm, data, batch_size=2)
    with pytest.raises(PlanError, match=r"no layer can be taken out after .*'sleb' judges without"):
        il.make_plan(scores, drop_fraction={"text": 0.3}, rule="compensated", loss=loss)
    assert loss("text", ()) == pytest.approx(0.0, abs=1e-5)
    assert il.layer_loss(vlm, data, "sleb", batch_size=2)("text", (1,)) > 0.0


def test_bridges_are_left_out_where_nothing_is_there_to_stand_in_for() -> None:
    dropped, narrowed = TowerPlan(8, drop=(3,)), TowerPlan(8, parts={"mlp": (2,)})
    plan = Plan(towers={"text": dropped, "vision": narrowed, "qformer": TowerPlan(8)})
    assert of_use("scale", plan) == "scale"
    assert of_use("scale", replace(plan, towers={"vision": narrowed})) == "none"
    assert of_use("refit", replace(plan, towers={"vision": narrowed})) == "refit"
    given = {"text": "scale", "vision": "scale", "qformer": "fold", "other": "fold"}
    assert of_use(given, plan) == {"text": "scale"}
    assert of_use({"vision": "lowrank"}, plan) == "none"
