"""Students of other widths heal like any other: what the plan tunes trains, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heal.toys import toy_collate, toy_samples
from tiny import TINY

from interlace.heal import heal
from interlace.models import VLM, family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

CUTS: dict[str, Any] = {
    "llava": TowerPlan(
        5,
        drop=(1,),
        tune=(2,),
        freeze=(3,),
        cut={"self_attn": {0: (1,), 2: (2,)}, "mlp": {2: (0, 5, 7)}},
        graft={2: {1: (1,)}},
    ),
    "clip": TowerPlan(5, tune=(0, 4), cut={"self_attn": {0: (1,), 4: (2, 3)}}),
}


@pytest.mark.parametrize("name", sorted(CUTS))
def test_only_the_tuned_layers_of_a_narrowed_student_change(name: str) -> None:
    model = TINY[name](text=5, vision=2)
    teacher = VLM(model, family_of(model))
    student = prune(teacher, Plan({"text": CUTS[name]}, standard=False))
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
    )
    tower = student.towers["text"]
    tuned = tuple(f"{tower.path}.{tower.position(layer)}." for layer in CUTS[name].tune)
    changed = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith(tuned) for n in changed)
    for prefix in tuned:
        assert any(n.startswith(f"{prefix}self_attn.q_proj") for n in changed)
    assert report.steps == 2
    # the end of a narrowed tower is compared with the teacher's even where no layer is gone
    assert report.final["hidden"] > 0
    assert teacher.fingerprint == taught
