"""Models with attention of this package beside the same models without, and how they are compared.

The truth is the unfused model in fp64. transformers' RMSNorm computes in fp32 whatever it is given,
so the truth has an RMSNorm of its own.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import TINY, generation_inputs, tiny_inputs

import interlace.nn
from interlace.ops._budget import Budget

if TYPE_CHECKING:
    from collections.abc import Mapping

assert interlace.nn
# products of two outputs that are compared themselves: a few small sums of large terms, whose error
# has nothing to do with their own size
_DERIVED = ("logits_per_image", "logits_per_text")
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}


def _exact_rms_norm(module: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    eps = module.variance_epsilon
    return forward


def in_fp64(model: torch.nn.Module) -> Any:
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.forward = _exact_rms_norm(module)
    return exact


def cast(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def outputs(result: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating tensor of a result, without what stands at padding."""
    masks = [value.bool() for name, value in inputs.items() if name.endswith("attention_mask")]
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            for mask in masks:
                if value.shape[:2] == mask.shape:
                    value = value[mask]
            found[name] = value.detach()
        elif isinstance(value, dict):
            for key, each in value.items():
                if key != "past_key_values" and key not in _DERIVED:
                    visit(f"{name}.{key}", each)
        elif isinstance(value, list | tuple):
            for key, each in enumerate(value):
                visit(f"{name}.{key}", each)

    visit("", result)
    return found


def excesses(actual: Any, reference: Any, truth: Any) -> list[str]:
    """How results break the error budget, one sentence each."""
    assert actual.keys() == reference.keys() == truth.keys()
    assert actual
    found = []
    for name, value in actual.items():
        excess = Budget().excess(value, reference[name], truth[name])
        if excess is not None:
            found.append(f"{name}: {excess}")
    return found


def gradients(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of every parameter of a sum over all outputs with fixed random factors."""
    model.zero_grad(set_to_none=True)
    result = model(**inputs)
    total = torch.zeros((), dtype=torch.float64)
    masks = [value.bool() for name, value in inputs.items() if name.endswith("attention_mask")]
    for key in ("logits", "logits_per_image", "last_hidden_state", "loss"):
        value = result.get(key)
        if value is None:
            continue
        for mask in masks:
            if value.shape[:2] == mask.shape:
                value = value[mask]
        generator = torch.Generator().manual_seed(5)
        factors = torch.randn(value.shape, generator=generator)
        total = total + (value.double() * factors).sum()
    total.backward()
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def generate(model: Any, name: str, batch: int = 2, **settings: Any) -> torch.Tensor:
    inputs = generation_inputs(name, model, batch=batch)
    inputs = cast(inputs, next(model.parameters()).dtype)
    with torch.no_grad():
        return model.generate(**inputs, **SETTINGS, **settings)


@pytest.fixture(params=sorted(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        build=lambda name, **options: TINY[name](**options),
        inputs=tiny_inputs,
        in_fp64=in_fp64,
        cast=cast,
        outputs=outputs,
        excesses=excesses,
        gradients=gradients,
        generate=generate,
    )
