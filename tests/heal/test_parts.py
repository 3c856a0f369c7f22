"""Students without attention or the feed-forward part of single layers heal, gated or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heal.toys import toy_collate, toy_samples
from tiny import TINY

from interlace.heal import heal
from interlace.heal.sparsity import find_branches, layer_importance
from interlace.models import VLM, family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune


@pytest.mark.parametrize("gates", ["none", "l1"])
@pytest.mark.parametrize("name", ["blip_caption", "clip", "llava"])
def test_what_is_left_of_the_tuned_layers_trains(name: str, gates: Any) -> None:
    model = TINY[name](text=5, vision=2)
    teacher = VLM(model, family_of(model))
    sites = teacher.shape().towers["text"].sites
    attention = next(n for n, site in sites.items() if site.kind == "heads" and not site.cross)
    ffn = next(n for n, site in sites.items() if site.kind == "ffn")
    plan = TowerPlan(5, tune=(0, 2), parts={attention: (0,), ffn: (2,)})
    student = prune(teacher, Plan({"text": plan}, standard=False))
    kinds = {(each.layer, each.kind) for each in find_branches(student, ["text"])}
    assert (0, "attention") not in kinds
    assert (2, "mlp") not in kinds
    assert {(0, "mlp"), (2, "attention"), (1, "attention"), (1, "mlp")} <= kinds
    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    taught = teacher.fingerprint
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(8),
        collate=toy_collate(name, student.model),
        max_steps=2,
        batch_size=4,
        learning_rate=1e-2,
        gates=gates,
        gate_units=("branches",) if gates == "none" else ("branches", "heads", "neurons"),
    )
    tower = student.towers["text"]
    tuned = tuple(f"{tower.path}.{layer}." for layer in plan.tune)
    changed = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    if gates == "none":
        assert all(n.startswith(tuned) for n in changed)
    for prefix in tuned:
        assert any(n.startswith(prefix) and before[n].dim() == 2 for n in changed)
    if gates != "none":
        assert attention not in report.unit_gates["text"][0]
        assert ffn in report.unit_gates["text"][0]
        assert set(layer_importance(report)["text"]) == set(range(5))
    assert report.steps == 2
    assert report.final["hidden"] > 0
    assert teacher.fingerprint == taught
