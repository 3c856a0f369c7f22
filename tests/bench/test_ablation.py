"""Variants of our own method, and its share of all parameters, on the bundled CLIP model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from methods import METHODS, Sizes, ablation
from methods.ablation import VARIANTS
from methods.rules import OURS, OURS_NORM, OURS_PARTS, OURS_SPLIT, cut, plan_by
from retention import Bench

if TYPE_CHECKING:
    from methods import Case

    import interlace as il

FIGURES = {"raw": {"t/x": 0.5}, "healed": {"t/x": 0.6}}


class QuickLoss:
    """Stands in for the divergence of repaired students, which is dear."""

    def __call__(self, tower: str, dropped: tuple[int, ...], parts: Any = None) -> float:
        """Return a loss that is lowest for the first layers, and for feed-forward parts."""
        if parts is None:
            return float(sum(dropped)) + len(tower)
        lost = [*dropped, *(layer for layers in parts.values() for layer in layers)]
        dear = len(dropped) + len(parts.get("self_attn", ()))
        return float(sum(lost) + 1000 * dear)

    def of_plan(self, plan: il.Plan) -> float:
        """Return a loss that is lowest where two layers go, with uniform widths of the others."""
        (tower,) = plan.towers.values()
        return abs(len(tower.drop) - 2) + (plan.settings["spread"] != "uniform")


@pytest.fixture(scope="module")
def bench() -> Bench:
    made = Bench(Sizes(calibration=8, heal_samples=8, heal_batch=4, held_out=8), exact=True)
    shared = made._shared("clip", 0)
    shared.repaired_loss = shared.loss = QuickLoss()
    return made


@pytest.fixture
def case(bench: Bench) -> Case:
    return bench.case("clip", 0.25, 0)


def gone(case: Case, student: Any) -> dict[str, float]:
    """Return tower -> share of the parameters of its layers that went."""
    left = {}
    for tower in case.counts():
        sizes = [
            sum(parameter.numel() for parameter in vlm.towers[tower].layers.parameters())
            for vlm in (student, case.vlm)
        ]
        left[tower] = 1 - sizes[0] / sizes[1]
    return left


def test_parts_go_instead_of_as_many_parameters_of_layers(case: Case) -> None:
    made = METHODS[OURS_PARTS].make(case)
    for name, share in gone(case, made.student).items():
        assert share == pytest.approx(case.counts()[name] / 12, abs=0.02)
    for tower in made.student.plan.towers.values():
        assert tower.parts["mlp"]
        assert tower.tune
    assert "text mlp [" in made.note
    report = METHODS[OURS_PARTS].heal(case, made.student)
    assert (report.num_samples, report.steps) == (8, 2)
    kinds = {each.kind for each in made.student.record.bridges if not each.dropped}
    assert "refit" in kinds


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_in_what_it_says(name: str, case: Case) -> None:
    variant = VARIANTS[name]
    made = METHODS[name].make(case)
    usual = plan_by(OURS, case)
    if made.same_as:
        # only another choice of layers can come to the same
        assert made.same_as == OURS
        assert variant.bridges == "refit"
        assert not variant.heal
        return
    plan = made.student.plan
    assert {n: len(each.drop) for n, each in plan.towers.items()} == case.counts()
    bridges = made.student.record.bridges
    at_cuts = "fold" if variant.bridges == "refit" else variant.bridges
    assert {each.kind for each in bridges if each.dropped} == {at_cuts} - {"none"}
    assert any(not each.dropped for each in bridges) == (variant.bridges == "refit")
    if variant.rule == OURS and not variant.plan:
        assert all(each.drop == usual[n].drop for n, each in plan.towers.items())
        assert all(variant.tune_all == (each.tune == each.kept) for each in plan.towers.values())
    assert any(each.graft for each in plan.towers.values()) == ("graft" in variant.plan)


@pytest.mark.parametrize("name", [name for name, each in VARIANTS.items() if each.heal])
def test_a_variant_of_healing_heals_by_its_settings(name: str, case: Case) -> None:
    student = cut(case, plan_by(OURS, case), "none")
    report = METHODS[name].heal(case, student)
    wanted = case.settings.replace(**VARIANTS[name].heal)
    assert {key: report.settings[key] for key in VARIANTS[name].heal} == VARIANTS[name].heal
    assert bool(report.gates) == (wanted.gates != "none")
    assert (report.num_samples, report.steps) == (8, 2)


def test_a_variant_that_comes_to_the_same_takes_the_figures(bench: Bench) -> None:
    case = bench.case("clip", 0.5, 0)
    # at a half the neighbours of the cuts are all layers that stay
    assert METHODS["ours_all_tuned"].make(case).same_as == OURS
    bench._known["clip", OURS, 0.5, 0, "none"] = FIGURES
    found = bench.retention("clip", "ours_all_tuned", 0.5, 0)
    assert found == {**FIGURES, "note": f"the same student as `{OURS}`"}


def test_stages_spend_the_samples_of_one_healing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "OURS", "shortgpt")
    made = METHODS["ours_two_stages"].make(case)
    assert made.healed is not None
    assert (made.healed.num_samples, made.healed.steps) == (8, 2)
    usual = METHODS[OURS]
    assert made.healed.tokens == usual.heal(case, usual.make(case).student).tokens
    assert {name: len(each) for name, each in made.student.record.dropped.items()} == case.counts()


def test_the_split_with_the_lowest_loss_is_made(bench: Bench) -> None:
    case = bench.case("clip", 0.4, 0)
    made = METHODS[OURS_NORM].make(case)
    for name, tower in made.student.plan.towers.items():
        assert len(tower.drop) == 2
        assert tower.cut
        assert set(tower.tune) == set(tower.kept)
        assert f"{name}: 2 layers" in made.note
    assert gone(case, made.student) == pytest.approx({"text": 0.4, "vision": 0.4}, abs=0.02)
    bridges = made.student.record.bridges
    assert {each.kind for each in bridges if each.dropped} == {"fold"}
    # from the first narrower layer on
    assert {each.after for each in bridges if each.tower == "text"} >= {0, 11}
    assert math.isfinite(case.shared.loss_of(made.student.model))


def test_a_split_by_what_units_cost_in_turn_loses_as_much(bench: Bench) -> None:
    case = bench.case("clip", 0.4, 0)
    student = METHODS[OURS_SPLIT].make(case).student
    assert student.plan.settings["width_metrics"] == {"heads": "head_obs", "ffn": "ffn_obs"}
    assert gone(case, student) == pytest.approx({"text": 0.4, "vision": 0.4}, abs=0.02)
