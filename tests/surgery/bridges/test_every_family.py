"""Bridges in every family and tower: where they go, what they leave alone, that they reload."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from tiny import TINY, tiny_inputs

from interlace.errors import PlanError
from interlace.models import VLM, family_of, open_model
from interlace.records import Bridge, Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path


# Nothing can be folded into experts, which Qwen3-VL has in all tiny text layers but 0 and 5.
BEHIND_PLAIN = (6,)
ONLY_EXPERTS = "qwen3_5_moe"


@functools.cache
def _dense(name: str) -> VLM:
    model = TINY[name]()
    return VLM(model, family_of(model), name=name)


def _data(vlm: VLM) -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(vlm.name, vlm.model, batch=4, seed=seed) for seed in range(2)]


def _plan(vlm: VLM, drop: dict[str, tuple[int, ...]], **tune: tuple[int, ...]) -> Plan:
    return Plan(
        {
            name: TowerPlan(vlm.towers[name].num_layers, drop=drop[name], tune=tune.get(name, ()))
            for name in drop
        }
    )


def _middle(vlm: VLM) -> dict[str, tuple[int, ...]]:
    """One or two layers of every tower, none of them pinned nor right behind a pinned one."""
    drop = {
        name: (2, 3) if tower.cross_attention_layers is not None else (4,)
        for name, tower in vlm.towers.items()
        if (vlm.name, name) != (ONLY_EXPERTS, "text")
    }
    return drop | ({"text": BEHIND_PLAIN} if vlm.name == "qwen3_vl_moe" else {})


def _values(model: Any, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return [v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]


@pytest.mark.parametrize("kind", ["fold", "refit"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_weights_that_are_fitted_reach_every_tower_and_reload_in_plain_transformers(
    name: str, kind: str, tmp_path: Path
) -> None:
    vlm = _dense(name)
    data = _data(vlm)
    before, outputs = vlm.fingerprint, _values(vlm.model, data[0])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]
    drop = _middle(vlm)
    student = prune(vlm, _plan(vlm, drop), bridges=kind, data=data)
    assert vlm.fingerprint == before
    assert all(map(torch.equal, _values(vlm.model, data[0]), outputs))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()]
    assert {bridge.tower for bridge in student.record.bridges} == set(drop)
    for bridge in student.record.bridges:
        if bridge.kind != "none":
            assert bridge.error_after < bridge.error_before
        elif bridge.dropped:
            assert any(bridge.note in note for note in student.record.notes)
    behind = {
        tower: [layer for layer in student.towers[tower].original if layer > max(gone)]
        for tower, gone in drop.items()
    }
    for tower, gone in drop.items():
        found = [b for b in student.record.bridges if b.tower == tower]
        assert [b.dropped for b in found if b.dropped] == [gone]
        unread = vlm.towers[tower].unread
        expected = [each for each in behind[tower] if each not in unread] if kind == "refit" else []
        assert [b.after for b in found if not b.dropped] == expected
    # random weights leave little to learn, but a family that is fitted nowhere is a mistake
    assert any(bridge.kind != "none" for bridge in student.record.bridges)

    shared = {parameter.data_ptr() for parameter in vlm.model.parameters()}
    own = [n for n, p in student.model.named_parameters() if p.data_ptr() not in shared]
    places = {
        f"{vlm.towers[b.tower].path}.{student.towers[b.tower].position(b.after)}."
        for b in student.record.bridges
        if b.kind != "none"
    }
    assert {n for n in own if not n.startswith(tuple(places))} == set()
    # a norm behind the projection is fitted with it
    owners = {n.rpartition(".")[0] for n in own}
    assert len({n for n in owners if "norm" not in n}) <= len(places) <= len(owners)
    assert not any(parameter.requires_grad for parameter in student.model.parameters())

    student.model.save_pretrained(tmp_path)
    plain = type(vlm.model).from_pretrained(tmp_path).eval().requires_grad_(False)
    expected = _values(student.model, data[1])
    assert all(map(torch.equal, _values(plain, data[1]), expected))


REFUSED = {("blip2_t5", "qformer"), ("llava", "vision")}
PRE_NORM = ("siglip", "qwen3_vl", "qwen2_5_vl", "llava", "blip2_t5")


@pytest.mark.parametrize("name", PRE_NORM)
def test_scale_in_pre_norm_towers(name: str) -> None:
    vlm = _dense(name)
    data = _data(vlm)
    # LLaVA's vision tower and the Q-Former are refused below
    towers = [tower for tower in vlm.towers if (name, tower) not in REFUSED]
    drop = dict.fromkeys(towers, (4,))
    before = vlm.fingerprint
    raw = prune(vlm, _plan(vlm, drop))
    student = prune(vlm, _plan(vlm, drop), bridges="scale", data=data)
    assert vlm.fingerprint == before
    assert [bridge.kind for bridge in student.record.bridges] == ["scale"] * len(towers)
    for bridge in student.record.bridges:
        factor, tower = bridge.settings["factor"], student.towers[bridge.tower]
        behind = tower.position(bridge.dropped[0] + 1)
        for position, layer in enumerate(tower.layers):
            plain = raw.towers[bridge.tower].layers[position].state_dict()
            changed = [k for k, v in layer.state_dict().items() if not torch.equal(v, plain[k])]
            assert bool(changed) == (position >= behind)
            for key in changed:
                restored = layer.state_dict()[key] * factor
                assert torch.allclose(restored, plain[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "tower", "words"),
    [
        ("blip_caption", "text", "does not hand its input on"),
        ("blip2_opt", "qformer", "does not hand its input on"),
        ("llava", "vision", "reads the stream without a norm"),
        ("qwen3_vl", "text", "DeepStack does"),
    ],
)
def test_scale_is_refused_in_words_where_it_cannot_be_folded(
    name: str, tower: str, words: str
) -> None:
    vlm = _dense(name)
    before = vlm.fingerprint
    # the feature that DeepStack adds after text layer 1 comes behind a cut of layer 0
    drop = {"qformer": (2, 3), "vision": (3,), "text": (0,) if name == "qwen3_vl" else (3,)}
    with pytest.raises(PlanError, match=words):
        prune(
            vlm,
            _plan(vlm, {tower: drop[tower]}),
            bridges="scale",
            data=_data(vlm),
            allow_pinned=True,
        )
    assert vlm.fingerprint == before


def test_a_vision_layer_that_deepstack_reads_is_not_folded_into() -> None:
    vlm = _dense("qwen3_vl")
    student = prune(vlm, _plan(vlm, {"vision": (2, 5)}), bridges="fold", data=_data(vlm))
    tapped, last = student.record.bridges
    assert (tapped.kind, tapped.after) == ("none", 1)
    assert "also read by another part" in tapped.note
    assert (last.kind, last.after) == ("fold", 4)


def test_a_vision_layer_that_a_list_of_feature_layers_names_is_not_folded_into() -> None:
    model = tiny.llava(text=3, vision=6, feature_layer=[2, -2])
    vlm = VLM(model, family_of(model), name="llava")
    # hidden state 2 is what layer 1 gives
    student = prune(vlm, _plan(vlm, {"vision": (2,)}), bridges="fold", data=_data(vlm))
    assert [bridge.kind for bridge in student.record.bridges] == ["none"]
    assert "also read by another part" in student.record.notes[0]
    student = prune(vlm, _plan(vlm, {"vision": (3,)}), bridges="fold", data=_data(vlm))
    assert [bridge.kind for bridge in student.record.bridges] == ["fold"]


def test_fold_behind_the_last_deepstack_add_counts_what_is_added() -> None:
    """The state behind the gap holds the feature; what is folded must not hold it twice."""
    vlm = _dense("qwen3_vl")
    student = prune(vlm, _plan(vlm, {"text": (2,)}), bridges="fold", data=_data(vlm))
    (bridge,) = student.record.bridges
    assert (bridge.kind, bridge.after) == ("fold", 1)
    assert bridge.error_after < bridge.error_before


def test_layers_that_nothing_reads_need_no_bridge() -> None:
    vlm = _dense("llava")
    # the state before layer 5 is read
    student = prune(vlm, _plan(vlm, {"vision": (5,)}), bridges="fold", data=_data(vlm))
    assert student.record.bridges == ()
    assert "vision layers 5 are read by nothing" in student.record.notes[-1]
    student = prune(
        vlm, _plan(vlm, {"vision": (4, 5)}), bridges="fold", data=_data(vlm), allow_pinned=True
    )
    (bridge,) = student.record.bridges
    assert bridge.dropped == (4,)


def test_a_tuned_layer_stays_tuned_and_the_manifest_comes_back(tmp_path: Path) -> None:
    model = tiny.clip(text=5, vision=3)
    vlm = VLM(model, family_of(model), name="clip")
    plan = _plan(vlm, {"text": (2,)}, text=(1,))
    student = prune(vlm, plan, bridges="fold", data=_data(vlm))
    trained = {n for n, p in student.model.named_parameters() if p.requires_grad}
    path = f"{vlm.towers['text'].path}.1."
    assert trained == {n for n, _ in student.model.named_parameters() if n.startswith(path)}
    student.model.save_pretrained(tmp_path)
    student.record.save(tmp_path / "interlace.json")
    again = open_model(tmp_path)
    assert again.record == student.record
    assert again.record.standard
    assert isinstance(again.record.bridges[0], Bridge)
    # a student may be cut and bridged again
    twice = prune(again, Plan({"text": TowerPlan(5, drop=(3,))}), bridges="fold", data=_data(vlm))
    assert [b.dropped for b in twice.record.bridges] == [(2,), (3,)]


def test_experts_are_not_folded_into() -> None:
    vlm = _dense("qwen3_vl_moe")
    with pytest.raises(PlanError, match=r"Qwen3VLMoeTextDecoderLayer\) adds what experts make"):
        prune(vlm, _plan(vlm, {"text": (4,)}), bridges="fold", data=_data(vlm))
    student = prune(vlm, _plan(vlm, {"text": (6,)}), bridges="refit", data=_data(vlm))
    cut, behind = student.record.bridges
    assert (cut.kind, cut.after) == ("fold", 5)
    assert (behind.kind, behind.after) == ("none", 7)
    assert "adds what experts make" in behind.note
