"""Names, data and defaults: what is asked for is done, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import tiny_inputs

from interlace.errors import ConfigError, DataError, InterlaceError
from interlace.models import VLM, family_of, open_model
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.calibration import Calibration

PLAN = Plan({"text": TowerPlan(5, drop=(2,))})


@pytest.fixture(scope="module")
def vlm() -> VLM:
    model = tiny.clip(text=5, vision=3)
    return VLM(model, family_of(model), name="clip")


@pytest.fixture(scope="module")
def data(vlm: VLM) -> Any:
    return [tiny_inputs("clip", vlm.model, batch=4, seed=seed) for seed in range(2)]


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"bridges": "fodl"}, ConfigError, "Did you mean 'fold'"),
        ({"bridges": 3}, ConfigError, "bridges is 3"),
        ({"bridges": {"txt": "fold"}}, ConfigError, "Did you mean 'text'"),
        ({"bridges": {"text": "scal"}}, ConfigError, "Did you mean 'scale'"),
        ({"bridges": {"vision": "fold"}}, ConfigError, "loses nothing by this plan"),
        ({"bridges": {"vision": "scale"}}, ConfigError, "loses no layer by this plan"),
        ({"bridges": "fold"}, ConfigError, "opened without a processor"),
        ({"bridges": "fold", "data": []}, DataError, "holds no sample"),
        ({"bridges": "fold", "data": "scenes"}, DataError, "is a str; give samples"),
        ({"bridges": "fold", "data": [3]}, DataError, "holds a int"),
        ({"bridges": "fold", "data": "DATA", "batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"bridges": "fold", "data": "SHORT"}, DataError, "3 samples .* at least 4"),
        ({"bridges": "fold", "data": "NAN"}, DataError, "NaN or infinite activations"),
        ({"bridges": "fold", "data": "ODD"}, DataError, r"batch 1 .*\(with input_id\)"),
        ({"bridges": "lowrank", "narrow": True}, ConfigError, "this plan removes none"),
        ({"data": "DATA"}, ConfigError, "bridges='none' asks for none"),
        ({"bridges": "fold", "rank": 4}, ConfigError, "rank is 4.*only 'lowrank' has a rank"),
        ({"bridges": "lowrank", "rank": 0}, ConfigError, "rank is 0"),
        ({"bridges": {"text": "none"}, "data": "DATA"}, ConfigError, "asks for none"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words_and_changes_nothing(
    vlm: VLM, data: Any, settings: Any, kind: type[InterlaceError], words: str
) -> None:
    broken = [{**each, "pixel_values": each["pixel_values"] * torch.nan} for each in data]
    made = {"DATA": data, "SHORT": [tiny_inputs("clip", vlm.model, batch=3)], "NAN": broken}
    made["ODD"] = [data[0], {"input_id": data[0]["input_ids"]}]
    given = dict(settings)
    plan = PLAN
    if given.pop("narrow", False):
        plan = Plan({"text": TowerPlan(5, cut={"mlp": {2: (0, 1)}})}, standard=False)
    if given.get("data") == "NAN":
        plan = Plan({"vision": TowerPlan(3, drop=(1,))})
    if isinstance(given.get("data"), str):
        given["data"] = made.get(given["data"], given["data"])
    before = vlm.fingerprint
    with pytest.raises(kind, match=words):
        prune(vlm, plan, **given)
    assert vlm.fingerprint == before
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in vlm.towers["text"].layers]
    assert not any(found for pair in hooks for found in pair)


def test_data_without_images_cannot_bridge_a_vision_tower() -> None:
    model = tiny.llava(text=3, vision=5)
    llava = VLM(model, family_of(model), name="llava")
    texts = [{"input_ids": torch.randint(5, 100, (4, 6))}]
    with pytest.raises(DataError, match=r"0 images .* tower 'vision'"):
        prune(llava, Plan({"vision": TowerPlan(5, drop=(2,))}), bridges="fold", data=texts)


def test_text_and_images_have_equal_mass_and_every_fourth_sample_is_held_out() -> None:
    model = tiny.qwen3_vl(text=4, vision=4)
    qwen = VLM(model, family_of(model), name="qwen3_vl")
    batches = [tiny_inputs("qwen3_vl", model, batch=size, seed=size) for size in (3, 5)]
    calibration = Calibration(qwen, batches, 8)
    with torch.no_grad():
        surveyed = calibration.survey(["text", "vision"])
    assert list(surveyed) == ["vision", "text"]
    mass = {"image": 0.0, "text": 0.0, "padding": 0.0}
    rows = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        weight, held = surveyed["text"].of(batch, torch.zeros(*ids.shape, 1), 0)
        weight, held = weight.view_as(ids), held.view_as(ids)
        mass["image"] += float(weight[(ids == tiny.IMAGE) & mask].sum())
        mass["text"] += float(weight[(ids != tiny.IMAGE) & mask].sum())
        mass["padding"] += float(weight[~mask].sum())
        assert bool((held == held[:, :1]).all())
        rows += held[:, 0].tolist()
    assert mass == pytest.approx({"image": 0.5, "text": 0.5, "padding": 0.0})
    assert rows == [False, False, False, True] * 2


def test_without_bridges_nothing_is_run_and_everything_is_shared(vlm: VLM) -> None:
    runs = []
    hook = vlm.model.register_forward_pre_hook(lambda *_: runs.append(1))
    students = [prune(vlm, PLAN), prune(vlm, PLAN, bridges="none"), prune(vlm, PLAN, bridges={})]
    hook.remove()
    assert not runs
    shared = {parameter.data_ptr() for parameter in vlm.model.parameters()}
    for student in students:
        assert student.record == students[0].record
        assert student.record.bridges == ()
        assert {p.data_ptr() for p in student.model.parameters()} <= shared


def test_towers_get_the_bridge_they_are_named_with(vlm: VLM, data: Any) -> None:
    plan = Plan({"text": TowerPlan(5, drop=(2,)), "vision": TowerPlan(3, drop=(1,))})
    student = prune(vlm, plan, bridges={"text": "scale", "vision": "fold"}, data=data)
    assert {(b.tower, b.kind) for b in student.record.bridges} == {
        ("text", "scale"),
        ("vision", "fold"),
    }
    student = prune(vlm, plan, bridges={"text": "fold", "vision": "none"}, data=data)
    assert [(b.tower, b.kind) for b in student.record.bridges] == [("text", "fold")]


def test_the_same_data_gives_the_same_student(vlm: VLM, data: Any) -> None:
    first, second = (prune(vlm, PLAN, bridges="fold", data=data) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.record == second.record


def test_scenes_stand_in_for_data_and_the_manifest_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("interlace.surgery.bridges.calibration.BRIDGE_SAMPLES", 8)
    clip = open_model("bundled:clip", dtype="float32")
    student = prune(clip, Plan({"text": TowerPlan(12, drop=(4,))}), bridges="fold")
    assert student.record.notes == (
        "no data was given for the bridges, so they were fitted on 8 built-in scenes (seed 0)",
    )
    assert student.record.bridges[0].kind == "fold"
    assert set(student.record.inputs) == {"model", "plan", "data"}
