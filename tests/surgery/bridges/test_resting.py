"""Layers that rest change nothing but the time it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery.bridges.test_every_family import _data, _dense
from surgery.bridges.toys import PostNorm, PreNorm, Weights, calibration, tower, without
from tiny import TINY, tiny_inputs

from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.fold import fit_fold
from interlace.surgery.bridges.observe import Reached


@pytest.mark.parametrize("name", sorted(TINY))
def test_beginning_at_a_known_layer_gives_the_same_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = _dense(name)
    towers = {
        tower: TowerPlan(each.num_layers, drop=(2,))
        for tower, each in vlm.towers.items()
        if 2 not in each.bound and each.cross_attention_layers is None
    }
    data = [*_data(vlm), tiny_inputs(name, vlm.model, batch=2, seed=2)]
    student = prune(vlm, Plan(towers), bridges="refit", data=data)
    monkeypatch.setattr(Reached, "move", lambda *_, **__: None)
    plain = prune(vlm, Plan(towers), bridges="refit", data=data)
    assert student.record.bridges == plain.record.bridges
    pairs = zip(student.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
def test_every_layer_runs_as_often_as_it_is_looked_at(kind: Any) -> None:
    dense = tower(kind)
    student, gaps = without(dense, (1, 4), refit=True)
    count: dict[Any, int] = {}
    for model in (dense, student):
        for layer in model.layers:
            layer.up.register_forward_hook(
                lambda module, *_: count.update({module: count.get(module, 0) + 1})
            )
    data = calibration(num_batches=16)
    with torch.no_grad():
        fit_fold(dense, student, gaps, data, Weights())
    rounds = 5 if kind is PostNorm else 1
    # the rest are trials, and one run per gap and look to show what a layer gives
    assert all(count[layer.up] <= 16 * (1 + rounds) + 60 for layer in student.layers)
    assert all(count[layer.up] <= 16 + 60 for layer in dense.layers[:-1])
