"""Surgery gives a student that passes its check, or raises and leaves everything as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from tiny_base import Quantised
from torch import nn

from interlace.errors import PlanError
from interlace.models import VLM, family_of
from interlace.models.family import Family
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune, shell


@pytest.fixture
def llava(kit: Any) -> Any:
    return kit.opened("llava")


def _state(vlm: VLM) -> Any:
    modules = {
        name: (type(module), module.training, dict(shell.plain_attributes(module)))
        for name, module in vlm.model.named_modules()
    }
    flags = [(p.data_ptr(), p.requires_grad) for p in vlm.model.parameters()]
    return modules, flags, vlm.model.config.to_dict(), vlm.fingerprint, torch.get_rng_state().sum()


@pytest.mark.parametrize("stage", ["remap", "check", "fill"])
def test_a_failure_at_any_stage_leaves_the_model_as_it_was(
    llava: Any, kit: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PlanError("on purpose")

    if stage == "remap":
        monkeypatch.setattr(Family, "remap", fail)
    elif stage == "check":
        monkeypatch.setattr("interlace.surgery.pruning.check_same_attributes", fail)
    else:
        real, calls = shell.fill, []

        def second(*args: Any, **settings: Any) -> None:
            calls.append(1)
            fail() if len(calls) == 2 else real(*args, **settings)

        monkeypatch.setattr("interlace.surgery.pruning.fill", second)
    before = _state(llava.vlm)
    with pytest.raises(PlanError, match="on purpose"):
        prune(llava.vlm, kit.plan_of(llava.vlm, {"text": (2,), "vision": (1,)}, text=(3,)))
    assert _state(llava.vlm) == before
    assert kit.bit_equal(kit.outputs(llava.vlm.model, llava.inputs), llava.outputs)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan({"txt": TowerPlan(8)}), "Did you mean 'text'"),
        (Plan({"text": TowerPlan(12, drop=(9,))}), "12 layers, but this model's has 8"),
        (Plan({"text": TowerPlan(8, drop=(0, 1, 2, 3, 4, 5, 6))}), "leaves 1 of 8 layers"),
        (Plan({"text": TowerPlan(8, drop=(2,))}, inputs={"model": "0" * 64}), "another model"),
        ("text", "takes a Plan, got str"),
    ],
)
def test_plans_that_do_not_fit_are_refused_in_words(llava: Any, plan: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        prune(llava.vlm, plan)


def test_a_plan_that_names_this_model_is_carried_out(llava: Any, kit: Any) -> None:
    plan = kit.plan_of(llava.vlm, {"text": (7,)})
    plan = dataclasses.replace(plan, inputs={"model": llava.fingerprint})
    student = prune(llava.vlm, plan)
    assert student.plan is plan
    assert student.record.notes == (
        "text layer 7 was dropped although pinned: "
        "last layer: the final norm and head read its output",
    )


def test_a_plan_in_a_students_own_numbers_is_translated(llava: Any, kit: Any) -> None:
    student = prune(llava.vlm, kit.plan_of(llava.vlm, {"text": (1, 4)}))
    own = Plan({"text": TowerPlan(6, drop=(3,), tune=(2,), reasons={3: "why"})})
    again = prune(student, own)
    assert again.plan["text"].drop == (5,)
    assert again.plan["text"].tune == (3,)
    assert again.plan["text"].reasons == {5: "why"}
    assert again.towers["text"].original == (0, 2, 3, 6, 7)
    assert again.record.plan_fingerprint == own.fingerprint
    with pytest.raises(PlanError, match="an earlier cut removed"):
        prune(student, Plan({"text": TowerPlan(8, drop=(4,))}))


def test_a_model_that_was_changed_at_run_time_is_refused() -> None:
    model = tiny.clip()
    vlm = VLM(model, family_of(model))
    model.visual_projection = nn.Sequential(model.visual_projection)
    with pytest.raises(PlanError, match=r"not as transformers builds it.*visual_projection"):
        prune(vlm, Plan({}))
    model = tiny.clip()
    vlm = VLM(model, family_of(model))
    model.text_projection.weight = Quantised(model.text_projection.weight.detach())
    with pytest.raises(PlanError, match=r"text_projection.weight is a Quantised of shape"):
        prune(vlm, Plan({}))
    model = tiny.clip()
    vlm = VLM(model, family_of(model))
    model.forward = model.forward
    with pytest.raises(PlanError, match="replaced forward"):
        prune(vlm, Plan({}))


def test_attributes_set_by_hand_move_with_their_layer(kit: Any) -> None:
    model = tiny.clip()
    vlm = VLM(model, family_of(model))
    vlm.towers["text"].layers[4].self_attn.scale = 0.9
    model.train()
    # a wrong number of a layer is not kept: it follows from where the layer stands
    student = prune(vlm, kit.plan_of(vlm, {"text": (1, 2)}))
    assert student.towers["text"].layers[2].self_attn.scale == 0.9
    assert student.towers["text"].layers[1].self_attn.scale != 0.9
    assert student.model.training
    model.eval()
    student.model.eval()
    inputs = tiny.tiny_inputs("clip", model)
    with kit.skipping(vlm, {"text": (1, 2)}):
        assert kit.bit_equal(kit.outputs(student.model, inputs), kit.outputs(model, inputs))


class _Stack(nn.Module):
    """Layers that differ by their number in a way that no config states."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.num_layers = 4
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        for index, layer in enumerate(self.layers):
            layer.layer_idx = index
            layer.is_wide = index % every == 0


def test_layers_whose_kind_follows_from_their_number_are_refused() -> None:
    def moved(name: str) -> dict[int, int]:
        return {2: 1, 3: 2} if name.startswith("layers") else {4: 3}

    draft, built = _Stack(1), _Stack(1)
    draft.layers = nn.ModuleList(draft.layers[i] for i in (0, 2, 3))
    built.layers = nn.ModuleList(built.layers[i] for i in (0, 1, 2))
    built.num_layers = 3
    shell.check_same_attributes(built, draft, moved)
    draft.layers[1].is_wide = False
    with pytest.raises(PlanError, match=r"layers.1 has is_wide = False"):
        shell.check_same_attributes(built, draft, moved)
