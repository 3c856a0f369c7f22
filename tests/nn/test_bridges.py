"""Fused students with run-time bridges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interlace as il
from interlace.models.bridges import attach


@pytest.mark.parametrize("rank", [None, 4], ids=["diagonal", "low-rank"])
def test_bridges_are_crossed(rank: int | None, kit: Any, route: Any) -> None:
    model = kit.build("llava")
    path = "model.language_model.layers.3"
    settings = {"module": path, "side": "input", "width": 32, "rank": rank}
    settings |= {"norm": "input_layernorm", "norm_kind": "rms"}
    before = kit.forward(model, kit.inputs("llava", model))
    bridge = attach(model, settings, torch.float32)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    inputs = kit.inputs("llava", model)
    exact = kit.in_fp64(model)
    plain = kit.forward(model, inputs)
    truth = kit.forward(exact, kit.cast(inputs, torch.float64))
    assert not torch.allclose(plain[".logits"], before[".logits"])
    tokens = kit.generate(model, "llava")
    il.fuse(model)
    with route():
        assert kit.excesses(kit.forward(model, inputs), plain, truth) == []
        assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), tokens)
