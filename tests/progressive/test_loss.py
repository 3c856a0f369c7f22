from __future__ import annotations

from typing import Any

import pytest
import torch

import interlace as il
from interlace.data.collate import Collator
from interlace.progressive.loss import TaskLoss
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

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
