"""Width surgery on every family: units are gone, the others compute what they did."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import GENERATIVE, TINY, generation_inputs, internvl, qwen3_vl, tiny_inputs
from transformers import AttentionInterface, AutoConfig

import interlace as il
from interlace.errors import BackendError, CheckpointError, PlanError
from interlace.export import export, model_card
from interlace.models import VLM, family_of, open_model
from interlace.models.attention import NAME
from interlace.models.sites import find_sites
from interlace.nn.swap import listened_to
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# what a stock config can state: heads beside a head_dim of its own, neurons that nothing shares
STANDARD_HEADS = (
    *("qwen3_vl", "qwen3_vl_moe", "llava", "llava_next", "llava_onevision", "internvl"),
    *("gemma3", "paligemma", "idefics3", "smolvlm", "mistral3"),
)
SHARED_NEURONS = {
    ("siglip", "vision"),
    ("siglip2", "vision"),
    ("blip_vqa", "text"),
    ("blip_vqa", "text_encoder"),
    ("blip2_t5", "text"),
    ("blip2_t5", "text_encoder"),
    ("qwen2_vl", "vision"),
    ("glm4v", "vision"),
}


def cuts(vlm: VLM, tower: str, kind: str, *, even: bool) -> dict[str, dict[int, tuple[int, ...]]]:
    """One KV group, or 16 neurons, of every layer; uneven: other numbers in every second one."""
    cut: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, site in vlm.shape().towers[tower].sites.items():
        if site.kind != kind:
            continue
        cut[name] = {}
        for layer, groups in enumerate(site.groups):
            if not groups:
                continue
            group = tuple(u for u, kv in enumerate(site.kv_of(layer)) if kv == layer % 2)
            neurons = tuple(range(layer, layer + 16 + (0 if even else layer % 2)))
            odd = not even and layer % 2 == 1
            heads = (1,) if odd and len(group) > 1 else (0, 2) if odd else group
            cut[name][layer] = heads if kind == "heads" else neurons
    return cut


@contextmanager
def silenced(vlm: VLM, tower: str, cut: Any) -> Iterator[None]:
    """Zero what the units give to their output projection."""
    with ExitStack() as stack:
        for name, layers in cut.items():
            for layer, units in layers.items():
                site = find_sites(vlm.towers[tower].layers[layer])[name]
                columns = [u * site.head_dim + i for u in units for i in range(site.head_dim)]

                def hook(_: Any, args: Any, columns: Any = columns) -> Any:
                    kept = args[0].clone()
                    kept[..., columns] = 0
                    return (kept,)

                stack.callback(site.output.register_forward_pre_hook(hook).remove)
        yield


def close(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kinds", "even"), [("heads", True), ("ffn", True), ("both", False)])
def test_what_is_left_equals_the_model_with_silenced_units(
    dense: Any, kit: Any, kinds: str, even: bool
) -> None:
    vlm = dense.vlm
    cut: dict[str, Any] = {}
    for tower in vlm.towers:
        for kind in ("heads", "ffn") if kinds == "both" else (kinds,):
            own = cuts(vlm, tower, kind, even=even)
            words = refusal(vlm.name, tower, kind, even=even)
            if words and own:
                with pytest.raises(PlanError, match=words):
                    prune(vlm, Plan({tower: plan_of(vlm, tower, own)}, standard=even))
            else:
                cut.setdefault(tower, {}).update(own)
    if cut:
        plan = Plan({tower: plan_of(vlm, tower, cut[tower]) for tower in cut}, standard=even)
        student = prune(vlm, plan)
        with ExitStack() as stack:
            for tower, own in cut.items():
                stack.enter_context(silenced(vlm, tower, own))
            expected = kit.outputs(vlm.model, dense.inputs)
        assert not kit.bit_equal(expected, dense.outputs)
        # recurrent layers make more of what was rounded; in fp64 nothing differs
        tolerance = 5e-4 if vlm.name.startswith("qwen3_5") else 2e-5
        close(kit.outputs(student.model, dense.inputs), expected, tolerance)
        assert student.record.standard == even
        assert bool(student.record.widths) == (not even)
        assert bool(student.record.config_changes) == even
        assert student.num_parameters() == vlm.shape().after(plan.towers).total_parameters
        assert student.shape() == vlm.shape().after(plan.towers) or even
    assert vlm.fingerprint == dense.fingerprint
    assert kit.bit_equal(kit.outputs(vlm.model, dense.inputs), dense.outputs)


def plan_of(vlm: VLM, tower: str, cut: Any) -> TowerPlan:
    return TowerPlan(vlm.towers[tower].num_layers, cut=cut)


def refusal(name: str, tower: str, kind: str, *, even: bool) -> str:
    """What the refusal of a cut says; empty where it is carried out."""
    if kind == "heads" and name == "blip2_t5" and tower.startswith("text"):
        return "relative position bias"
    states = tower == "text" and name in STANDARD_HEADS
    states = states if kind == "heads" else (name, tower) not in SHARED_NEURONS
    # in the words of the command line too
    return "cannot state.* --spread global" if even and not states else ""


def test_heads_that_are_normed_together_are_left_whole() -> None:
    model = internvl(vision=2, use_qk_norm=True)
    layer = VLM(model, family_of(model)).towers["vision"].layers[0]
    assert list(find_sites(layer)) == ["mlp"]


def uneven(vlm: VLM) -> Plan:
    """Layer 1 dropped where it may go, the others narrowed in heads and neurons, layer 2 tuned."""
    towers = {}
    for name, tower in vlm.towers.items():
        free = tower.cross_attention_layers is None and 1 not in tower.pinned
        drop = (1,) if free else ()
        biased = "T5" in type(tower.layers[0]).__name__
        cut = cuts(vlm, name, "ffn", even=False)
        cut |= {} if biased else cuts(vlm, name, "heads", even=False)
        kept = {
            site: {layer: units for layer, units in layers.items() if layer not in drop}
            for site, layers in cut.items()
        }
        towers[name] = TowerPlan(tower.num_layers, drop=drop, tune=(2,), cut=kept)
    return Plan(towers, standard=False)


@pytest.mark.parametrize("name", sorted(TINY))
def test_uneven_widths_reload_bit_equal_and_decode_with_a_cache(
    name: str, kit: Any, tmp_path: Path
) -> None:
    dense = kit.opened(name)
    student = prune(dense.vlm, uneven(dense.vlm))
    tuned = [p for p in student.model.parameters() if p.requires_grad]
    prefixes = tuple(f"{t.path}.{t.position(2)}." for t in student.towers.values())
    for key, parameter in student.model.named_parameters():
        assert parameter.requires_grad == key.startswith(prefixes), key
    assert tuned
    folder = export(student, tmp_path / "out", verify=False)
    # tokenizers are found by it
    assert type(AutoConfig.from_pretrained(folder)) is type(student.model.config)
    again = kit.reopened(name, folder, student)
    if name not in GENERATIVE:
        return
    inputs = generation_inputs(name, dense.vlm.model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        cached = again.model.generate(**inputs, **settings, use_cache=True)
        plain = again.model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached, plain)


def test_an_uneven_checkpoint_is_verified_and_names_itself(kit: Any, tmp_path: Path) -> None:
    dense = kit.opened("qwen3_vl")
    student = prune(dense.vlm, uneven(dense.vlm))
    folder = export(student, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "NOT a standard transformers checkpoint" in card
    assert "largest difference of any output value 0 " in card
    assert "per_layer_config" in (folder / "config.json").read_text()
    # plain transformers must not load it as if it were whole
    with pytest.raises(Exception, match="per-layer attribute"):
        type(student.model).from_pretrained(folder)
    (folder / "interlace.json").unlink()
    with pytest.raises(CheckpointError):
        open_model(folder)


def test_a_config_that_cannot_hold_widths_of_layers_goes_without_them(tmp_path: Path) -> None:
    # CLIP's config compares heads with the width, and its processor is opened by the config
    dense = open_model("bundled:clip", dtype="float32")
    cut = {"self_attn": {3: (1,)}, "mlp": {5: tuple(range(8))}}
    plan = Plan({"text": TowerPlan(12, drop=(4,), tune=(5,), cut=cut)}, standard=False)
    folder = export(prune(dense, plan), tmp_path / "out")
    assert "per_layer_config" not in (folder / "config.json").read_text()
    assert open_model(folder).processor is not None
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(dense.model).from_pretrained(folder)


def test_run_time_bridges_stand_beside_uneven_widths(kit: Any, tmp_path: Path) -> None:
    dense = kit.opened("qwen3_vl")
    data = [tiny_inputs("qwen3_vl", dense.vlm.model, batch=4, seed=seed) for seed in range(2)]
    cut = {"self_attn": {2: (1,)}, "mlp": {5: (0, 3)}}
    plan = Plan({"text": TowerPlan(8, drop=(4,), tune=(5,), cut=cut)}, standard=False)
    student = prune(dense.vlm, plan, bridges="diagonal", data=data)
    assert student.record.widths
    assert [bridge.kind for bridge in student.record.bridges] == ["diagonal"]
    assert not student.record.standard
    folder = export(student, tmp_path / "out")
    again = open_model(folder)
    outputs = kit.outputs(student.model, dense.inputs)
    assert kit.bit_equal(kit.outputs(again.model, dense.inputs), outputs)
    assert again.fingerprint == student.fingerprint
    card = (folder / "README.md").read_text()
    assert "it has layers that differ in their heads or neurons and run-time bridges" in card
    with pytest.raises(PlanError, match="has run-time bridges"):
        prune(again, Plan({"text": TowerPlan(8, drop=(5,))}))


def test_a_uniform_student_is_a_stock_checkpoint(kit: Any, tmp_path: Path) -> None:
    dense = kit.opened("qwen3_vl")
    cut = cuts(dense.vlm, "text", "heads", even=True) | cuts(dense.vlm, "text", "ffn", even=True)
    cut = {
        site: {layer: units for layer, units in layers.items() if layer != 4}
        for site, layers in cut.items()
    }
    plan = Plan({"text": TowerPlan(8, drop=(4,), tune=(5,), cut=cut)})
    student = prune(dense.vlm, plan)
    changes = student.record.config_changes
    assert changes["text_config.num_key_value_heads"] == [2, 1]
    assert changes["text_config.num_attention_heads"] == [4, 2]
    assert changes["text_config.intermediate_size"] == [48, 32]
    # the export proves it in a fresh process with transformers alone
    export(student, tmp_path / "out")
    neurons = cuts(dense.vlm, "text", "ffn", even=True)
    narrowed = prune(dense.vlm, Plan({"text": TowerPlan(8, cut=neurons)}))
    assert "# qwen3_vl, narrowed" in model_card(narrowed).splitlines()
    once_more = prune(student, Plan({"text": TowerPlan(8, drop=(5,))}))
    assert once_more.record.config_changes["text_config.num_attention_heads"] == [4, 2]


def test_ragged_heads_equal_attention_with_mapped_keys(kit: Any) -> None:
    dense = kit.opened("qwen3_vl")
    plan = Plan({"text": TowerPlan(8, cut={"self_attn": {3: (1,)}})}, standard=False)
    student = prune(dense.vlm, plan)
    attention: Any = student.towers["text"].layers[3].self_attn
    assert attention.kv_map == (0, 1, 1)
    assert attention.config._attn_implementation == NAME
    query, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 2, 5, 8)
    values = torch.randn(2, 2, 5, 8)
    found, _ = AttentionInterface()[NAME](attention, query, keys, values, None, is_causal=True)
    index = [0, 1, 1]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, index], values[:, index], is_causal=True
    )
    assert torch.equal(found, expected.transpose(1, 2))


def test_attention_that_knows_no_uneven_heads_is_refused(kit: Any) -> None:
    dense = kit.opened("llava")
    plan = Plan({"text": TowerPlan(8, cut={"self_attn": {3: (1,)}})}, standard=False)
    model: Any = prune(dense.vlm, plan).model
    inputs = {"input_ids": torch.arange(5, 14)[None], "use_cache": False}
    assert not listened_to(model.modules())
    with torch.no_grad():
        wanted = model(**inputs).logits
        for change in (lambda: None, lambda: il.fuse(model)):
            change()
            for other in ("eager", "sdpa"):
                model.set_attn_implementation(other)
                with pytest.raises(BackendError, match=f"'{other}' knows equal ones only.*{NAME}"):
                    model(**inputs)
            model.set_attn_implementation("interlace")
            out = model(**inputs, output_attentions=True)
            torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-4)
            assert [each.shape[1] for each in out.attentions] == [4, 4, 4, 3, 4, 4, 4, 4]
            model.set_attn_implementation(NAME)
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cut", "standard", "words"),
    [
        ({"self_attn": {2: (0,)}}, True, "unequal numbers of heads"),
        ({"self_attn": {2: (0, 1, 2, 3)}}, False, "all 4 units of 'self_attn' in layer 2"),
        ({"self_attn": {2: (9,)}}, False, "Units count in the model that is cut"),
        ({"self_atn": {2: (0,)}}, False, "Did you mean 'self_attn'"),
        ({"mlp": {2: (0,)}}, True, "unequal numbers of neurons"),
    ],
)
def test_cuts_that_cannot_be_are_refused_in_words(
    kit: Any, cut: Any, standard: bool, words: str
) -> None:
    dense = kit.opened("qwen3_vl")
    with pytest.raises(PlanError, match=words):
        prune(dense.vlm, Plan({"text": TowerPlan(8, cut=cut)}, standard=standard))
    assert dense.vlm.fingerprint == dense.fingerprint


def test_a_student_is_narrowed_again_in_its_own_units() -> None:
    model = qwen3_vl()
    vlm = VLM(model, family_of(model))
    inputs = tiny_inputs("qwen3_vl", model)
    first = prune(vlm, Plan({"text": TowerPlan(8, cut={"self_attn": {3: (1,)}})}, standard=False))
    again = Plan({"text": TowerPlan(8, cut={"self_attn": {3: (1,), 5: (0,)}})}, standard=False)
    twice = prune(first, again)
    at_once = {"self_attn": {3: (1, 2), 5: (0,)}}
    once = prune(vlm, Plan({"text": TowerPlan(8, cut=at_once)}, standard=False))
    with torch.no_grad():
        assert torch.equal(twice.model(**inputs).logits, once.model(**inputs).logits)
    assert twice.record.widths == once.record.widths
    with pytest.raises(PlanError, match="already has widths"):
        prune(first, dataclasses.replace(again, standard=True))
