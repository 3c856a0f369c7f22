"""Modules that somebody listens to, changes or replaces work in a fused model as in a stock one."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import interlace as il

if TYPE_CHECKING:
    from collections.abc import Callable

_LAYER = re.compile(r"^(.*\.(?:layers|layer|blocks|block)\.)(\d+)(.*)$")


def _places(model: nn.Module) -> list[str]:
    """Every module, of stacked layers those in the last one."""
    names = [name for name, _ in model.named_modules() if name]
    last: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, names)):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    found = [(name, _LAYER.match(name)) for name in names]
    return [name for name, match in found if match is None or int(match[2]) == last[match[1]]]


def _changed(module: nn.Module, heard: list[str], name: str) -> Any:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        if not isinstance(first, torch.Tensor) or not first.is_floating_point():
            return None
        heard.append(name)
        new = first * 0.5 + 0.1
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return module.register_forward_hook(hook)


def test_a_hook_on_any_module_counts(family: str, kit: Any) -> None:
    model = kit.build(family)
    inputs = kit.inputs(family, model)
    fused = copy.deepcopy(model)
    il.fuse(fused)
    for name in _places(model):
        heard: tuple[list[str], list[str]] = ([], [])
        found = []
        for each, said in zip((model, fused), heard, strict=True):
            handle = _changed(each.get_submodule(name), said, name)
            found.append(kit.forward(each, inputs))
            handle.remove()
        assert heard[0] == heard[1], name
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3, msg=name)


class _Adapted(nn.Module):
    """A projection with a low-rank one beside it, as adapters put it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.beside = nn.Linear(base.in_features, base.out_features, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.beside(x)


@pytest.mark.parametrize("family", ["clip", "gemma3", "internvl", "qwen3_vl"])
def test_adapters_may_be_there_before_fusing(family: str, kit: Any) -> None:
    model = kit.build(family)
    torch.manual_seed(1)
    for path, linear in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if type(linear) is nn.Linear and ("attn" in owner or "attention" in owner):
            # which says nothing of sizes, and has no weight of its own
            setattr(model.get_submodule(owner), name, _Adapted(linear))
    inputs = kit.inputs(family, model)
    plain = kit.forward(model, inputs)
    report = il.fuse(model)
    found = kit.forward(model, inputs)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)
    assert any(each.part == "attention" for each in report.fused)
    il.unfuse(model)
    torch.testing.assert_close(kit.forward(model, inputs), plain, rtol=0, atol=0)


def _adapt(layer: Any) -> None:
    torch.manual_seed(1)
    layer.self_attn.q_proj = _Adapted(layer.self_attn.q_proj)
    layer.mlp.up_proj = _Adapted(layer.mlp.up_proj)


def _listen(layer: Any) -> None:
    layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: out * 2)


def _listen_to_activation(layer: Any) -> None:
    layer.mlp.act_fn.register_forward_hook(lambda _, __, out: out * 2)


def _assign(layer: Any) -> None:
    torch.manual_seed(1)
    new = {name: torch.randn_like(each) for name, each in layer.mlp.named_parameters()}
    layer.mlp.load_state_dict(new, assign=True)


def _assign_bias(layer: Any) -> None:
    bias = layer.self_attn.k_proj.bias
    layer.self_attn.k_proj.bias = nn.Parameter(torch.ones_like(bias))


def _move_bias(layer: Any) -> None:
    bias = layer.self_attn.k_proj.bias
    bias.data = torch.ones_like(bias)


def _remove_bias(layer: Any) -> None:
    layer.self_attn.v_proj.bias = None


CHANGES = (_adapt, _listen, _listen_to_activation, _assign, _assign_bias, _move_bias, _remove_bias)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_a_change_counts_before_and_after_compiling(
    change: Callable[[Any], None], num_tokens: int, kit: Any
) -> None:
    # with biases, and with one layer, since the compiler is slow
    whole = kit.build("qwen2_vl", text=1)
    stock = whole.model.language_model
    fused = copy.deepcopy(whole)
    il.fuse(fused)
    early, late = (copy.deepcopy(fused).model.language_model for _ in range(2))
    twin = copy.deepcopy(stock)
    ids = torch.randint(3, 90, (1, num_tokens))

    def run(module: Any) -> Any:
        return module(input_ids=ids, use_cache=False).last_hidden_state

    torch._dynamo.reset()
    compiled = [torch.compile(each, backend="eager", fullgraph=True) for each in (twin, early)]
    with torch.no_grad():
        before = run(stock)
        for module in compiled:
            torch.testing.assert_close(run(module), before, rtol=1e-4, atol=1e-4)
        for module in (stock, twin, fused.model.language_model, early, late):
            change(module.layers[0])
        after = run(stock)
        assert not torch.allclose(after, before, atol=1e-2)
        # of hooks that come later the compiler takes no notice, in stock models either
        stock_compiled, fused_compiled = map(run, compiled)
        if change is not _move_bias:
            torch.testing.assert_close(fused_compiled, stock_compiled, rtol=1e-3, atol=1e-3)
        torch._dynamo.reset()
        late_compiled = torch.compile(late, backend="eager", fullgraph=True)
        for module in (fused.model.language_model, late_compiled):
            torch.testing.assert_close(run(module), after, rtol=1e-3, atol=1e-3)


def test_memory_that_processes_share_stays_shared(kit: Any) -> None:
    # its layers have biases
    model = kit.build("qwen2_vl")
    inputs = kit.inputs("qwen2_vl", model)
    il.fuse(model)
    plain = kit.forward(model, inputs)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    attention = model.model.language_model.layers[1].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        assert attention.interlace_state.merged.serves(projections)
    torch.testing.assert_close(kit.forward(model, inputs), plain, rtol=0, atol=0)
