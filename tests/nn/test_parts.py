"""Fused students that lack attention or the feed-forward part of single layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorders import Replayer
from tiny import TINY

import interlace as il
from interlace.models import VLM, family_of
from interlace.nn import graphs
from interlace.nn.blocks import FusedBlock
from interlace.nn.recording import text_decoders
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune


def without_parts(name: str) -> Any:
    """A student without the attention of one layer and the feed-forward part of another."""
    model = TINY[name]()
    vlm = VLM(model, family_of(model), name=name)
    towers = {}
    for tower, shape in vlm.shape().towers.items():
        parts = {n: (2,) for n, site in shape.sites.items() if site.kind == "ffn"}
        own = (n for n, site in shape.sites.items() if site.kind == "heads" and not site.cross)
        # layer 2 of the text tower lacks both
        parts[next(own)] = (0, 2) if tower == "text" else (1,)
        if name == "blip2_t5":
            parts = dict.fromkeys(parts, (2,))
        towers[tower] = TowerPlan(shape.num_layers, parts=parts)
    return prune(vlm, Plan(towers, standard=False)).model


@pytest.mark.parametrize(
    "name", ["blip2_opt", "blip2_t5", "blip_caption", "clip", "llava", "qwen2_5_vl", "qwen3_vl"]
)
def test_fused_students_compute_what_they_did(name: str, kit: Any, route: Any) -> None:
    report = kit.fused(name, without_parts(name), route)
    absent = [each for each in report.entries if each.part == "absent"]
    assert absent
    assert all("taken out" in each.reason for each in absent)


def test_norms_before_parts_that_are_gone_do_not_run(kit: Any) -> None:
    model = without_parts("qwen3_vl")
    inputs = kit.inputs("qwen3_vl", model)
    il.fuse(model)
    blocks = [m for m in model.model.language_model.layers if isinstance(m, FusedBlock)]
    assert len(blocks) == 8
    ran: list[str] = []
    for number, place in ((0, "input_layernorm"), (2, "post_attention_layernorm"), (3, "mlp")):
        module = getattr(blocks[number], place)
        module.register_forward_hook(lambda *_, where=f"{number} {place}": ran.append(where))
    kit.forward(model, inputs)
    assert ran == ["3 mlp"]
    heard: list[str] = []
    blocks[0].self_attn.register_forward_hook(lambda *_: heard.append("attention"))
    kit.forward(model, inputs)
    assert heard == ["attention"]
    assert ran == ["3 mlp", "0 input_layernorm", "3 mlp"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_steps_of_students_without_some_attentions_are_recorded(name: str, kit: Any) -> None:
    model = without_parts(name)
    plain = kit.generate(model, name, cache_implementation="static")
    il.fuse(model)
    forward = graphs.install(model, text_decoders(model), Replayer())[0]
    for text in (1, 2):
        # the second text gets another cache, in the memory of the first
        assert torch.equal(kit.generate(model, name, cache_implementation="static"), plain)
        assert (forward.num_recordings, forward.num_replays) == (1, 5 * text)
