"""Grafted heads compute what they did, beside those of the layer that takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from tiny import TINY, generation_inputs, tiny_inputs

from interlace.errors import PlanError
from interlace.export import export
from interlace.models import VLM, family_of, open_model
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path

GIVER, TAKER = 3, 4


def opened(name: str, **settings: Any) -> VLM:
    model = TINY[name](**settings)
    return VLM(model, family_of(model), name=name)


def grafting(vlm: VLM, tower: str, groups: tuple[int, ...], **more: Any) -> Plan:
    return Plan(
        {
            tower: TowerPlan(
                vlm.towers[tower].num_layers,
                drop=(GIVER,),
                tune=(TAKER,),
                graft={TAKER: {GIVER: groups}},
                **more,
            )
        },
        standard=False,
    )


def run_attention(vlm: VLM, tower: str, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """What the attention of a layer adds to a hidden state [B, T, D], causal where it is."""
    block: Any = vlm.towers[tower].layers[vlm.towers[tower].position(layer)]
    norm = block.input_layernorm if hasattr(block, "input_layernorm") else block.layer_norm1
    extra: dict[str, Any] = {}
    if hasattr(block, "input_layernorm"):
        places = torch.arange(hidden.shape[1])[None]
        rotary = vlm.model.get_submodule("model.language_model.rotary_emb")
        extra["position_embeddings"] = rotary(hidden, places)
    with torch.no_grad():
        found: torch.Tensor = block.self_attn(norm(hidden), attention_mask=None, **extra)[0]
    return found


@pytest.mark.parametrize(
    ("name", "tower"), [("llava", "text"), ("clip", "text"), ("clip", "vision")]
)
def test_a_layer_with_all_grafted_heads_is_the_sum_of_both(name: str, tower: str) -> None:
    vlm = opened(name)
    count = 2 if name == "llava" else 4
    student = prune(vlm, grafting(vlm, tower, tuple(range(count))))
    hidden = torch.randn(2, 5, 32)
    apart = [run_attention(vlm, tower, layer, hidden) for layer in (GIVER, TAKER)]
    found = run_attention(student, tower, TAKER, hidden)
    torch.testing.assert_close(found, sum(apart), rtol=1e-5, atol=1e-5)
    assert student.num_parameters() == vlm.shape().after(student.plan.towers).total_parameters


def scaled_down(factor: float) -> VLM:
    """A LLaVA whose two layers add little, the first one by its attention alone."""
    vlm = opened("llava")
    layers: Any = vlm.towers["text"].layers
    with torch.no_grad():
        layers[GIVER].mlp.down_proj.weight.zero_()
        for layer in (GIVER, TAKER):
            layers[layer].self_attn.o_proj.weight.mul_(factor)
    return vlm


def test_grafting_all_heads_of_a_layer_without_mlp_differs_in_second_order_only() -> None:
    inputs = tiny_inputs("llava", opened("llava").model)
    errors, effects = [], []
    for factor in (1e-2, 5e-3):
        vlm = scaled_down(factor)
        grafted = prune(vlm, grafting(vlm, "text", (0, 1)))
        without = prune(vlm, Plan({"text": TowerPlan(8, drop=(GIVER,))}))
        states = [_states(each, inputs) for each in (vlm, grafted, without)]
        errors.append(float((states[1] - states[0]).norm()))
        effects.append(float((states[2] - states[0]).norm()))
    # halving what the layers add halves what a cut loses, and quarters what grafting loses
    assert errors[0] < 0.05 * effects[0]
    assert 1.9 < effects[0] / effects[1] < 2.1
    assert 3.5 < errors[0] / errors[1] < 4.5


def _states(vlm: VLM, inputs: Any) -> torch.Tensor:
    """The input of layer TAKER + 1 less what the taker's own MLP adds, in double precision."""
    vlm.model.double()
    position = vlm.towers["text"].position(TAKER)
    seen: list[torch.Tensor] = []
    block: Any = vlm.towers["text"].layers[position].post_attention_layernorm
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    moved = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        vlm.model(**moved)
    handle.remove()
    return seen[0]


def test_grafted_students_reload_bit_equal_and_decode(tmp_path: Path) -> None:
    vlm = opened("llava")
    cut = {"self_attn": {TAKER: (1,)}, "mlp": {0: (5, 6)}}
    before = vlm.fingerprint
    student = prune(vlm, grafting(vlm, "text", (1,), cut=cut))
    assert vlm.fingerprint == before
    attention: Any = student.towers["text"].layers[3].self_attn
    assert attention.kv_map == (0, 1, 1, 2, 2)
    assert student.num_parameters() == vlm.shape().after(student.plan.towers).total_parameters
    folder = export(student, tmp_path / "out")
    again = open_model(folder)
    inputs = tiny_inputs("llava", vlm.model)
    student.model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, student.model(**inputs).logits)
    prompt = generation_inputs("llava", vlm.model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached = again.model.generate(**prompt, **settings, use_cache=True)
    assert torch.equal(cached, again.model.generate(**prompt, **settings, use_cache=False))


def test_head_norms_must_have_equal_gains() -> None:
    vlm = opened("qwen3_vl")
    with pytest.raises(PlanError, match="passes one q_norm, whose gains differ"):
        prune(vlm, grafting(vlm, "text", (0,)))
    layers: Any = vlm.towers["text"].layers
    with torch.no_grad():
        for name in ("q_norm", "k_norm"):
            source = getattr(layers[TAKER].self_attn, name).weight
            getattr(layers[GIVER].self_attn, name).weight.copy_(source)
    student = prune(vlm, grafting(vlm, "text", (0, 1)))
    assert student.record.widths["text"][TAKER]["self_attn"] == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("name", "tower", "words"),
    [
        ("blip_caption", "text", "exactly one attention"),
        ("llava", "text", "gains of zero"),
        ("qwen2_vl", "text", "differ in layer_type"),
    ],
)
def test_what_cannot_be_grafted_is_refused_in_words(name: str, tower: str, words: str) -> None:
    vlm = opened(name, **({"window": 4} if name == "qwen2_vl" else {}))
    if name == "llava":
        layers: Any = vlm.towers["text"].layers
        with torch.no_grad():
            layers[TAKER].input_layernorm.weight[3] = 0
    with pytest.raises(PlanError, match=words):
        prune(vlm, grafting(vlm, tower, (0,)))


def test_a_standard_plan_may_not_graft() -> None:
    model = tiny.clip()
    vlm = VLM(model, family_of(model))
    graft = {TAKER: {GIVER: (0,)}}
    plan = Plan({"text": TowerPlan(6, drop=(GIVER,), graft=graft)})
    with pytest.raises(PlanError, match="standard=False"):
        prune(vlm, plan)
