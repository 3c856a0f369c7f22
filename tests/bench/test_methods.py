"""The methods of the retention benchmark, on the bundled CLIP model, which is the fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from methods import COMPARED, METHODS, Sizes
from methods.blocks import Patch, _fold, fit_patch, fit_replacement, hadamard
from methods.rules import OTHERS, OURS_NORM, OURS_PARTS, OURS_SPLIT, OURS_TIME, PUBLISHED
from methods.sparse import linears
from retention import Bench, nonzero
from torch import nn

import interlace as il
from interlace.errors import PlanError
from interlace.plan.split_ways import widths_for
from interlace.records import TowerPlan
from interlace.surgery.bridges.observe import Seen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from methods import Case

SIZES = Sizes(calibration=8, heal_samples=8, heal_batch=4, held_out=8)
# the rules are tested in tests/plan; one of them stands for all. Parts and splits take many trials:
# test_ablation.py
DEAR = (OURS_PARTS, OURS_SPLIT, OURS_NORM, OURS_TIME)
BASELINES = [name for name in COMPARED if name not in (*PUBLISHED, *OTHERS, *DEAR)]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SIZES)


@pytest.fixture(scope="module")
def case(bench: Bench) -> Case:
    return bench.case("clip", 0.25, 0)


@pytest.fixture(scope="module")
def half(bench: Bench) -> Case:
    return bench.case("clip", 0.5, 0)


@pytest.fixture(scope="module")
def results(bench: Bench) -> dict[str, dict[str, Any]]:
    return {
        name: bench.retention("clip", name, (METHODS[name].fractions or (0.25,))[0], 0)
        for name in ("last", *BASELINES)
    }


def test_all_methods_heal_on_the_same_tokens_and_steps(results: dict[str, Any]) -> None:
    spent = [result["heal"] for result in results.values()]
    assert {(each["samples"], each["steps"]) for each in spent} == {(8, 2)}
    assert len({each["tokens"] for each in spent}) == 1
    assert all(set(each["healed"]) == set(each["raw"]) for each in results.values())


def test_methods_that_drop_layers_leave_the_same_parameters(results: dict[str, Any]) -> None:
    for name, result in results.items():
        if METHODS[name].timed == "layers":
            assert result["parameters"] == results["last"]["parameters"]
            assert all(len(layers) == 3 for layers in result["dropped"].values())


def test_sparse_methods_leave_as_many_weights_as_dropping_layers(results: dict[str, Any]) -> None:
    left = results["last"]["parameters"]
    assert results["magnitude"]["nonzero_parameters"] == left
    # rounded once per matrix, block of columns or row
    assert results["magnitude_per_matrix"]["nonzero_parameters"] == pytest.approx(left, abs=72)
    assert results["sparsegpt"]["nonzero_parameters"] == pytest.approx(left, abs=150)
    assert results["wanda"]["nonzero_parameters"] == pytest.approx(left, rel=0.01)
    assert results["magnitude"]["parameters"] > left


def test_equal_loss_with_layers_skipped_and_layers_gone(case: Case) -> None:
    plan = il.Plan(towers={"text": TowerPlan(num_layers=12, drop=(3, 6))})
    pruned = il.prune(case.vlm, plan)
    skipped = case.shared.loss("text", (3, 6))
    assert skipped == pytest.approx(case.shared.loss_of(pruned.model), rel=1e-5)
    whole = case.shared.loss("text", ())
    assert skipped != pytest.approx(whole, rel=1e-3)
    assert case.shared.loss_of(case.vlm.model) == whole


def weights(case: Case, student: Any) -> Iterator[torch.Tensor]:
    for _, modules in linears(case, student):
        yield from (module.weight.detach() for module in modules)


@pytest.mark.parametrize(
    "name", ["magnitude", "magnitude_per_matrix", "magnitude_2_4", "wanda", "sparsegpt"]
)
def test_zeros_stay_zero_while_the_rest_heals(name: str, case: Case, half: Case) -> None:
    where = half if name == "magnitude_2_4" else case
    student = METHODS[name].make(where).student
    before = [weight.clone() for weight in weights(where, student)]
    dense = nonzero(case.vlm.model)
    METHODS[name].heal(where, student)
    after = list(weights(where, student))
    changed = 0
    for old, new in zip(before, after, strict=True):
        assert not new[old == 0].any()
        changed += int((new != old).sum())
    assert changed > 0.9 * sum(int(old.count_nonzero()) for old in before)
    # what was cut is the student's own
    assert nonzero(case.vlm.model) == dense
    assert all("parametrizations" not in name for name, _ in student.model.named_parameters())


def test_magnitude_zeros_the_smallest_weights(case: Case) -> None:
    student = METHODS["magnitude"].make(case).student
    for (_, dense), (_, sparse) in zip(
        linears(case, case.vlm), linears(case, student), strict=True
    ):
        size = torch.cat([module.weight.detach().abs().flatten() for module in dense])
        gone = torch.cat([module.weight.detach().flatten() for module in sparse]) == 0
        assert size[gone].max() <= size[~gone].min()


def test_per_matrix_magnitude_takes_the_same_share_everywhere(case: Case) -> None:
    student = METHODS["magnitude_per_matrix"].make(case).student
    shares = [float((weight == 0).float().mean()) for weight in weights(case, student)]
    assert max(shares) - min(shares) < 1e-3


def test_two_of_four_neighbours_stay_the_larger_ones(half: Case) -> None:
    student = METHODS["magnitude_2_4"].make(half).student
    for (_, dense), (_, sparse) in zip(
        linears(half, half.vlm), linears(half, student), strict=True
    ):
        for old, new in zip(dense, sparse, strict=True):
            kept = new.weight.detach().view(-1, 4) != 0
            assert (kept.sum(1) == 2).all()
            size = old.weight.detach().abs().view(-1, 4)
            smallest_kept = size.where(kept, torch.tensor(torch.inf)).amin(1)
            assert (smallest_kept >= size.where(~kept, torch.tensor(0.0)).amax(1)).all()


def test_width_takes_as_many_parameters_and_keeps_all_layers(
    case: Case, results: dict[str, Any]
) -> None:
    shape = case.shared.width_scores.shape
    assert shape is not None
    wanted = sum(shape.towers["text"].layer_parameters) // 4
    assert case.parameters("text") == wanted
    found = widths_for(shape.towers["text"], wanted, range(12))
    # 8 neurons of 12 layers: 96 in, 96 out and a bias each
    bundle = 12 * 8 * (96 + 96 + 1)
    assert all(abs(each.gone - wanted) <= bundle for each in found)
    assert len({each.heads for each in found}) > 1
    assert results["width"]["dropped"] == {"text": [], "vision": []}
    assert results["width"]["parameters"] == pytest.approx(
        results["last"]["parameters"], abs=2 * bundle
    )


def seen(inputs: torch.Tensor, state: torch.Tensor, goal: torch.Tensor) -> Seen:
    held = torch.arange(len(state)) % 4 == 3
    return Seen(goal, state, {"features": inputs}, torch.ones(len(state)).double(), held)


def test_replaceme_recovers_a_block_that_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 8)
    true = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 12, generator=generator)
    others = torch.randn(400, 8, generator=generator)
    with torch.no_grad():
        added = linear(inputs)
        goal = (others + added @ true.float()).detach()
        halves = [slice(0, 200), slice(200, 400)]
        batches = [seen(inputs[h], (others + added)[h], goal[h]) for h in halves]
        found = fit_replacement(iter(batches), linear)
    assert found is not None
    torch.testing.assert_close(found, true, atol=1e-3, rtol=1e-3)
    _fold(linear, found)
    torch.testing.assert_close(others + linear(inputs), goal, atol=1e-2, rtol=1e-3)


def test_replaceme_brings_the_state_behind_the_cut_closer(case: Case) -> None:
    student = METHODS["replaceme"].make(case).student
    drop = sorted(student.plan["text"].drop)
    assert drop == list(range(drop[0], drop[0] + 3))
    assert drop[0] > 0
    raw = il.prune(case.vlm, student.plan)
    goal = state_before(case, case.vlm, "text", drop[-1] + 1)
    errors = [
        (state_before(case, each, "text", drop[0]) - goal).square().sum() for each in (raw, student)
    ]
    assert errors[1] < 0.8 * errors[0]


def state_before(case: Case, vlm: Any, tower: str, position: int) -> torch.Tensor:
    """Return what a layer is given, hooks of its own left out."""
    kept: list[torch.Tensor] = []
    layer = vlm.towers[tower].layers[position]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
        prepend=True,
    )
    case.shared.loss_of(vlm.model)
    hook.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in kept])


def test_replaceme_refuses_layers_that_end_in_a_norm(bench: Bench) -> None:
    with pytest.raises(PlanError, match=r"BlipTextLayer.* norm or a gate .*ReplaceMe"):
        METHODS["replaceme"].make(bench.case("blip", 0.25, 0))


@pytest.mark.parametrize("size", [1, 2, 12, 64, 80, 96, 128])
def test_hadamard_matrices_are_orthonormal_and_flat(size: int) -> None:
    made = hadamard(size)
    torch.testing.assert_close(made @ made.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(made.abs(), torch.full_like(made, size**-0.5))


def test_hadamard_refuses_other_widths() -> None:
    with pytest.raises(PlanError, match="none of width 72"):
        hadamard(72)


def test_linearpatch_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(40, 12, generator=generator)
    behind = torch.randn(40, 12, generator=generator) * torch.arange(1, 13)
    batches = [seen(before[h], before[h], behind[h]) for h in (slice(0, 10), slice(10, 40))]
    turn = hadamard(12)
    scale = [
        (behind.double() @ turn[:, c]).abs().mean() / (before.double() @ turn[:, c]).abs().mean()
        for c in range(12)
    ]
    expected = sum(scale[c] * torch.outer(turn[:, c], turn[:, c]) for c in range(12))
    torch.testing.assert_close(fit_patch(iter(batches)), expected)


def test_linearpatch_acts_on_the_input_of_the_layer_behind_the_cut(case: Case) -> None:
    student = METHODS["linearpatch"].make(case).student
    plain = case.shared.loss_of(il.prune(case.vlm, student.plan).model)
    assert case.shared.loss_of(student.model) != pytest.approx(plain, rel=1e-4)
    patches = [each for each in student.model.modules() if isinstance(each, Patch)]
    assert len(patches) == 2
    start = min(student.plan["text"].drop)
    assert student.towers["text"].layers[start].linear_patch in patches
    for patch in patches:
        patch.matrix.data = torch.eye(96)
    assert case.shared.loss_of(student.model) == pytest.approx(plain, rel=1e-6)


def test_linearpatch_trains_with_its_layer(case: Case) -> None:
    student = METHODS["linearpatch"].make(case).student
    patches = [each.matrix for each in student.model.modules() if isinstance(each, Patch)]
    before = [matrix.detach().clone() for matrix in patches]
    METHODS["linearpatch"].heal(case, student)
    assert all(not torch.equal(old, new.detach()) for old, new in zip(before, patches, strict=True))


def test_methods_of_distillation_differ_in_their_loss(case: Case) -> None:
    made = METHODS["kd"].make(case).student
    plan = made.plan["text"]
    assert set(plan.tune) == set(range(12)) - set(plan.drop)
    report = METHODS["kd"].heal(case, made)
    assert set(report.final) >= {"ce", "kl"}
    assert "hidden" not in report.final
    hidden = METHODS["uidl_hidden"]
    student = hidden.make(case).student
    report = hidden.heal(case, student)
    assert report.final["loss"] == pytest.approx(report.final["hidden"], rel=1e-5)
