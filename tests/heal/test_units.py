"""Gates of heads and neurons: the same function once folded, and a signal of what is useless."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from heal.toys import (
    assert_gated_runs_resume,
    double_vlm,
    outputs,
    toy,
    toy_collate,
    toy_samples,
)
from tiny import TINY, tiny_inputs
from torch import nn

from interlace.errors import ConfigError, ShapeError
from interlace.heal import heal
from interlace.heal.sparsity import Gates, fold, importance, layer_importance, reported
from interlace.heal.units import find_gated
from interlace.models import VLM, family_of
from interlace.models.sites import find_sites, rows_of
from interlace.plan import make_plan
from interlace.records import HealReport, Plan, Scores, TowerPlan, TowerScores, load_record
from interlace.scores import score
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path

UNITS = ("heads", "neurons")
ALL = ("branches", *UNITS)
GATED = {"branches": ("branches",), "units": UNITS}


def _inputs(name: str, vlm: VLM) -> dict[str, Any]:
    given = tiny_inputs(name, vlm.model, 2, seed=1)
    return {k: v.to(vlm.dtype) if v.is_floating_point() else v for k, v in given.items()}


def _report(places: Any, values: list[float]) -> HealReport:
    sizes = dict.fromkeys(
        ("steps", "num_samples", "tokens", "trainable_parameters", "total_parameters"), 0
    )
    return HealReport(**sizes, **reported(places, values))


def _unscored(vlm: VLM) -> Scores:
    towers = {name: TowerScores(tower.num_layers) for name, tower in vlm.towers.items()}
    return Scores(towers, shape=vlm.shape())


# a norm behind a branch undoes any factor inside it
NORMALISED = {
    "gemma3": "a Gemma3DecoderLayer normalises its branches",
    "glm4v": "a Glm4vTextDecoderLayer normalises its branches",
}
REFUSED = {
    ("branches", "qwen3_vl_moe"): "exactly one must end its mlp branch, and none is known to",
    ("branches", "qwen3_5_moe"): "exactly one must end its mlp branch, and",
    ("units", "qwen3_vl_moe"): "neurons of the tower 'text' cannot be gated",
    ("units", "qwen3_5"): "heads of the tower 'text' cannot be gated",
    ("units", "qwen3_5_moe"): "heads of the tower 'text' cannot be gated",
    **{(kind, name): why for kind in GATED for name, why in NORMALISED.items()},
}
TAKEN = [(kind, name) for kind in GATED for name in TINY if (kind, name) not in REFUSED]


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_what_is_not_found_or_does_not_count_alone_is_refused(kind: str, name: str) -> None:
    vlm = double_vlm(name)
    with pytest.raises(ConfigError, match=REFUSED[kind, name]):
        find_gated(vlm, vlm.towers, GATED[kind])


@pytest.mark.parametrize(("kind", "name"), TAKEN)
def test_folded_gates_are_the_same_function_and_give_every_place_its_value(
    kind: str, name: str
) -> None:
    vlm = double_vlm(name)
    places = find_gated(vlm, vlm.towers, GATED[kind])
    inputs = _inputs(name, vlm)
    gated, folded = copy.deepcopy(vlm.model), copy.deepcopy(vlm.model)
    gates = Gates(places, "l1").double()
    gates.attach(gated)
    plain = outputs(vlm.model, inputs)
    gates.draw()
    assert all(map(torch.equal, outputs(gated, inputs), plain))
    with torch.no_grad():
        # drawn as fp32 numbers, as they are trained
        gates.values.copy_(0.5 + torch.rand(len(gates.values)))
    values = gates.values.tolist()
    gates.draw()
    fold(folded, places, values)
    apart = 0.0
    for one, other, before in zip(
        outputs(gated, inputs), outputs(folded, inputs), plain, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        apart = max(apart, float((one - before).abs().max()))
    assert apart > 1e-3

    if kind == "branches":
        for tower in vlm.towers.values():
            own = [each for each in places if each.tower == tower.name]
            assert {each.layer for each in own} == set(range(tower.num_layers))
            assert {"attention", "mlp"} <= {each.kind for each in own}
        return
    # every output projection of a site has its columns scaled, unit by unit, and nothing else is
    found = _unscored(vlm).with_gates(_report(places, values))
    changed = {n for n, p in folded.named_parameters() if not torch.equal(p, _of(vlm, n))}
    expected = set()
    for tower in vlm.towers.values():
        for position, layer in enumerate(tower.layers):
            paths = {id(module): path for path, module in layer.named_modules()}
            for site in find_sites(layer).values():
                metric = "head_gate" if site.kind == "heads" else "ffn_gate"
                factors = found[tower.name].importance[metric][site.name][position]
                assert len(factors) == site.num_units
                path = f"{tower.path}.{position}.{paths[id(site.output)]}.weight"
                expected.add(path)
                columns = torch.tensor(factors).double().repeat_interleave(site.head_dim)
                torch.testing.assert_close(folded.get_parameter(path), _of(vlm, path) * columns)
    assert changed == expected


def _of(vlm: VLM, name: str) -> torch.Tensor:
    return vlm.model.get_parameter(name).detach()


# The query heads and the runs of 8 neurons of every layer that are made useless: half of them.
USELESS_HEADS = ((1, 2), (0, 2), (1, 3))
USELESS_RUNS = ((0, 2, 4), (1, 3, 5), (2, 3, 4))


def _useless(site: Any, layer: int) -> tuple[int, ...]:
    if site.kind == "heads":
        return USELESS_HEADS[layer]
    return tuple(8 * run + i for run in USELESS_RUNS[layer] for i in range(8))


@pytest.mark.parametrize(
    ("name", "tower", "kind"),
    [
        ("llava", "text", "l1"),
        ("clip", "text", "hard_concrete"),
        ("blip_caption", "text", "hard_concrete"),
        # one projection of query, key and value
        ("qwen3_vl", "vision", "l1"),
    ],
)
def test_useless_heads_and_neurons_sink_and_a_plan_cuts_exactly_them(
    name: str, tower: str, kind: str
) -> None:
    model = TINY[name](text=3, vision=3, **({"deepstack": (1,)} if name == "qwen3_vl" else {}))
    teacher = VLM(model, family_of(model))
    expected: dict[str, dict[int, tuple[int, ...]]] = {}
    for number, layer in enumerate(teacher.towers[tower].layers):
        for site in find_sites(layer).values():
            units = _useless(site, number)
            expected.setdefault(site.name, {})[number] = units
            with torch.no_grad():
                site.output.weight[:, rows_of(site, units)[1]] *= 1e-4
    student = prune(teacher, Plan({tower: TowerPlan(3, tune=(1,))}))
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(6),
        collate=toy_collate(name, model),
        max_steps=15,
        batch_size=2,
        # only the gates move, away from a student that is its teacher
        learning_rate=1e-9,
        ce_weight=0.0,
        hidden_weight=0.0,
        gates=kind,
        gate_units=UNITS,
        gate_penalty=1e-3,
        gate_learning_rate=0.05 if kind == "l1" else 0.3,
    )
    inputs = tiny_inputs(name, model, 2, seed=1)
    scores = score(student, [inputs], towers=(tower,), progress=False).with_gates(report)
    plan = make_plan(scores, heads={tower: 0.5}, ffn={tower: 0.5}, spread="ragged")
    assert plan[tower].cut == expected
    # what was cut was useless indeed: the function is the same but for 1e-4 of it
    smaller = prune(student, plan, allow_pinned=True)
    for one, other in zip(
        outputs(student.model, inputs), outputs(smaller.model, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


def _healed(name: str = "llava", **settings: Any) -> tuple[VLM, VLM, HealReport]:
    teacher, student = toy(name)
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(6),
        collate=toy_collate(name, teacher.model),
        **{"max_steps": 3, "batch_size": 2, "gates": "l1", "gate_penalty": 20.0, **settings},
    )
    return teacher, student, report


def test_healing_leaves_a_standard_checkpoint_and_tells_its_gates(tmp_path: Path) -> None:
    teacher, student, report = _healed(gate_units=ALL)
    tower = student.towers["text"]
    assert set(report.gates["text"]) == set(report.unit_gates["text"]) == set(tower.original)
    for layer, sites in report.unit_gates["text"].items():
        assert {name: len(gates) for name, gates in sites.items()} == {"self_attn": 4, "mlp": 6}
        assert max(max(gates) for gates in sites.values()) < 1.0
        if layer in (1, 2):
            continue
        # a frozen layer is the dense one but for its two last projections
        module = tower.layers[tower.position(layer)]
        for name, value in module.named_parameters():
            old = teacher.model.get_parameter(f"{tower.path}.{layer}.{name}")
            factor = torch.tensor(1.0)
            if "o_proj" in name:
                gates = torch.tensor(sites["self_attn"]).repeat_interleave(8)
                factor = gates * report.gates["text"][layer]["attention"]
            elif "down_proj" in name:
                gates = torch.tensor(sites["mlp"]).repeat_interleave(8)
                factor = gates * report.gates["text"][layer]["mlp"]
            torch.testing.assert_close(value, old * factor)
    # scores count layers as they stand, without layer 1
    rows = _unscored(student).with_gates(report)["text"].importance["head_gate"]["self_attn"]
    assert rows == tuple(
        tuple(map(abs, report.unit_gates["text"][layer]["self_attn"])) for layer in (0, 2, 3, 4)
    )
    student.model.save_pretrained(tmp_path)
    read = type(student.model).from_pretrained(tmp_path)
    inputs = tiny_inputs("llava", read, 2, seed=1)
    assert all(map(torch.equal, outputs(read, inputs), outputs(student.model, inputs)))
    report.save(tmp_path / "heal.json")
    assert load_record(tmp_path / "heal.json") == report


@pytest.mark.parametrize("kind", ["l1", "hard_concrete"])
def test_each_kind_of_units_has_a_mean_penalty_of_its_own(kind: Any) -> None:
    vlm = double_vlm("clip")
    alone = Gates(find_gated(vlm, ("text",), ("branches",)), kind)
    joint = Gates(find_gated(vlm, ("text",), ALL), kind)
    penalties = [gates.draw() for gates in (alone, joint)]
    for penalty in penalties:
        penalty.backward()
    assert penalties[1].item() == pytest.approx(3 * penalties[0].item())
    # heads and neurons weigh no less on the branches, however many they are
    assert alone.values.grad is not None
    assert joint.values.grad is not None
    torch.testing.assert_close(joint.values.grad[: len(alone.values)], alone.values.grad)
    heads = joint.values.grad[len(alone.values) :][: 6 * 4]
    torch.testing.assert_close(heads.sum(), alone.values.grad.sum())


def test_a_layer_counts_by_the_mean_of_its_branches_and_sites() -> None:
    gates = {0: {"attention": -0.5}, 1: {"attention": 1.0}}
    units = {0: {"self_attn": (0.0, -1.0), "mlp": (2.0,)}, 1: {"self_attn": (0.5, 0.5)}}
    assert importance(gates, units) == {0: 1.0, 1: 0.75}
    report = _report((), [])
    assert layer_importance(report) == {}
    assert layer_importance(replace(report, unit_gates={"text": units})) == {
        "text": {0: 1.25, 1: 0.5}
    }


def test_sites_that_cannot_be_gated_are_refused_in_words() -> None:
    vlm = double_vlm("clip")
    layers: Any = vlm.towers["text"].layers
    # the bias stays as it is, so it may be shared
    layers[1].mlp.fc2.bias = layers[0].mlp.fc2.bias
    assert len(find_gated(vlm, ("text",), ("neurons",))) == len(layers)
    layers[1].mlp.fc2.weight = layers[0].mlp.fc2.weight
    assert find_gated(vlm, ("text",), ("heads",))
    with pytest.raises(ConfigError, match="shares its weight with"):
        find_gated(vlm, ("text",), ("neurons",))
    other = double_vlm("llava")
    layer: Any = other.towers["text"].layers[2]
    layer.mlp.experts = nn.ModuleList([layer.mlp.down_proj])
    del layer.mlp.down_proj
    with pytest.raises(ConfigError, match="The neurons of the tower 'text' cannot be gated"):
        find_gated(other, ("text",), UNITS)
    layer.post_feedforward_layernorm = nn.Identity()
    with pytest.raises(ConfigError, match="normalises its branches"):
        find_gated(other, ("text",), ("heads",))


def test_gates_of_another_model_are_no_importance() -> None:
    vlm = double_vlm("clip")
    places = find_gated(vlm, ("text",), UNITS)
    report = _report(places, [1.0] * sum(place.count for place in places))
    with pytest.raises(ConfigError, match=r"towers \['text'\], the scores are of \['vision'\]"):
        Scores({"vision": TowerScores(6)}, shape=vlm.shape()).with_gates(report)
    with pytest.raises(ConfigError, match="There are no gates to add"):
        _unscored(vlm).with_gates(_report((), []))
    narrow = prune(
        vlm, Plan({"text": TowerPlan(6, tune=(0,), cut={"self_attn": {0: (1,)}})}, standard=False)
    )
    with pytest.raises(ShapeError, match=r"\[4, 4, 4, 4, 4, 4\] per layer, .* take \[3, 4"):
        _unscored(narrow).with_gates(report)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_with_random_gates_resumes_to_the_same_bits(tmp_path: Path) -> None:
    assert_gated_runs_resume(tmp_path, max_steps=3, gate_units=ALL)
