"""`diagonal` and `lowrank`: their start in closed form, where they sit, saving and opening."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from surgery.bridges.toys import (
    WIDTH,
    PreNorm,
    Weights,
    calibration,
    tower,
    without,
)
from tiny import TINY, generation_inputs, tiny_inputs
from torch import nn

from interlace.errors import CheckpointError, ConfigError, PlanError
from interlace.export import export
from interlace.models import VLM, family_of, open_model
from interlace.models.bridges import RunTimeBridge
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.observe import Pair, observe
from interlace.surgery.bridges.runtime import fit_run_time

if TYPE_CHECKING:
    from pathlib import Path


class Map(nn.Module):
    """A linear map of the stream, as a layer."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.matrix


# what else `prune` is asked for
RANK: dict[str, Any] = {"lowrank": {"rank": 3}}


def _fit(dense: Any, student: Any, gaps: Any, kind: str) -> Any:
    pair = Pair(dense, student, calibration(), Weights())
    with torch.no_grad():
        return fit_run_time(pair, gaps, kind=kind, rank=2)


@pytest.mark.parametrize("place", [2, 6])
@pytest.mark.parametrize("kind", ["diagonal", "lowrank"])
def test_layers_of_the_bridges_own_form_are_recovered(kind: str, place: int) -> None:
    dense = tower(PreNorm)
    generator = torch.Generator().manual_seed(5)
    if kind == "diagonal":
        matrix = torch.rand(WIDTH, generator=generator).double().add(0.5).diag()
    else:
        factors = torch.randn(2, WIDTH, 2, generator=generator).double()
        matrix = torch.eye(WIDTH, dtype=torch.float64) + factors[0] @ factors[1].T
    dense.layers[place] = Map(matrix)
    student, gaps = without(dense, (place,))
    (bridge,) = _fit(dense, student, gaps, kind)
    assert bridge.error_after < 1e-12 < bridge.error_before
    unseen = calibration(seed=2).batches[0]
    assert torch.allclose(student(unseen)[0], dense(unseen)[0], rtol=1e-5, atol=1e-5)
    own = {n for n, p in student.named_parameters() if p.requires_grad}
    assert own == {n for n, _ in student.named_parameters() if "bridge_" in n}


def test_a_low_rank_start_is_the_best_of_its_rank() -> None:
    """Against gradient descent on the same error, begun at the solution and elsewhere."""
    dense = tower(PreNorm)
    student, gaps = without(dense, (3,))
    seen = list(observe(Pair(dense, student, calibration(), Weights()), gaps[0]))
    state, goal, weight = (
        torch.cat([getattr(s, name) for s in seen]) for name in ("state", "goal", "weight")
    )
    _fit(dense, student, gaps, "lowrank")
    (bridge,) = (m for m in student.modules() if isinstance(m, RunTimeBridge))

    def error(module: RunTimeBridge) -> torch.Tensor:
        return weight @ (module(state) - goal).square().sum(1)

    start = float(error(bridge).detach())
    other = RunTimeBridge(WIDTH, 2, torch.float64)
    torch.manual_seed(3)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in (bridge, other):
        optimizer = torch.optim.LBFGS(
            module.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def closure(module: Any = module, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = error(module)
            loss.backward()
            return loss

        optimizer.step(closure)
        # a ridge takes a little off what is best on these tokens
        assert start <= float(error(module).detach()) * 1.01


def _vlm(name: str) -> VLM:
    model = TINY[name]()
    return VLM(model, family_of(model), name=name)


def _plan(vlm: VLM, **tune: tuple[int, ...]) -> Plan:
    """The first layer of a tower, one in the middle, and the last one."""
    towers = {}
    for name, each in vlm.towers.items():
        last = each.num_layers - 1
        drop = (2, 3) if each.cross_attention_layers is not None else (4, last)
        towers[name] = TowerPlan(each.num_layers, drop=drop, tune=tune.get(name, ()))
    return Plan(towers)


def _values(model: Any, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return [v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip", "diagonal"),
        ("qwen3_vl", "lowrank"),
        ("llava", "lowrank"),
        ("blip_caption", "diagonal"),
        ("blip2_t5", "lowrank"),
    ],
)
def test_students_open_with_equal_logits_and_leave_the_teacher_alone(
    name: str, kind: str, tmp_path: Path
) -> None:
    vlm = _vlm(name)
    data = [tiny_inputs(name, vlm.model, batch=4, seed=seed) for seed in range(2)]
    before, outputs = vlm.fingerprint, _values(vlm.model, data[0])
    plan = _plan(vlm)
    student = prune(vlm, plan, bridges=kind, data=data, allow_pinned=True, **RANK.get(kind, {}))
    assert vlm.fingerprint == before
    assert all(map(torch.equal, _values(vlm.model, data[0]), outputs))
    assert not student.record.standard
    made = [bridge for bridge in student.record.bridges if bridge.kind == kind]
    modules = {n: m for n, m in student.model.named_modules() if isinstance(m, RunTimeBridge)}
    assert len(modules) == len(made) > 0
    trained = {n for n, p in student.model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{n}.{leaf}" for n, m in modules.items() for leaf, _ in m.named_parameters()
    }
    # the norm behind the cut is computed along wherever the layer begins with one
    fused = {bridge.tower for bridge in made if bridge.settings["norm"]}
    post_norm = {"qformer"} | ({"text"} if name == "blip_caption" else set())
    assert fused == {b.tower for b in made if b.settings["side"] == "input"} - post_norm
    plain = prune(vlm, plan, allow_pinned=True)
    found = _values(student.model, data[0])
    assert not all(map(torch.equal, _values(plain.model, data[0]), found))

    folder = export(student, tmp_path / "out", verify=False)
    again = open_model(folder)
    assert again.record == student.record
    assert all(map(torch.equal, _values(again.model, data[0]), found))
    assert "NOT a standard transformers checkpoint" in (folder / "README.md").read_text()
    with pytest.raises(PlanError, match="has run-time bridges"):
        prune(again, plan)


@pytest.mark.parametrize("kind", ["fold", "lowrank"])
def test_generation_with_a_cache_equals_generation_without(kind: str) -> None:
    vlm = _vlm("qwen3_vl")
    data = [tiny_inputs("qwen3_vl", vlm.model, batch=4)]
    student = prune(
        vlm, _plan(vlm), bridges=kind, data=data, allow_pinned=True, **RANK.get(kind, {})
    )
    inputs = generation_inputs("qwen3_vl", vlm.model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        cached = student.model.generate(**inputs, **settings, use_cache=True)
        plain = student.model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached, plain)


def test_the_fused_norm_changes_nothing_but_rounding() -> None:
    vlm = _vlm("clip")
    data = [tiny_inputs("clip", vlm.model, batch=4, seed=seed) for seed in range(2)]
    student = prune(vlm, _plan(vlm), bridges="lowrank", data=data, rank=3, allow_pinned=True)
    fused = _values(student.model, data[0])
    for module in student.model.modules():
        if isinstance(module, RunTimeBridge) and module._norm is not None:
            norm, _ = module._norm
            del norm.forward
            module._norm = None
    for one, other in zip(fused, _values(student.model, data[0]), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_export_proves_that_it_reloads_and_says_which_kind_it_is(tmp_path: Path) -> None:
    model = tiny.clip(text=4, vision=3)
    vlm = VLM(model, family_of(model), name="clip")
    data = [tiny_inputs("clip", model, batch=4)]
    plan = Plan({"text": TowerPlan(4, drop=(2,))})
    for kind in ("diagonal", "fold"):
        student = prune(vlm, plan, bridges=kind, data=data)
        # that a standard one is proven to reload is tested with all exports
        folder = export(student, tmp_path / kind, verify=kind == "diagonal")
        card = (folder / "README.md").read_text()
        proof = "by INTERLACE on transformers"
        assert (proof in card) == (kind == "diagonal")
        assert ("largest difference of any output value 0 " in card) == (kind == "diagonal")
        assert ("A standard transformers checkpoint" in card) == (kind == "fold")
        assert f"| text | 2 | {kind} | 1 |" in card
    manifest = tmp_path / "diagonal" / "interlace.json"
    student.record.save(manifest)
    # the manifest of the other student: the weights of its bridges are not built in
    assert open_model(tmp_path / "diagonal").record.standard


def test_a_manifest_of_other_weights_is_refused(tmp_path: Path) -> None:
    model = tiny.clip(text=4, vision=3)
    vlm = VLM(model, family_of(model), name="clip")
    data = [tiny_inputs("clip", model, batch=4)]
    plan = Plan({"text": TowerPlan(4, drop=(2,))})
    bridged = prune(vlm, plan, bridges="diagonal", data=data)
    folder = export(prune(vlm, plan), tmp_path / "plain", verify=False)
    bridged.record.save(folder / "interlace.json")
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*bridge_input"):
        open_model(folder)


@pytest.mark.parametrize("rank", [0, 2.5, True])
def test_a_bad_rank_is_refused(rank: Any) -> None:
    model = tiny.clip(text=4, vision=3)
    vlm = VLM(model, family_of(model), name="clip")
    data = [tiny_inputs("clip", model, batch=4)]
    with pytest.raises(ConfigError, match="rank is"):
        prune(vlm, Plan({"text": TowerPlan(4, drop=(2,))}), bridges="lowrank", data=data, rank=rank)
