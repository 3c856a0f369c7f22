"""Attention or the feed-forward part taken out of single layers, on every family."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import GENERATIVE, TINY, generation_inputs, tiny_inputs

from interlace.errors import PlanError
from interlace.export import export, model_card
from interlace.models import VLM, family_of
from interlace.models.parts import is_absent
from interlace.models.sites import find_sites
from interlace.nn import fuse
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# one with a cache of its own attention, one with two
BEAMS = ("llava", "blip_caption")


def places(vlm: VLM, tower: str) -> tuple[str, str]:
    """The names of the self-attention and of the feed-forward part; "" where it is no site."""
    sites = vlm.shape().towers[tower].sites
    attention = [n for n, site in sites.items() if site.kind == "heads" and not site.cross]
    ffn = [n for n, site in sites.items() if site.kind == "ffn"]
    return (attention or [""])[0], (ffn or [""])[0]


def having(vlm: VLM, tower: str, place: str, first: int) -> int:
    """The first layer from `first` on that has a place; some are recurrent, or have experts."""
    groups = vlm.shape().towers[tower].sites[place].groups
    return next(layer for layer in range(first, len(groups)) if groups[layer])


def both(vlm: VLM, *, first: int = 0, drop: bool = False, tune: bool = False) -> Plan:
    """Attention taken out of layer `first`, the feed-forward part out of layer 2, in all towers."""
    towers = {}
    for name, tower in vlm.towers.items():
        attention, ffn = places(vlm, name)
        gone = {ffn: (having(vlm, name, ffn, 2),)} if ffn else {}
        if attention:
            # the first layer of T5 computes the position bias of all
            own = find_sites(tower.layers[0]).get(attention)
            start = 2 if own is not None and own.biased else first
            gone[attention] = (having(vlm, name, attention, start),)
        free = tower.cross_attention_layers is None and 1 not in tower.pinned
        towers[name] = TowerPlan(
            tower.num_layers,
            drop=(1,) if drop and free else (),
            tune=(2,) if tune else (),
            parts=gone,
        )
    return Plan(towers, standard=False)


@contextmanager
def zeroed(vlm: VLM, plan: Plan) -> Iterator[None]:
    """Let the output projections of the parts give zeros, their biases included."""
    with ExitStack() as stack:
        for name, tower in plan.towers.items():
            for place, layers in tower.parts.items():
                for layer in layers:
                    output = find_sites(vlm.towers[name].layers[layer])[place].output
                    hook = output.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
                    stack.callback(hook.remove)
        yield


def test_a_student_equals_the_model_with_zeroed_projections(dense: Any, kit: Any) -> None:
    vlm = dense.vlm
    plan = both(vlm)
    student = prune(vlm, plan)
    with zeroed(vlm, plan):
        expected = kit.outputs(vlm.model, dense.inputs)
    assert not kit.bit_equal(expected, dense.outputs)
    found = kit.outputs(student.model, dense.inputs)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    assert not student.record.standard
    shape = vlm.shape().after(plan.towers)
    assert student.num_parameters() == shape.total_parameters == student.record.parameters_after
    assert student.shape() == shape
    assert shape.total_parameters < vlm.num_parameters()
    assert vlm.fingerprint == dense.fingerprint
    assert kit.bit_equal(kit.outputs(vlm.model, dense.inputs), dense.outputs)


@pytest.mark.parametrize("name", sorted(TINY))
def test_students_reload_bit_equal_and_decode_with_a_cache(
    name: str, kit: Any, tmp_path: Path
) -> None:
    dense = kit.opened(name)
    student = prune(dense.vlm, both(dense.vlm, drop=True, tune=True))
    folder = export(student, tmp_path / "out", verify=False)
    again = kit.reopened(name, folder, student)
    # stock transformers must not load it as if it were whole
    with pytest.raises(Exception, match=r"per-layer attribute|size mismatch|mismatched"):
        type(student.model).from_pretrained(folder)
    if name not in GENERATIVE:
        return
    inputs = generation_inputs(name, dense.vlm.model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        plain = again.model.generate(**inputs, **settings, num_beams=1, use_cache=False)
        cached = again.model.generate(**inputs, **settings, num_beams=1)
        assert torch.equal(cached, plain)
        if name in BEAMS:
            beams = again.model.generate(**inputs, **settings, num_beams=2, use_cache=False)
            assert torch.equal(again.model.generate(**inputs, **settings, num_beams=2), beams)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "llava_onevision"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_static_cache_serves_what_is_left(name: str, first: int, kit: Any) -> None:
    dense = kit.opened(name)
    student = prune(dense.vlm, both(dense.vlm, first=first))
    tower = student.towers["text"]
    left: list[Any] = [layer.self_attn for i, layer in enumerate(tower.layers) if i != first]
    assert [attention.layer_idx for attention in left] == list(range(tower.num_layers - 1))
    inputs = generation_inputs(name, dense.vlm.model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        plain = student.model.generate(**inputs, **settings, use_cache=False)
        static = student.model.generate(**inputs, **settings, cache_implementation="static")
    assert torch.equal(static, plain)


def windowed() -> VLM:
    """A model in which every other layer, the first included, attends in a window."""
    model = TINY["llava_onevision"]()
    text = model.config.text_config
    count = text.num_hidden_layers
    text.use_sliding_window, text.sliding_window = True, 4
    text.layer_types = ["sliding_attention", "full_attention"] * (count // 2)
    text.layer_types += ["sliding_attention"] * (count % 2)
    weights = model.state_dict()
    model = type(model)(model.config).eval()
    model.load_state_dict(weights)
    return VLM(model, family_of(model))


@pytest.mark.parametrize("fused", [False, True])
def test_assisted_decoding_takes_tokens_back_from_every_place(fused: bool) -> None:
    vlm = windowed()
    count = vlm.towers["text"].num_layers
    student = prune(
        vlm, Plan({"text": TowerPlan(count, parts={"self_attn": (0,)})}, standard=False)
    )
    if fused:
        fuse(student)
    ids = torch.randint(5, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        plain = student.model.generate(ids, **settings, use_cache=False)
        assisted = student.model.generate(ids, **settings, assistant_model=vlm.model)
        assert torch.equal(assisted, plain)
        # another model is assisted by the student
        whole = vlm.model.generate(ids, **settings, use_cache=False)
        assisted = vlm.model.generate(ids, **settings, assistant_model=student.model)
        assert torch.equal(assisted, whole)


def test_places_in_the_cache_keep_their_window() -> None:
    vlm = windowed()
    model, count = vlm.model, vlm.towers["text"].num_layers
    plan = Plan({"text": TowerPlan(count, parts={"self_attn": (0, 1)})}, standard=False)
    student = prune(vlm, plan)
    places = [layer.self_attn.layer_idx for layer in student.towers["text"].layers]
    assert sorted(places) == list(range(count))
    assert places[2:4] == [0, 1]
    assert all(place % 2 == position % 2 for position, place in enumerate(places))
    inputs = generation_inputs("llava_onevision", model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        plain = student.model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(student.model.generate(**inputs, **settings), plain)
    every = tuple(range(0, count, 2))
    plan = Plan({"text": TowerPlan(count, parts={"self_attn": every})}, standard=False)
    with pytest.raises(PlanError, match="window of the first layer"):
        prune(vlm, plan)


def test_the_checkpoint_is_verified_and_its_card_says_what_is_gone(
    kit: Any, tmp_path: Path
) -> None:
    dense = kit.opened("qwen3_vl")
    folder = export(prune(dense.vlm, both(dense.vlm)), tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "NOT a standard transformers checkpoint" in card
    assert "largest difference of any output value 0 " in card
    assert "| 0 | self_attn | none (taken out) |" in card
    assert "| 2 | mlp | none (taken out) |" in card


@pytest.mark.parametrize(
    ("parts", "more", "words"),
    [
        ({"self_attn": (2,)}, {"standard": True}, "a standard checkpoint cannot state"),
        ({"self_atn": (2,)}, {}, "Did you mean 'self_attn'"),
        ({"self_attn": tuple(range(8))}, {}, "at least one such layer must keep it"),
        ({"self_attn": (3,)}, {"drop": (2,), "graft": {3: {2: (0,)}}}, "and takes that attention"),
    ],
)
def test_parts_that_cannot_go_are_refused_in_words(
    kit: Any, parts: Any, more: Any, words: str
) -> None:
    dense = kit.opened("qwen3_vl")
    standard = more.pop("standard", False) if isinstance(more, dict) else False
    plan = Plan({"text": TowerPlan(8, parts=parts, **more)}, standard=standard)
    with pytest.raises(PlanError, match=words):
        prune(dense.vlm, plan)
    assert dense.vlm.fingerprint == dense.fingerprint


def test_cross_attention_and_the_position_bias_of_t5_stay(kit: Any) -> None:
    caption, t5 = kit.opened("blip_caption").vlm, kit.opened("blip2_t5").vlm
    for vlm, place, words in [
        (caption, "crossattention", "cross-attention cannot be taken out alone"),
        (t5, "layer.0.SelfAttention", "relative position bias"),
    ]:
        count = vlm.towers["text"].num_layers
        plan = Plan({"text": TowerPlan(count, parts={place: (0,)})}, standard=False)
        with pytest.raises(PlanError, match=words):
            prune(vlm, plan)


def test_a_student_loses_more_parts_in_a_second_cut() -> None:
    model = TINY["qwen3_vl"]()
    vlm = VLM(model, family_of(model))
    inputs = tiny_inputs("qwen3_vl", model)

    def plan(**settings: Any) -> Plan:
        return Plan({"text": TowerPlan(8, **settings)}, standard=False)

    narrowed = prune(vlm, plan(cut={"self_attn": {0: (1,)}, "mlp": {3: (0, 1)}}))
    first = prune(narrowed, plan(parts={"self_attn": (0,), "mlp": (3,)}))
    assert is_absent(first.towers["text"].layers[0].self_attn)
    twice = prune(first, plan(drop=(5,), parts={"self_attn": (4,)}))
    once = prune(vlm, plan(drop=(5,), parts={"self_attn": (0, 4), "mlp": (3,)}))
    with torch.no_grad():
        assert torch.equal(twice.model(**inputs).logits, once.model(**inputs).logits)
    assert twice.record.widths == once.record.widths
    # a cut in depth alone numbers the attentions that are left anew, too
    third = prune(first, plan(drop=(5,)))
    numbers = [layer.self_attn.layer_idx for layer in third.towers["text"].layers]
    assert numbers == [6, *range(6)]
    with pytest.raises(PlanError, match="is gone already"):
        prune(first, plan(parts={"mlp": (3,)}))
    assert "# Qwen3VLForConditionalGeneration, narrowed" in model_card(first)


@pytest.mark.parametrize("bridge", ["fold", "scale"])
def test_bridges_go_around_what_is_gone(bridge: str, kit: Any) -> None:
    dense = kit.opened("llava")
    data = [tiny_inputs("llava", dense.vlm.model, batch=4, seed=seed) for seed in range(2)]
    count = dense.vlm.towers["text"].num_layers
    # the layer before the cut has attention alone, the one behind it the feed-forward part alone
    parts = {"self_attn": (4,), "mlp": (2,)}
    plan = Plan({"text": TowerPlan(count, drop=(3,), parts=parts)}, standard=False)
    student = prune(dense.vlm, plan, bridges=bridge, data=data)
    made, *others = student.record.bridges
    assert made.kind == bridge
    # the layer behind the cut is repaired as well, in place
    assert [(each.kind, each.after) for each in others] == [("refit", 4)] * (bridge == "fold")
    layers: Any = student.towers["text"].layers
    before: Any = dense.vlm.towers["text"].layers
    if bridge == "fold":
        assert made.error_after < made.error_before
        assert not torch.equal(layers[2].self_attn.o_proj.weight, before[2].self_attn.o_proj.weight)
    else:
        assert not torch.equal(layers[3].mlp.down_proj.weight, before[4].mlp.down_proj.weight)


def test_post_norm_layers_that_lost_a_part_are_repaired(kit: Any) -> None:
    dense = kit.opened("blip_caption")
    data = [tiny_inputs("blip_caption", dense.vlm.model, batch=4, seed=seed) for seed in range(2)]
    shape = dense.vlm.shape().towers["text"]
    (ffn,) = (name for name, site in shape.sites.items() if site.kind == "ffn")
    plan = Plan({"text": TowerPlan(shape.num_layers, drop=(3,), parts={ffn: (2,)})}, standard=False)
    student = prune(dense.vlm, plan, bridges="fold", data=data)
    (made,) = student.record.bridges
    # the sum with what attention gives passes two norms, one behind the other
    assert (made.kind, made.after) == ("fold", 2)
    assert made.error_after < 0.9 * made.error_before
