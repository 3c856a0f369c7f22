"""Recorded blocks, with a recorder for the CPU that keeps to the rules of CUDA graphs."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorders import Replayer
from tiny import TINY, tiny_inputs
from transformers import LlamaConfig, StaticCache

import interlace as il
from interlace.nn import block_graphs, graphs
from interlace.nn.cache_memory import CACHE, CacheMemory
from interlace.nn.recording import record_blocks, text_decoders

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATING = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


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
    # of InternVL only blocks of the text decoder are fused
    if blocks and name != "internvl":
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
        kept.append((found, found[CACHE].layers[1].keys.clone()))
    memory = [found[CACHE].layers[1].keys for found, _ in kept]
    assert len({each.data_ptr() for each in memory}) == 3
    assert all(torch.equal(now, then) for now, (_, then) in zip(memory, kept, strict=True))
    assert forward.num_recordings == 3
    lent = memory[-1].data_ptr()
    del found, kept, memory
    found = kit.generate(model, "llava", **options)
    assert found[CACHE].layers[1].keys.data_ptr() == lent
    assert torch.equal(found.sequences, plain.sequences)
    assert forward.num_recordings == 3


def test_two_threads_do_not_get_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    memory, like = CacheMemory(), torch.zeros(1)
    last, *caches = (StaticCache(config=config, max_cache_len=7) for _ in range(3))
    for layer in range(2):
        last.update(*torch.randn(2, 3, 4, 5, 8), layer)
    memory.keep(last)
    del last
    other = threading.Thread(target=lambda: memory.lend(caches[1], 3, like))
    stock = torch.Tensor.zero_

    def zero(tensor: torch.Tensor) -> torch.Tensor:
        # as where the GPU is asked for something
        if not other.ident:
            other.start()
            other.join(timeout=0.2)
        return stock(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", zero)
    memory.lend(caches[0], 3, like)
    other.join()
    assert [bool(cache.layers[0].is_initialized) for cache in caches] == [True, False]


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


@pytest.mark.parametrize("name", ["clip", "qwen3_vl"])
def test_hooks_behind_a_block_keep_what_they_heard(name: str, kit: Any) -> None:
    model = kit.build(name).eval()
    il.fuse(model)
    if name == "clip":
        layers = model.vision_model.encoder.layers
        listened = [layers[2], layers[4].layer_norm1]
    else:
        layers = model.model.visual.blocks
        listened = [layers[3], *model.model.visual.deepstack_merger_list]
    heard: list[torch.Tensor] = []

    def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        heard.append(args[0])

    for module in listened:
        module.register_forward_pre_hook(keep)
    inputs = [_inputs(name, model, seed) for seed in range(5)]
    for each in inputs:
        _outputs(kit, model, each)
    plain, heard[:] = [each.clone() for each in heard], []
    blocks = record_blocks(model, Replayer())
    for each in inputs:
        _outputs(kit, model, each)
    assert len(heard) == len(plain) >= 10
    assert all(torch.equal(one, other) for one, other in zip(heard, plain, strict=True))
    assert max(block.num_replays for block in blocks) >= 4


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_scores_keep_the_results_of_replaced_forwards(name: str, kit: Any) -> None:
    model = kit.build(name).eval()
    vlm = il.open_model(model)
    il.fuse(vlm)
    data = [_inputs(name, model, seed) for seed in range(3)]
    for each in data:
        each["labels"] = each["input_ids"].masked_fill(each["attention_mask"] == 0, -100)
    metrics = ("similarity", "relevance", "attention_relevance")
    wanted = il.score(vlm, data, metrics=metrics, towers=None, progress=False)
    blocks = record_blocks(model, Replayer())
    for _ in range(2):
        found = il.score(vlm, data, metrics=metrics, towers=None, progress=False)
        for tower, scores in wanted.towers.items():
            assert found.towers[tower].metrics == scores.metrics
    assert min(block.num_replays for block in blocks) > 0


def test_a_replaced_forward_is_heeded(kit: Any) -> None:
    model = kit.build("clip").eval()
    il.fuse(model)
    layers = model.vision_model.encoder.layers
    blocks = record_blocks(model, Replayer())
    inputs = [_inputs("clip", model, seed) for seed in range(3)]
    wanted = [_outputs(kit, model, each) for each in inputs]
    _outputs(kit, model, inputs[0])
    replays = [block.num_replays for block in blocks]
    vision = [layer.interlace_state.graph for layer in layers]
    # of a part, and of a block, which keeps what it is given and what it gives
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = layers[1].mlp.forward, layers[3].forward
    layers[1].mlp.forward = lambda x: own[0](x).mul(0)
    changed = [_outputs(kit, model, each) for each in inputs]
    assert not any(_equal(one, other) for one, other in zip(changed, wanted, strict=True))
    assert vision[1].num_replays == replays[blocks.index(vision[1])]
    del layers[1].mlp.forward

    def keeping(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept.append((hidden, own[1](hidden, *args, **kwargs)))
        return kept[-1][1]

    layers[3].forward = keeping
    found = [_outputs(kit, model, each) for each in inputs]
    assert all(_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len({id(each) for pair in kept for each in pair}) == 2 * len(inputs)
    assert len({each.data_ptr() for pair in kept for each in pair}) == 2 * len(inputs)
    del layers[3].forward
    assert _equal(_outputs(kit, model, inputs[0]), wanted[0])
    assert all(graph.num_replays > replays[blocks.index(graph)] for graph in vision)
    # the same weights in other hands
    before = vision[0].num_replays
    layers[0].mlp.activation_fn = torch.nn.ReLU()
    assert not _equal(_outputs(kit, model, inputs[0]), wanted[0])
    assert vision[0].num_replays == before


def test_tensors_of_inference_mode_are_taken_elsewhere(kit: Any) -> None:
    model = kit.build("llava").eval().model.language_model
    il.fuse(model)
    blocks = record_blocks(model, Replayer())
    with torch.inference_mode():
        embeds = torch.randn(2, 5, model.config.hidden_size)
        positions = torch.arange(5)[None].expand(2, -1).clone()
    with torch.no_grad():
        found = [
            model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
            for _ in range(4)
        ]
    assert all(torch.equal(each, found[0]) for each in found)
    assert min(block.num_replays for block in blocks) >= 2
    shelf = block_graphs.Shelf(Replayer())
    counted, uncounted = torch.zeros(2), embeds[0, 0]
    with torch.inference_mode():
        for source in (counted, uncounted):
            for value in (1.0, 2.0):
                place = shelf.place("x", source.fill_(value))
                assert torch.equal(place, source)


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


def test_a_thread_keeps_its_results_from_another(kit: Any) -> None:
    class Halting(Replayer):
        """Lets another thread run between two blocks."""

        def record(self, step: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
            stock, result = super().record(step)

            def replay() -> None:
                stock()
                if threading.current_thread() is first and not second.ident:
                    second.start()
                    second.join()

            return replay, result

    def work(place: int) -> None:
        found[place] = _outputs(kit, model, inputs[place])

    model = kit.build("clip").eval()
    il.fuse(model)
    inputs = [_inputs("clip", model, seed) for seed in range(2)]
    wanted = [_outputs(kit, model, each) for each in inputs]
    found: dict[int, Any] = {}
    blocks = record_blocks(model, Halting())
    first, second = (threading.Thread(target=work, args=(place,)) for place in range(2))
    for _ in range(2):
        _outputs(kit, model, inputs[0])
    before = blocks[0].num_replays
    first.start()
    first.join()
    assert all(_equal(found[place], wanted[place]) for place in range(2))
    assert blocks[0].num_replays == before + 1
    # the memory is free again
    work(1)
    assert blocks[0].num_replays == before + 2


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
    # all but the last hand their memory on
    assert [each._may_be_kept() for each in own] == [False] * (len(own) - 1) + [True]
    alone = copy.deepcopy(model.vision_model.encoder.layers[0])
    assert alone.interlace_state.graph._may_be_kept()
