"""Prices of units against least squares that are solved anew for every set of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from interlace.scores import elimination
from interlace.scores.elimination import prices

N, D = 400, 6


def _problem(columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs [N, C], a projection [D, C] and a metric [D, D]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(N, columns, generator=generator, dtype=torch.float64) @ mixed
    weight = torch.randn(D, columns, generator=generator, dtype=torch.float64)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return inputs, weight, root @ root.T


def _error(
    inputs: torch.Tensor, weight: torch.Tensor, metric: torch.Tensor, kept: list[int]
) -> float:
    """Return the error of the best projection that reads only some columns."""
    goal = inputs @ weight.T
    rest = goal
    if kept:
        best = torch.linalg.lstsq(inputs[:, kept], goal).solution
        rest = goal - inputs[:, kept] @ best
    return float(torch.einsum("nd,de,ne->", rest, metric, rest))


@pytest.mark.parametrize(("size", "columns"), [(1, 150), (1, 7), (4, 24)])
def test_every_unit_costs_what_the_best_rest_lacks_without_it(size: int, columns: int) -> None:
    inputs, weight, metric = _problem(columns)
    # what one column says another nearly says as well
    inputs[:, 0] = inputs[:, -1] + 1e-1 * inputs[:, 0]
    units = columns // size
    found = prices(inputs.T @ inputs, weight.T @ metric @ weight, size)
    order = found.argsort(stable=True).tolist()

    def error(gone: list[int]) -> float:
        left = [u * size + c for u in range(units) if u not in gone for c in range(size)]
        return _error(inputs, weight, metric, left)

    whole, spent = error(list(range(units))), 0.0
    for number, unit in enumerate(order[:6]):
        before, now = error(order[:number]), error(order[: number + 1])
        spent = max(spent, now - before)
        assert found[unit] == pytest.approx(spent, rel=0.03, abs=1e-3 * whole)
        others = [
            error([*order[:number], each]) for each in range(units) if each not in order[:number]
        ]
        assert now <= min(others) + 1e-3 * whole


def test_of_two_columns_that_say_the_same_one_is_free() -> None:
    inputs, weight, metric = _problem(12)
    inputs[:, 3] = 2 * inputs[:, 8]
    weight[:, (3, 8)] *= 3
    found = prices(inputs.T @ inputs, weight.T @ metric @ weight)
    first, second = found.argsort()[:2].tolist()
    assert first in (3, 8)
    # but for the damping
    assert found[first] < 1e-2 * found[second]
    # the norm of what they add says otherwise
    added = weight.norm(dim=0) * inputs.norm(dim=0)
    assert float(added[first]) > float(added.min())


def test_blocks_of_columns_and_single_ones_agree_where_units_are_single() -> None:
    inputs, weight, metric = _problem(90)
    both = (inputs.T @ inputs, weight.T @ metric @ weight)
    damped = both[0] + 1e-4 * both[0].diagonal().mean() * torch.eye(90, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    # each works in what it is given
    single, order = elimination._single(inverse.clone(), both[1].clone())
    whole, other = elimination._whole(inverse, both[1], 1)
    assert order.tolist() == other.tolist()
    torch.testing.assert_close(single, whole, rtol=1e-6, atol=1e-9)


def test_the_best_of_all_sets_is_found_where_columns_are_few() -> None:
    inputs, weight, metric = _problem(6, seed=3)
    found = prices(inputs.T @ inputs, weight.T @ metric @ weight)
    kept = sorted(found.argsort()[3:].tolist())
    errors = {
        each: _error(inputs, weight, metric, list(each))
        for each in itertools.combinations(range(6), 3)
    }
    assert errors[tuple(kept)] <= sorted(errors.values())[3]


def test_what_is_never_read_costs_nothing() -> None:
    assert prices(torch.zeros(8, 8), torch.eye(8)).tolist() == [0.0] * 8
    assert prices(torch.zeros(8, 8), torch.eye(8), 4).tolist() == [0.0] * 2
    inputs, weight, metric = _problem(12)
    inputs[:, 5] = 0
    found = prices(inputs.T @ inputs, weight.T @ metric @ weight)
    assert int(found.argmin()) == 5
    assert found[5] == pytest.approx(0, abs=1e-4 * float(found.max()))
