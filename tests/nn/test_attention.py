"""The attention implementation "interlace" against "sdpa", in every family."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tiny import GENERATIVE

from interlace import ops

# as routed on the CPU, and every op that can serve through its reference
ROUTES = {"auto": contextlib.nullcontext, "ops": lambda: ops.backend("torch")}


@pytest.fixture(params=sorted(ROUTES))
def route(request: pytest.FixtureRequest) -> Any:
    return ROUTES[request.param]


def test_outputs_keep_the_budget(family: str, kit: Any, route: Any) -> None:
    model = kit.build(family)
    inputs = kit.inputs(family, model)
    with torch.no_grad():
        plain = kit.outputs(model(**inputs), inputs)
        exact = kit.in_fp64(model)
        truth = kit.outputs(exact(**kit.cast(inputs, torch.float64)), inputs)
        model.set_attn_implementation("interlace")
        with route():
            actual = kit.outputs(model(**inputs), inputs)
    assert kit.excesses(actual, plain, truth) == []


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_is_equal_token_by_token(name: str, cache: str, kit: Any, route: Any) -> None:
    model = kit.build(name)
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "static" and name.startswith("blip_"):
        pytest.skip("transformers' BLIP generates with a dynamic cache only")
    plain = kit.generate(model, name, **settings)
    model.set_attn_implementation("interlace")
    with route():
        assert torch.equal(kit.generate(model, name, **settings), plain)
