"""Every family on the batches that its own processor and collator make, as users give them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_processors import BUILT, with_processor

import interlace as il
from interlace.data.samples import scenes_tasks
from interlace.records import Plan, TowerPlan


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
    cut = TowerPlan(depth, drop=(3,), tune=(4,))
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
