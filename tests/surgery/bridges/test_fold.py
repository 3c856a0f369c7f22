"""`fold` on towers small enough to know the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery.bridges.toys import (
    FEATURES,
    WIDTH,
    Gated,
    LayerScaled,
    Linear,
    PostNorm,
    PreNorm,
    Sandwiched,
    TwiceNormed,
    Weights,
    calibration,
    tower,
    without,
)
from torch import nn

from interlace.errors import PlanError
from interlace.surgery.bridges.fold import fit_fold
from interlace.surgery.bridges.least_squares import NormalEquations, choose
from interlace.surgery.bridges.observe import Pair, observe


def _fit(dense: Any, student: Any, gaps: Any, data: Any) -> Any:
    with torch.no_grad():
        return fit_fold(Pair(dense, student, data, Weights()), gaps)


def _left(dense: Any, student: Any, gap: Any) -> float:
    """Squared error of the held-out samples behind a gap, as a share of their squared size."""
    seen = list(observe(Pair(dense, student, calibration(num_batches=8), Weights()), gap))
    left = sum(float(s.weight[s.held] @ (s.goal - s.state)[s.held].square().sum(1)) for s in seen)
    return left / sum(float(s.weight[s.held] @ s.goal[s.held].square().sum(1)) for s in seen)


@pytest.mark.parametrize("kind", [Linear, LayerScaled])
@pytest.mark.parametrize("drop", [(3,), (2, 3), (2, 4, 5), (6,)])
def test_linear_layers_are_recovered_to_rounding(drop: tuple[int, ...], kind: Any) -> None:
    dense = tower(kind)
    student, gaps = without(dense, drop)
    unseen = calibration(seed=2).batches[0]
    far = (student(unseen)[0] - dense(unseen)[0]).abs().max()
    bridges = _fit(dense, student, gaps, calibration())
    assert [bridge.dropped for bridge in bridges] == [gap.dropped for gap in gaps]
    assert (student(unseen)[0] - dense(unseen)[0]).abs().max() < 1e-6 * far


def test_only_the_projections_before_the_cuts_change_and_the_teacher_does_not() -> None:
    dense = tower(PreNorm)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    student, gaps = without(dense, (2, 5))
    _fit(dense, student, gaps, calibration())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {n for n, p in student.named_parameters() if p.data_ptr() not in shared}
    # layers 1 and 4 stand at positions 1 and 3 of the student
    assert own == {f"layers.{i}.down.{leaf}" for i in (1, 3) for leaf in ("weight", "bias")}
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_streamed_equations_equal_a_direct_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            torch.randn(n, FEATURES, generator=generator, dtype=torch.float64),
            torch.randn(n, WIDTH, generator=generator, dtype=torch.float64),
            torch.rand(n, generator=generator, dtype=torch.float64),
        )
        for n in (5, 1, 40)
    ]
    for intercept in (False, True):
        sums = NormalEquations(FEATURES, WIDTH, intercept=intercept, device=torch.device("cpu"))
        for x, r, w in parts:
            sums.add(x, r, w, r)
        x, r, w = (torch.cat(each) for each in zip(*parts, strict=True))
        if intercept:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        penalty = 0.1 * ((x * w[:, None]) * x).sum(0)[:FEATURES].mean()
        damping = torch.zeros(FEATURES, x.shape[1], dtype=x.dtype)
        damping.diagonal()[:] = penalty.sqrt()
        rows = torch.cat([x * w.sqrt()[:, None], damping])
        targets = torch.cat([r * w.sqrt()[:, None], torch.zeros(FEATURES, WIDTH, dtype=x.dtype)])
        direct = torch.linalg.lstsq(rows, targets).solution
        found = sums.solve(0.1)
        assert torch.allclose(found, direct, rtol=1e-10, atol=1e-12)
        error = (w[:, None] * (r - x @ direct).square()).sum()
        assert sums.error(found) == pytest.approx(float(error), rel=1e-10)


def test_fold_is_the_ridge_solution_of_all_samples() -> None:
    """The whole of it against the formula written out on stacked activations."""
    dense = tower(PreNorm)
    student, gaps = without(dense, (3,))
    data = calibration()
    linear = student.layers[2].down
    plain = linear.weight.clone(), linear.bias.clone()
    seen = list(observe(Pair(dense, student, data, Weights()), gaps[0], {"x": linear}))
    x, goal, state, w = (
        torch.cat(each)
        for each in zip(*((s.inputs["x"], s.goal, s.state, s.weight) for s in seen), strict=True)
    )
    assert len(x) == sum(len(batch) - 1 for batch in data.batches)
    (bridge,) = _fit(dense, student, gaps, data)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    gram = x.T @ (w[:, None] * x)
    mean = gram.diagonal()[:FEATURES].mean()
    gram.diagonal()[:FEATURES] += bridge.settings["ridge"] * mean
    change = torch.linalg.solve(gram, x.T @ (w[:, None] * (goal - state)))
    assert torch.allclose(linear.weight - plain[0], change[:FEATURES].T, rtol=1e-8, atol=1e-10)
    assert torch.allclose(linear.bias - plain[1], change[FEATURES], rtol=1e-8, atol=1e-10)
    assert 0 < bridge.error_after < bridge.error_before


def test_held_out_samples_choose_no_change_where_there_is_nothing_to_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    both = []
    for sign in (1.0, -1.0):
        x = torch.randn(50, FEATURES, generator=generator, dtype=torch.float64)
        r = sign * x[:, :WIDTH]
        sums = NormalEquations(FEATURES, WIDTH, intercept=False, device=torch.device("cpu"))
        sums.add(x, r, torch.ones(50, dtype=torch.float64), r)
        both.append(sums)
    solution = choose(*both)
    assert solution.change is None
    assert solution.after == solution.before


def test_a_later_cut_is_fitted_on_the_repaired_student() -> None:
    dense = tower(PreNorm)
    data, unseen = calibration(num_batches=8), calibration(seed=2).batches[0]
    student, gaps = without(dense, (2, 5))
    _fit(dense, student, gaps, data)
    apart, _ = without(dense, (2, 5))
    # the same two cuts, the second fitted without the first one's repair
    _fit(dense, apart, gaps[1:], data)
    _fit(dense, apart, gaps[:1], data)
    errors = [(each(unseen)[0] - dense(unseen)[0]).norm() for each in (student, apart)]
    assert errors[0] < errors[1]


def test_layers_behind_a_cut_rest_while_it_is_looked_at() -> None:
    dense = tower(PreNorm)
    student, gaps = without(dense, (2,))
    counts = {"goal": 0, "behind": 0}
    for name, number in (("goal", 2), ("behind", 3)):
        up = dense.layers[number].up
        up.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    with torch.no_grad():
        passes = list(observe(Pair(dense, student, calibration(num_batches=8), Weights()), gaps[0]))
    assert len(passes) == counts["goal"] == 8
    assert counts["behind"] == 1
    assert not any("forward" in vars(layer) for layer in (*dense.layers, *student.layers))


@pytest.mark.parametrize("kind", [PostNorm, TwiceNormed])
def test_post_norm_layers_are_fitted_through_their_norms(kind: Any) -> None:
    dense = tower(kind)
    with torch.no_grad():
        for norm in (each for each in dense.modules() if isinstance(each, nn.LayerNorm)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0.0, 0.2)
    student, gaps = without(dense, (3,))
    (bridge,) = _fit(dense, student, gaps, calibration(num_batches=8))
    assert bridge.error_after < 0.75 * bridge.error_before
    assert bridge.error_after == pytest.approx(_left(dense, student, gaps[0]), rel=1e-9)


def test_a_norm_behind_the_projection_is_fitted_through_and_with_it() -> None:
    dense = tower(Sandwiched)
    weights = {name: value.clone() for name, value in dense.state_dict().items()}
    student, gaps = without(dense, (3,))
    (bridge,) = _fit(dense, student, gaps, calibration(num_batches=8))
    assert bridge.error_after < 0.25 * bridge.error_before
    assert bridge.settings["gain"] is True
    assert bridge.error_after == pytest.approx(_left(dense, student, gaps[0]), rel=1e-9)
    assert all(torch.equal(weights[name], value) for name, value in dense.state_dict().items())


def test_the_front_cut_has_no_bridge_and_says_so() -> None:
    dense = tower(PreNorm)
    student, gaps = without(dense, (0, 3))
    first, second = _fit(dense, student, gaps, calibration())
    assert (first.kind, first.after) == ("none", None)
    assert "no kept layer stands before it" in first.note
    assert second.kind == "fold"


def test_a_gate_behind_the_projection_is_refused() -> None:
    dense = tower(Gated)
    student, gaps = without(dense, (3,))
    with pytest.raises(PlanError, match="does not add its last linear projection"):
        _fit(dense, student, gaps, calibration())


class _Tapped(nn.Module):
    """Hands out the state behind layer 2 as well."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.layers = inner.layers

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = [hidden := layer(hidden) for layer in self.layers]
        return states[-1], states[2]


def test_a_layer_that_others_read_is_left_as_it_is() -> None:
    dense = tower(PreNorm)
    student, gaps = without(dense, (3, 5))
    first, second = _fit(_Tapped(dense), _Tapped(student), gaps, calibration())
    assert first.kind == "none"
    assert "also read by another part" in first.note
    assert second.kind == "fold"
