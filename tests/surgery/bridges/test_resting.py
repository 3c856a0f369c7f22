"""Layers that rest change nothing but the time it takes."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from surgery.bridges.test_every_family import BEHIND_PLAIN, ONLY_EXPERTS, _data, _dense
from surgery.bridges.toys import (
    WIDTH,
    PostNorm,
    PreNorm,
    Weights,
    calibration,
    tower,
    without,
)
from tiny import TINY, tiny_inputs

from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.calibration import Calibration
from interlace.surgery.bridges.fold import fit_fold
from interlace.surgery.bridges.front import Front, modules_in_front
from interlace.surgery.bridges.names import RUN_TIME
from interlace.surgery.bridges.observe import Pair, Reached
from interlace.surgery.bridges.runtime import fit_run_time
from interlace.surgery.bridges.scale import fit_scale


@pytest.mark.parametrize("name", sorted(TINY))
def test_beginning_at_a_known_layer_behind_known_towers_gives_the_same_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = _dense(name)
    drop = {"text": BEHIND_PLAIN} if name == "qwen3_vl_moe" else {}
    towers = {
        tower: TowerPlan(each.num_layers, drop=drop.get(tower, (2,)))
        for tower, each in vlm.towers.items()
        if 2 not in each.bound
        and each.cross_attention_layers is None
        and (name, tower) != (ONLY_EXPERTS, "text")
    }
    data = [*_data(vlm), tiny_inputs(name, vlm.model, batch=2, seed=2)]
    student = prune(vlm, Plan(towers), bridges="refit", data=data)
    monkeypatch.setattr(Reached, "move", lambda *_, **__: None)
    monkeypatch.setattr(Calibration, "looking_at", lambda *_: contextlib.nullcontext())
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
        fit_fold(Pair(dense, student, data, Weights()), gaps)
    rounds = 5 if kind is PostNorm else 1
    # the rest are trials, and one run per gap and look to show what a layer gives
    assert all(count[layer.up] <= 16 * (1 + rounds) + 60 for layer in student.layers)
    assert all(count[layer.up] <= 16 + 60 for layer in dense.layers[:-1])


@pytest.mark.parametrize(
    "fit", [fit_scale, *(partial(fit_run_time, kind=kind, rank=2) for kind in RUN_TIME)]
)
def test_scales_and_modules_are_the_same_from_a_known_layer_on(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    for known in (True, False):
        dense = tower(PreNorm, norm=torch.nn.LayerNorm(WIDTH, eps=1e-12))
        for layer in dense.layers:
            layer.norm.eps = 1e-12
        student, gaps = without(dense, (1, 3, 4))
        if not known:
            monkeypatch.setattr(Reached, "move", lambda *_, **__: None)
        with torch.no_grad():
            bridges = fit(Pair(dense, student, calibration(), Weights()), gaps)
        fitted.append((bridges, student.state_dict()))
    (bridges, weights), (plain, expected) = fitted
    assert bridges == plain
    assert all(bridge.kind != "none" for bridge in bridges)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


IN_FRONT = {
    "qwen3_vl": ("text", {"vision": "model.visual"}),
    "llava": ("text", {"vision": "model.vision_tower"}),
    "clip": ("vision", {}),
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_a_vision_tower_runs_once_per_batch(name: str) -> None:
    tower_name, expected = IN_FRONT[name]
    vlm = _dense(name)
    data = [*_data(vlm), tiny_inputs(name, vlm.model, batch=2, seed=2)]
    paths = {each: found.path for each, found in vlm.towers.items()}
    path = paths.pop(tower_name)
    runs = (lambda batch=batch: vlm.model(**batch) for batch in data)
    found = modules_in_front(vlm.model, path, paths, runs)
    assert found == expected
    count = 0

    def ran(*_: Any) -> None:
        nonlocal count
        count += 1

    if found:
        with vlm.towers["vision"].layers[0].register_forward_hook(ran):
            plan = Plan({"text": TowerPlan(vlm.towers["text"].num_layers, drop=(2,))})
            prune(vlm, plan, bridges="refit", data=data)
        # the survey, the look for what is in front, and what the student did not run before
        assert count == 3 + 1 + 2


def test_what_is_given_again_may_be_changed_in_place() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(inplace=True))
    front = Front(model, {"0": {}})
    batch = {"x": torch.randn(2, 3)}
    expected = torch.relu(model[0](batch["x"])).detach()
    for _ in range(3):
        with torch.no_grad(), front.resting(batch):
            assert torch.equal(model(batch["x"]), expected)
    with torch.no_grad(), front.resting({"x": batch["x"]}):
        assert torch.equal(model(2 * batch["x"]), torch.relu(model[0](2 * batch["x"])))
    assert "forward" not in vars(model[0])
