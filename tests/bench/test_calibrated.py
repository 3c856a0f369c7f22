"""Weights that are zeroed by what layers are given: the formulas, and what is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from methods import METHODS
from methods.calibrated import BLOCK, DAMPING, grams, sparsegpt, wanda
from methods.case import BATCH_SIZE
from methods.sparse import whole

from interlace._torch_utils import inference
from interlace.surgery.bridges.calibration import Calibration

if TYPE_CHECKING:
    from methods import Case


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and inputs that have much in common."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    inputs = torch.randn(4 * columns, columns, generator=draw, dtype=torch.float64) @ mixed
    weight = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return weight, inputs


def test_wanda_zeros_of_every_row_what_adds_least() -> None:
    weight, inputs = problem(5, 8)
    made = wanda(weight, inputs.T @ inputs, 0.5)
    for before, after in zip(weight, made, strict=True):
        sizes = (before * inputs).norm(dim=0).tolist()
        order = sorted(range(8), key=sizes.__getitem__)
        assert set((after == 0).nonzero().flatten().tolist()) == set(order[:4])
        assert torch.equal(after[order[4:]], before[order[4:]])


def test_sparsegpt_is_optimal_brain_surgery_column_by_column() -> None:
    weight, inputs = problem(6, 10)
    gram = inputs.T @ inputs
    made = sparsegpt(weight, gram, 0.4)
    gone = made == 0
    assert int(gone.sum()) == 24
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    expected = weight.clone()
    for column in range(10):
        # of what is left once the columns before are settled
        inverse = torch.linalg.inv(damped[column:, column:])
        removed = torch.where(gone[:, column], expected[:, column], 0.0)
        expected[:, column:] -= torch.outer(removed / inverse[0, 0], inverse[0])
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


def test_making_up_for_zeros_leaves_less_error() -> None:
    # more than a block of columns
    weight, inputs = problem(16, BLOCK + 40)
    gram = inputs.T @ inputs

    def error(made: torch.Tensor) -> float:
        return float((inputs @ (made - weight).T).norm())

    assert error(sparsegpt(weight, gram, 0.5)) < 0.5 * error(wanda(weight, gram, 0.5))


def test_inputs_that_are_never_active_go() -> None:
    weight, inputs = problem(4, 8)
    inputs[:, 3] = 0
    made = sparsegpt(weight, inputs.T @ inputs, 0.25)
    assert torch.isfinite(made).all()
    assert not made[:, 3].any()


def test_padding_is_not_looked_at(quarter: Case) -> None:
    student = whole(quarter)
    alone = Calibration(quarter.vlm, quarter.shared.calibration, 1)
    padded = Calibration(quarter.vlm, quarter.shared.calibration, BATCH_SIZE)
    mask = padded.batches[0]["attention_mask"]
    assert not mask.all()
    with inference(student.model):
        for tower in ("text", "vision"):
            found = grams(quarter, student, tower, 2, padded)
            one_by_one = grams(quarter, student, tower, 2, alone)
            # query, key, value, output, two of the feed-forward part
            assert len(found) == 6
            for module, gram in found.items():
                torch.testing.assert_close(gram, one_by_one[module], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_layers_are_pruned_on_what_pruned_layers_give(name: str, quarter: Case) -> None:
    student = METHODS[name].make(quarter).student
    data = Calibration(quarter.vlm, quarter.shared.calibration, BATCH_SIZE)
    share = quarter.parameters("text") / sum(
        each.weight.numel()
        for each in student.towers["text"].layers.modules()
        if isinstance(each, torch.nn.Linear)
    )
    dense = quarter.vlm.towers["text"].layers[3]
    prune = {"wanda": wanda, "sparsegpt": sparsegpt}[name]
    with inference(student.model):
        found = grams(quarter, student, "text", 3, data)
    # what the others are given changed once these were pruned
    for projection in ("q_proj", "k_proj", "v_proj"):
        before = getattr(dense.self_attn, projection).weight.detach()
        after = getattr(student.towers["text"].layers[3].self_attn, projection)
        torch.testing.assert_close(after.weight.detach(), prune(before, found[after], share))
