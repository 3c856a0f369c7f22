"""Dense tiny models, plans for them, and the reference: the dense model with layers skipped."""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import TINY, tiny_inputs

from interlace.models import VLM, family_of, open_model
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every floating tensor of a forward.

    Even without gradients, torch.matmul picks another kernel for a weight that requires them where
    its input is not contiguous (SigLIP's pooling head), which rounds differently. So bit-equality
    is asked for with all flags lifted.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        with torch.no_grad():
            return _tensors(model(**inputs))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        # caches, and what a model looked at on the way
        left_out = ("cache", "past_key_values", "image_outputs", "video_outputs")
        value = [each for key, each in value.items() if key not in left_out]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def bit_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def reopened(name: str, folder: Path, student: VLM) -> VLM:
    """Open the checkpoint of a student, and check that it is the same.

    Outputs are equal to the bit, unless products of experts round by the address of their weights.
    """
    again = open_model(folder)
    assert type(again.model) is type(student.model)
    one, other = (outputs(each.model, _opened(name).inputs) for each in (again, student))
    if name == "qwen3_5_moe":
        assert len(one) == len(other) > 0
        for pair in zip(one, other, strict=True):
            assert torch.allclose(*pair, rtol=1e-5, atol=1e-5)
    else:
        assert bit_equal(one, other)
    assert again.fingerprint == student.fingerprint
    assert again.record == student.record
    assert again.shape() == student.shape()
    return again


def _pass_through(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def skipping(vlm: VLM, drop: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Let layers give back their input; what is injected between layers stays."""
    with ExitStack() as stack:
        for name, layers in drop.items():
            for layer in layers:
                block = vlm.towers[name].layers[layer]
                # before the hooks of transformers that capture hidden states
                hook = block.register_forward_hook(_pass_through, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def plan_of(vlm: VLM, drop: Mapping[str, tuple[int, ...]], **tune: tuple[int, ...]) -> Plan:
    return Plan(
        {
            name: TowerPlan(
                vlm.towers[name].num_layers, drop=drop.get(name, ()), tune=tune.get(name, ())
            )
            for name in {**drop, **tune}
        }
    )


def quarter(vlm: VLM) -> dict[str, tuple[int, ...]]:
    """A quarter of the layers of each tower, none of them pinned."""
    drop = {}
    for name, tower in vlm.towers.items():
        if tower.cross_attention_layers is not None:
            # a cross layer with the self layer that follows it
            drop[name] = (2, 3)
            continue
        free = [layer for layer in range(tower.num_layers) if layer not in tower.pinned]
        drop[name] = tuple(free[1::2][: tower.num_layers // 4])
    return drop


@functools.cache
def _opened(name: str) -> SimpleNamespace:
    model = TINY[name]()
    vlm = VLM(model, family_of(model), name=name)
    inputs = tiny_inputs(name, model)
    return SimpleNamespace(
        vlm=vlm,
        inputs=inputs,
        outputs=outputs(model, inputs),
        fingerprint=vlm.fingerprint,
    )


@functools.cache
def _quartered(name: str) -> tuple[Any, Any, VLM]:
    """A quarter of every tower gone at once, the layer after each dropped one tuned."""
    vlm = _opened(name).vlm
    drop = quarter(vlm)
    tune = {
        tower: tuple(layer + 1 for layer in layers if layer + 1 not in layers)
        for tower, layers in drop.items()
    }
    return drop, tune, prune(vlm, plan_of(vlm, drop, **tune))


@pytest.fixture(params=sorted(TINY))
def dense(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One family's dense model; shared by all tests, so it must stay as it is."""
    return _opened(request.param)


@pytest.fixture
def cut(dense: SimpleNamespace) -> tuple[Any, Any, VLM]:
    """What was dropped and tuned, and the student; shared, so it must stay as it is."""
    return _quartered(dense.vlm.name)


@pytest.fixture
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        opened=_opened,
        quartered=_quartered,
        outputs=outputs,
        bit_equal=bit_equal,
        reopened=reopened,
        skipping=skipping,
        plan_of=plan_of,
        quarter=quarter,
    )
