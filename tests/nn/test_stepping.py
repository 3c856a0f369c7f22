"""What a recorded step does otherwise: one write into the cache, products of a few rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorders import Replayer
from transformers import LlamaConfig, StaticCache

import interlace as il
from interlace.nn import graphs, stepping
from interlace.nn.recording import text_decoders
from interlace.ops import _overlap


def filled(device: str = "cpu") -> StaticCache:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    cache = StaticCache(config=config, max_cache_len=7)
    torch.manual_seed(0)
    for layer in range(2):
        cache.update(*torch.randn(2, 3, 4, 5, 8, device=device), layer)
    return cache


def assert_a_step_is_an_update(device: str) -> None:
    found, expected = filled(device), filled(device)
    for _ in range(2):
        with stepping.stepping(found):
            for layer in range(2):
                # heads before tokens, as a projection leaves them
                key, value = torch.randn(2, 3, 1, 4, 8, device=device).transpose(2, 3)
                ours = stepping.cached(found, key, value, layer)
                for one, other in zip(ours, expected.update(key, value, layer), strict=True):
                    assert torch.equal(one, other)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert int(one.cumulative_length) == int(other.cumulative_length) == 7


def test_a_step_is_an_update() -> None:
    assert_a_step_is_an_update("cpu")


@pytest.mark.gpu
def test_a_step_is_an_update_on_a_gpu() -> None:
    assert_a_step_is_an_update("cuda")


def test_another_cache_is_updated_as_ever() -> None:
    cache = filled()
    with stepping.stepping(SimpleNamespace(layers=[])):
        stepping.cached(cache, *torch.randn(2, 3, 4, 1, 8), 0)
    assert int(cache.layers[0].cumulative_length) == 6


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_overlapping_steps_give_the_same_tokens(
    name: str, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.build(name)
    plain = kit.generate(model, name, cache_implementation="static")
    calls: list[bool] = []
    stock = il.ops.skinny_linear

    def counted(*args: Any, gated: bool = False) -> torch.Tensor:
        calls.append(gated)
        return stock(*args, gated=gated)

    monkeypatch.setattr(il.ops, "skinny_linear", counted)
    monkeypatch.setattr(_overlap, "allowed", lambda device: _overlap._ALLOWED.get())
    il.fuse(model)
    decoders = text_decoders(model)
    forward = graphs.install(model, decoders, Replayer(), overlap=True)[0]
    assert torch.equal(kit.generate(model, name, cache_implementation="static"), plain)
    assert forward.num_recordings == 1
    layers = sum(path.rsplit(".", 1)[-1] == "self_attn" for path, _ in decoders[0].named_modules())
    steps = len(calls) // (4 * layers)
    # qkv, o, gate with up, down
    assert (len(calls), sum(calls)) == (4 * layers * steps, layers * steps)
    assert steps >= 5
