"""Fused students whose layers have lost heads and neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GENERATIVE

import interlace as il


@pytest.mark.parametrize("name", ["blip_caption", "blip2_opt", "clip", "llava", "qwen3_vl"])
def test_fused_students_compute_what_they_did(name: str, kit: Any, route: Any) -> None:
    model = kit.narrowed(name)
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
