"""Recorded decoding, with a recorder for the CPU that keeps to the rules of CUDA graphs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorders import Replayer
from tiny import generation_inputs
from transformers import StaticCache

import interlace as il
from interlace.errors import ConfigError
from interlace.nn import graphs, masks
from interlace.nn.blocks import FusedBlock
from interlace.nn.cache_memory import CACHE
from interlace.nn.recording import record_blocks, text_decoders
from interlace.ops import _overlap

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class Failing(Replayer):
    def record(self, step: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")


def _recorded(model: Any, recorder: Any = None) -> Any:
    il.fuse(model)
    decoders = text_decoders(model)
    assert len(decoders) == 1
    return graphs.install(model, decoders, recorder or Replayer())[0]


@pytest.mark.parametrize("kind", ["dense", "ragged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_recording_serves_a_whole_text(name: str, kind: str, kit: Any) -> None:
    model, stock = kit.variant(name, kind)
    plain = kit.generate(stock, name, cache_implementation="static")
    forward = _recorded(model)
    assert torch.equal(kit.generate(model, name, cache_implementation="static"), plain)
    # the first of six tokens comes from the prompt
    assert (forward.num_recordings, forward.num_replays) == (1, 5)
    # a dynamic cache grows, so nothing is recorded
    assert torch.equal(kit.generate(model, name), plain)
    assert (forward.num_recordings, forward.num_replays) == (1, 5)
    # another cache, in the memory of the first
    assert torch.equal(kit.generate(model, name, cache_implementation="static"), plain)
    assert (forward.num_recordings, forward.num_replays) == (1, 10)
    assert forward.reason == ""
    il.unfuse(model)
    assert "forward" not in vars(text_decoders(model) or model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert "_valid_auto_compile_criteria" not in vars(model)


def test_a_cache_is_used_again_and_new_weights_are_seen(kit: Any) -> None:
    model = kit.build("llava")
    twin = copy.deepcopy(model)
    forward = _recorded(model)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    # the static cache that generate makes is as long as the text
    tokens = kit.generate(twin, "llava")
    for expected in (1, 1):
        cache.reset()
        assert torch.equal(kit.generate(model, "llava", **{CACHE: cache}), tokens)
        assert forward.num_recordings == expected
    other = kit.build("llava", seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    cache.reset()
    tokens = kit.generate(other, "llava")
    assert torch.equal(kit.generate(model, "llava", **{CACHE: cache}), tokens)
    assert forward.num_recordings == 2


def test_masks_of_a_text_are_made_once(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.build("qwen3_vl")
    plain = kit.generate(model, "qwen3_vl", cache_implementation="static")
    forward = _recorded(model)
    made, stock = [], masks.sdpa_mask
    monkeypatch.setattr(masks, "sdpa_mask", lambda **args: made.append(args) or stock(**args))
    for text in (1, 2):
        assert torch.equal(kit.generate(model, "qwen3_vl", cache_implementation="static"), plain)
        # of the prompt and of the first step; the others follow from that
        assert len(made) == 2 * text
        assert forward.num_replays == 5 * text


def test_a_mask_of_the_callers_own_is_heeded(kit: Any) -> None:
    model = kit.build("llava")
    forward = _recorded(model)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    tokens = kit.generate(model, "llava", **{CACHE: cache})
    assert forward.num_replays == 5
    ones = torch.ones_like(tokens)
    holes = ones.clone()
    holes[:, 3] = 0
    for mask in (ones, holes):
        inputs = model.prepare_inputs_for_generation(
            tokens, next_sequence_length=1, **{CACHE: cache}, attention_mask=mask
        )
        visible = inputs["attention_mask"][:, 0, 0, : tokens.shape[1]]
        assert torch.equal(visible, mask.bool())


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_beams_decode_without_a_recording(name: str, kit: Any) -> None:
    model = kit.build(name)
    # long enough for beams to change places
    settings = {"num_beams": 3, "max_new_tokens": 16, "cache_implementation": "static"}
    plain = kit.generate(model, name, **settings)
    tokens = kit.generate(model, name, cache_implementation="static")
    forward = _recorded(model)
    for _ in range(2):
        assert torch.equal(kit.generate(model, name, **settings), plain)
    # every reordering gives a cache other memory
    assert (forward.num_recordings, forward.num_replays) == (0, 0)
    assert torch.equal(kit.generate(model, name, cache_implementation="static"), tokens)
    assert (forward.num_recordings, forward.num_replays) == (1, 5)


def test_a_copied_cache_that_is_reordered_is_read_where_it_went(kit: Any) -> None:
    model = kit.build("llava")
    twin = copy.deepcopy(model)
    forward = _recorded(model)
    found = []
    for each in (twin, model):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        tokens = kit.generate(each, "llava", **{CACHE: cache})
        padding = generation_inputs("llava", model)["attention_mask"]
        mask = torch.ones_like(tokens)
        mask[:, : padding.shape[1]] = padding
        # nothing of the decoder filled it
        cache = copy.deepcopy(cache)
        for _ in range(2):
            step = each.prepare_inputs_for_generation(
                tokens, next_sequence_length=1, **{CACHE: cache}, attention_mask=mask
            )
            with torch.no_grad():
                logits = each(**step).logits
            cache.reorder_cache(torch.tensor([1, 0]))
            tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), 1).flip(0)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1).flip(0)
        found.append(logits)
    torch.testing.assert_close(*found)
    assert (forward.num_recordings, forward.num_replays) == (2, 6)


def test_what_is_not_recorded_runs_as_before(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = kit.build("llava")
    plain = kit.generate(model, "llava", cache_implementation="static")
    forward = _recorded(model, Failing())
    for _ in range(2):
        assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), plain)
    assert "not permitted" in forward.reason
    assert len([r for r in caplog.records if "without CUDA graphs" in r.message]) == 1
    il.unfuse(model)
    forward = _recorded(model)
    heard = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), plain)
    assert len(heard) == 6
    assert forward.num_recordings == 0


class _Elsewhere(Replayer):
    """Stands for a graph, which captures nothing of another device and so replays nothing."""

    device = torch.device("cuda:0")

    def record(self, step: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
        return (lambda: None), step()


def test_a_model_that_was_moved_runs_without_graphs(kit: Any) -> None:
    model = kit.build("llava")
    plain = kit.generate(model, "llava", cache_implementation="static")
    forward = _recorded(model, _Elsewhere())
    blocks = record_blocks(model, _Elsewhere())
    for _ in range(3):
        assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), plain)
    assert [each.num_recordings for each in (forward, *blocks)] == [0] * (1 + len(blocks))


def test_copies_record_for_themselves(kit: Any) -> None:
    model = kit.build("llava")
    plain = kit.generate(model, "llava", cache_implementation="static")
    forward = _recorded(model)
    twin = copy.deepcopy(model)
    assert torch.equal(kit.generate(twin, "llava", cache_implementation="static"), plain)
    assert forward.num_replays == 0


def test_graphs_are_of_a_gpu(kit: Any) -> None:
    model = kit.build("llava")
    with pytest.raises(ConfigError, match="needs a model on a GPU"):
        il.fuse(model, graphs=True)
    report = il.fuse(model)
    found = [entry for entry in report.entries if entry.part == "graphs"]
    # the text decoder, and the blocks of the vision tower
    assert {entry.kind for entry in found} == {"LlamaModel", "CLIPEncoder"}
    assert not any(entry.fused for entry in found)
    assert all("GPU only" in entry.reason for entry in found)


def test_graphs_need_attention_and_norms(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.build("clip")
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    for part in ("attention", "norms"):
        with pytest.raises(ConfigError, match="attention and norms fused too"):
            il.fuse(model, graphs=True, **{part: False})


@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("clip", {"text_model.encoder", "vision_model.encoder"}),
        ("blip2_opt", {"vision_model.encoder"}),
    ],
)
def test_the_report_names_recorded_blocks(name: str, owners: set[str], kit: Any) -> None:
    for options in ({}, {"graphs": False}, {"norms": False}):
        report = il.fuse(model := kit.build(name), **options)
        found = {entry.module for entry in report.entries if entry.part == "graphs"}
        assert found == (owners if options != {"norms": False} else set())
        il.unfuse(model)


def test_a_forward_replaced_between_texts_is_heeded(kit: Any) -> None:
    model = kit.build("llava")
    plain = kit.generate(model, "llava", cache_implementation="static")
    forward = _recorded(model)
    assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), plain)
    layer, heard = model.model.language_model.layers[1].mlp, []
    stock = layer.forward
    layer.forward = lambda x: heard.append(1) or stock(x)
    assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), plain)
    assert len(heard) == 6
    assert forward.num_replays == 5
    del layer.forward
    assert torch.equal(kit.generate(model, "llava", cache_implementation="static"), plain)
    assert forward.num_replays == 10


class _Switched(torch.nn.Module):
    """A projection with another beside it that may be left out, as adapters are."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.active = ["first"]
        self.beside = torch.nn.ModuleDict({"first": copy.deepcopy(base)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + sum(self.beside[name](x) for name in self.active)


def test_adapters_switched_between_texts_are_heeded(kit: Any) -> None:
    model = kit.build("llava")
    layer = model.model.language_model.layers[1].self_attn
    layer.o_proj = _Switched(layer.o_proj)
    forward = _recorded(model)
    blocks = record_blocks(model, Replayer())
    tokens = []
    for names in (["first"], [], ["first"]):
        layer.o_proj.active = names
        made = forward.num_recordings
        for _ in range(3):
            found = kit.generate(model, "llava", cache_implementation="static")
        assert forward.num_recordings == made + 1
        tokens.append(found)
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    # not in front of the switch
    recorded = [block.num_recordings for block in blocks]
    assert max(recorded) > min(recorded) == 1


@pytest.mark.parametrize(("graphs", "why"), [("auto", "on a GPU only"), (False, "graphs=False")])
def test_kernels_overlap_in_recorded_steps_only(graphs: Any, why: str, kit: Any) -> None:
    report = il.fuse(kit.build("llava"), graphs=graphs, overlap=True)
    [entry] = [entry for entry in report.entries if entry.part == "overlap"]
    assert not entry.fused
    assert entry.reason.startswith("no steps are recorded: ")
    assert why in entry.reason


def test_kernels_overlap_on_hopper_or_later(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "Hopper" in _overlap.obstacle.__wrapped__(torch.device("cuda"))
    capability = (9, 0)
    assert not _overlap.obstacle.__wrapped__(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["dense", "pruned", "ragged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_graphs_give_the_same_tokens(name: str, kind: str, overlap: bool, kit: Any) -> None:
    model, stock = kit.variant(name, kind)
    plain = kit.generate(stock.cuda(), name)
    model = model.cuda()
    report = il.fuse(model, overlap=overlap)
    recorded = [entry for entry in report.entries if entry.part == "graphs"]
    assert all(entry.fused for entry in recorded)
    assert len([entry for entry in recorded if "steps" in entry.backend]) == 1
    assert {each.fused for each in report.entries if each.part == "overlap"} <= {
        torch.cuda.get_device_capability() >= (9, 0)
    }
    assert torch.equal(kit.generate(model, name), plain)
    for _ in range(4):
        assert torch.equal(kit.generate(model, name, cache_implementation="static"), plain)
    [decoder] = text_decoders(model)
    forward = vars(decoder)["forward"]
    assert (forward.reason, forward.num_recordings, forward.num_replays) == ("", 1, 20)
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    graphs_of = [block.interlace_state.graph for block in blocks]
    assert {graph._shelf.reason for graph in graphs_of} == {""}
    assert min(graph.num_replays for graph in graphs_of) >= 1
