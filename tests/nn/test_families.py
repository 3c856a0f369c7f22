"""What holds for every family: a fused model computes what the unfused one does.

Every test runs on the routes that the CPU takes and on all ops, through their references.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ALL, GENERATIVE

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
    for name in sorted(ALL)
    for kind in ("dense", "pruned", "ragged")
    if kind != "ragged" or name in RAGGED
]


# These make more of what is rounded from layer to layer: whether single gradients keep the budget
# hangs on the seed. So they are compared in fp64, up to what transformers computes in fp32 all the
# same (rotary tables, recurrent states).
AMPLIFYING = ("gemma3", "glm4v", "qwen3_5", "qwen3_5_moe")
# In bfloat16 a token's two best experts are often as good as the next ones.
ROUTED = ("qwen3_vl_moe", "qwen3_5_moe", "qwen3_5")
STEADY = [each for each in VARIANTS if each[0] not in AMPLIFYING]


@pytest.mark.parametrize(("name", "kind"), STEADY)
def test_outputs_and_gradients_keep_the_budget(name: str, kind: str, kit: Any) -> None:
    model, stock = kit.variant(name, kind)
    unfused = kit.unfused(stock, kit.inputs(name, stock))
    il.fuse(model)
    for route in kit.routes.values():
        with route():
            assert unfused.excesses(model) == []


@pytest.mark.parametrize(("name", "kind"), [each for each in VARIANTS if each not in STEADY])
def test_outputs_and_gradients_agree_in_fp64(name: str, kind: str, kit: Any) -> None:
    model, stock = (kit.in_fp64(each) for each in kit.variant(name, kind))
    inputs = kit.cast(kit.inputs(name, stock), torch.float64)
    wanted, (gradients, scales) = kit.forward(stock, inputs), kit.gradients(stock, inputs)
    il.fuse(model)
    for route in kit.routes.values():
        with route():
            found = kit.forward(model, inputs) | kit.gradients(model, inputs, scales)[0]
        assert found.keys() == wanted.keys() | gradients.keys()
        for key, value in {**wanted, **gradients}.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(ROUTED)))
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
@pytest.mark.parametrize(("name", "kind"), STEADY)
def test_outputs_and_gradients_keep_the_budget_on_a_gpu(name: str, kind: str, kit: Any) -> None:
    model, stock = (each.cuda() for each in kit.variant(name, kind))
    inputs = {key: value.cuda() for key, value in kit.inputs(name, stock.cpu()).items()}
    unfused = kit.unfused(stock.cuda(), inputs)
    report = il.fuse(model.cuda())
    assert unfused.excesses(model) == []
    il.unfuse(model)
    # as long as there are kernels for the GPU, none of these computes on torch
    assert not any(entry.backend.startswith("torch (scaled") for entry in report.fused)
