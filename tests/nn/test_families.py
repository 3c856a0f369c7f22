"""What holds for every family: a fused model computes what the unfused one does.

Every test runs on the routes that the CPU takes and on all ops, through their references.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import GENERATIVE, TINY

import interlace as il

# families that have projections of queries, keys and values apart somewhere
RAGGED = (
    "clip",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "siglip",
    "siglip2",
)
VARIANTS = [
    (name, kind)
    for name in sorted(TINY)
    for kind in ("dense", "pruned", "ragged")
    if kind != "ragged" or name in RAGGED
]


@pytest.mark.parametrize(("name", "kind"), VARIANTS)
def test_outputs_and_gradients_keep_the_budget(name: str, kind: str, kit: Any) -> None:
    model, stock = kit.variant(name, kind)
    unfused = kit.unfused(stock, kit.inputs(name, stock))
    il.fuse(model)
    for route in kit.routes.values():
        with route():
            assert unfused.excesses(model) == []


@pytest.mark.parametrize("name", sorted(TINY))
def test_bfloat16_keeps_the_budget(name: str, kit: Any) -> None:
    model = kit.build(name).bfloat16()
    unfused = kit.unfused(model, kit.cast(kit.inputs(name, model), torch.bfloat16))
    il.fuse(model)
    for route in kit.routes.values():
        with route():
            assert unfused.excesses(model) == []


@pytest.mark.parametrize(("name", "kind"), [each for each in VARIANTS if each[0] in GENERATIVE])
def test_generation_is_equal_token_by_token(name: str, kind: str, kit: Any) -> None:
    model, stock = kit.variant(name, kind)
    # transformers' BLIP generates with a dynamic cache only
    caches = (None,) if name.startswith("blip_") else (None, "static")
    plain = {cache: kit.generate(stock, name, cache_implementation=cache) for cache in caches}
    il.fuse(model)
    for cache in caches:
        for route in kit.routes.values():
            with route():
                found = kit.generate(model, name, cache_implementation=cache)
            assert torch.equal(found, plain[cache])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind"), VARIANTS)
def test_outputs_and_gradients_keep_the_budget_on_a_gpu(name: str, kind: str, kit: Any) -> None:
    model, stock = (each.cuda() for each in kit.variant(name, kind))
    inputs = {key: value.cuda() for key, value in kit.inputs(name, stock.cpu()).items()}
    unfused = kit.unfused(stock.cuda(), inputs)
    report = il.fuse(model.cuda())
    assert unfused.excesses(model) == []
    il.unfuse(model)
    # as long as there are kernels for the GPU, none of these computes on torch
    assert not any(entry.backend.startswith("torch (scaled") for entry in report.fused)
