"""Recorded blocks, with a recorder for the CPU that keeps to the rules of CUDA graphs.

As a graph does, it reads nothing but the memory it was recorded with, fills one result and the norm
that it bears, and changes nothing while it records.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from tiny import TINY, tiny_inputs
from transformers.cache_utils import StaticLayer

import interlace as il
from interlace.nn import block_graphs, graphs
from interlace.nn.norms import bear, borne_by
from interlace.nn.recording import record_blocks, text_decoders

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATING = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class Replayer:
    """Records a function by keeping it."""

    def warm_up(self, step: Callable[[], torch.Tensor]) -> None:
        step()

    def record(self, step: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
        lengths = []

        def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
            lengths.append((layer.cumulative_length, layer.cumulative_length.clone()))
            return stock(layer, *args, **kwargs)

        stock = StaticLayer.update
        with mock.patch.object(StaticLayer, "update", update):
            made = step()
        for length, before in lengths:
            length.copy_(before)
        # a recording holds no numbers before it is replayed
        result = torch.full_like(made, float("nan"))
        norm = borne_by(made)
        if norm is not None:
            bear(result, norm[0], torch.full_like(norm[1], float("nan")))

        def replay() -> None:
            made = step()
            result.copy_(made)
            normed, own = borne_by(made), borne_by(result)
            if normed is not None and own is not None:
                own[1].copy_(normed[1])

        return replay, result


def _inputs(name: str, model: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in tiny_inputs(name, model).items()
    }


def _outputs(kit: Any, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = kit.forward(model, inputs)
    return found


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", sorted(TINY))
def test_replays_give_what_the_blocks_give(name: str, kit: Any) -> None:
    model = kit.build(name).eval()
    il.fuse(model)
    wanted = [_outputs(kit, model, _inputs(name, model, seed)) for seed in range(4)]
    blocks = record_blocks(model, Replayer())
    found = [_outputs(kit, model, _inputs(name, model, seed)) for seed in range(4)]
    assert all(_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(block._shelf.reason == "" for block in blocks)
    if blocks:
        replays = [block.num_replays for block in blocks]
        # text decoders make a cache that grows, which is not recorded; some families call their
        # vision tower twice
        assert max(replays) >= 3, replays
        assert {block.num_recordings for block in blocks} <= {0, 1, 2}


@pytest.mark.parametrize("kind", ["dense", "pruned", "ragged"])
@pytest.mark.parametrize("name", GENERATING)
def test_prompts_are_replayed_too(name: str, kind: str, kit: Any) -> None:
    model, stock = kit.variant(name, kind)
    plain = kit.generate(stock, name, cache_implementation="static")
    il.fuse(model)
    blocks = record_blocks(model, Replayer())
    forward = graphs.install(model, text_decoders(model), Replayer())[0]
    for _ in range(4):
        assert torch.equal(kit.generate(model, name, cache_implementation="static"), plain)
    assert (forward.num_recordings, forward.num_replays) == (1, 20)
    # the first call has memory of its own, and a shape is recorded when it is seen again
    assert {block.num_replays for block in blocks} <= {1, 2, 3}
    assert all(block._shelf.reason == "" for block in blocks)


def test_memory_is_not_taken_from_a_cache_in_use(kit: Any) -> None:
    model = kit.build("llava")
    options = {"cache_implementation": "static", "return_dict_in_generate": True}
    plain = kit.generate(model, "llava", **options)
    il.fuse(model)
    record_blocks(model, Replayer())
    forward = graphs.install(model, text_decoders(model), Replayer())[0]
    kept = []
    for _ in range(3):
        found = kit.generate(model, "llava", **options)
        assert torch.equal(found.sequences, plain.sequences)
        kept.append((found, found.past_key_values.layers[1].keys.clone()))
    memory = [found.past_key_values.layers[1].keys for found, _ in kept]
    assert len({each.data_ptr() for each in memory}) == 3
    assert all(torch.equal(now, then) for now, (_, then) in zip(memory, kept, strict=True))
    assert forward.num_recordings == 3
    lent = memory[-1].data_ptr()
    del found, kept, memory
    found = kit.generate(model, "llava", **options)
    assert found.past_key_values.layers[1].keys.data_ptr() == lent
    assert torch.equal(found.sequences, plain.sequences)
    assert forward.num_recordings == 3


def test_hooks_hear_every_pass_and_keep_what_they_heard(kit: Any) -> None:
    model = kit.build("clip").eval()
    il.fuse(model)
    layers = model.vision_model.encoder.layers
    heard: list[torch.Tensor] = []
    layers[0].register_forward_hook(lambda _, __, result: heard.append(result))
    inner: list[int] = []
    inputs = [_inputs("clip", model, seed) for seed in range(3)]
    wanted = [_outputs(kit, model, each) for each in inputs]
    plain, heard[:] = [each.clone() for each in heard], []
    blocks = {id(block): block for block in record_blocks(model, Replayer())}
    handle = layers[1].mlp.register_forward_hook(lambda *_: inner.append(1))
    for _ in range(2):
        for each, one in zip(inputs, wanted, strict=True):
            assert _equal(_outputs(kit, model, each), one)
    assert len(inner) == 6
    first, second = (layer.interlace_state.graph for layer in layers[:2])
    assert first.num_replays == 5
    assert second.num_replays == 0
    assert all(torch.equal(one, other) for one, other in zip(heard, 2 * plain, strict=True))
    handle.remove()
    assert _equal(_outputs(kit, model, inputs[0]), wanted[0])
    assert second.num_replays == 1
    assert id(second) in blocks


def test_only_passes_of_the_kind_are_recorded(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.build("clip").eval()
    il.fuse(model)
    blocks = record_blocks(model, Replayer())
    inputs = _inputs("clip", model, 0)
    for _ in range(3):
        model(**inputs)["logits_per_image"].sum().backward()
    model.train()
    for _ in range(3):
        _outputs(kit, model, inputs)
    model.eval()
    monkeypatch.setattr(block_graphs, "MOST_ROWS", 3)
    for _ in range(3):
        _outputs(kit, model, inputs)
    assert all(block.num_recordings == 0 for block in blocks)


def test_new_weights_and_few_shapes_are_kept(kit: Any) -> None:
    model, other = (kit.build("clip", seed=seed).eval() for seed in (0, 1))
    il.fuse(model)
    blocks = record_blocks(model, Replayer())
    inputs = _inputs("clip", model, 0)
    for _ in range(2):
        _outputs(kit, model, inputs)
    model.load_state_dict(other.state_dict(), assign=True)
    il.fuse(other)
    assert _equal(_outputs(kit, model, inputs), _outputs(kit, other, inputs))
    for rows in range(1, 8):
        batch = {
            key: value[:1].repeat(rows, *[1] * (value.dim() - 1)) for key, value in inputs.items()
        }
        for _ in range(3):
            assert _equal(_outputs(kit, model, batch), _outputs(kit, other, batch))
    assert {len(block._recordings) for block in blocks} == {4}


def test_what_cannot_be_recorded_runs_as_before(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Replayer):
        def record(self, step: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    model = kit.build("clip").eval()
    il.fuse(model)
    inputs = _inputs("clip", model, 0)
    wanted = _outputs(kit, model, inputs)
    blocks = record_blocks(model, Failing())
    for _ in range(4):
        assert _equal(_outputs(kit, model, inputs), wanted)
    assert "not permitted" in blocks[0]._shelf.reason
    assert len([each for each in caplog.records if "without CUDA graphs" in each.message]) == 1


def test_copies_record_for_themselves(kit: Any) -> None:
    model = kit.build("clip").eval()
    il.fuse(model)
    record_blocks(model, Replayer())
    inputs = _inputs("clip", model, 0)
    for _ in range(3):
        wanted = _outputs(kit, model, inputs)
    twin = copy.deepcopy(model)
    own = [each.interlace_state.graph for each in twin.vision_model.encoder.layers]
    assert [each.num_replays for each in own] == [0] * len(own)
    assert len({id(each._shelf) for each in own}) == 1
    for _ in range(3):
        assert _equal(_outputs(kit, twin, inputs), wanted)
