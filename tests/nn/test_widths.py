"""Fused students whose layers have lost heads and neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GENERATIVE, TINY

import interlace as il
from interlace.models import VLM, family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune


def narrowed(name: str) -> Any:
    """A student that lacks a query head and some neurons in one layer of every tower."""
    model = TINY[name]()
    vlm = VLM(model, family_of(model), name=name)
    towers = {}
    for tower, shape in vlm.shape().towers.items():
        cut = {}
        for site, widths in shape.sites.items():
            first = next(layer for layer, groups in enumerate(widths.groups) if groups)
            cut[site] = {first: (1,) if widths.kind == "heads" else tuple(range(7))}
        towers[tower] = TowerPlan(shape.num_layers, cut=cut)
    return prune(vlm, Plan(towers, standard=False)).model


@pytest.mark.parametrize("name", ["blip_caption", "blip2_opt", "clip", "llava", "qwen3_vl"])
def test_fused_students_compute_what_they_did(name: str, kit: Any, route: Any) -> None:
    model = narrowed(name)
    inputs = kit.inputs(name, model)
    plain = kit.forward(model, inputs)
    truth = kit.forward(kit.in_fp64(model), kit.cast(inputs, torch.float64))
    tokens = kit.generate(model, name) if name in GENERATIVE else None
    report = il.fuse(model)
    # heads that no longer make up the width: one such attention has a fused form, one says why not
    narrow = {each.kind: each for each in report.entries if each.kind.startswith("Narrow")}
    if name == "blip_caption":
        assert narrow["NarrowBlipAttention"].fused
    elif name == "blip2_opt":
        assert "do not make up its width" in narrow["NarrowBlip2Attention"].reason
    else:
        assert not narrow
    with route():
        assert kit.excesses(kit.forward(model, inputs), plain, truth) == []
        if tokens is not None:
            assert torch.equal(kit.generate(model, name), tokens)
    il.unfuse(model)
    again = kit.forward(model, inputs)
    assert all(torch.equal(again[key], value) for key, value in plain.items())
