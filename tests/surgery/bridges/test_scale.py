"""`scale`: what it measures, where it is folded, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery.bridges.toys import (
    WIDTH,
    PostNorm,
    PreNorm,
    Scaled,
    Tower,
    Weights,
    calibration,
    tower,
    without,
)
from torch import nn

from interlace.errors import PlanError
from interlace.models.states import shift_input
from interlace.surgery.bridges.observe import Pair, observe
from interlace.surgery.bridges.scale import fit_scale
from interlace.surgery.bridges.structure import Call, find_writers


def _fit(dense: Any, student: Any, gaps: Any) -> Any:
    with torch.no_grad():
        return fit_scale(Pair(dense, student, calibration(), Weights()), gaps)


def _normed(drop: tuple[int, ...]) -> tuple[Tower, Tower, Any]:
    dense = tower(PreNorm, norm=nn.LayerNorm(WIDTH, eps=1e-12))
    for layer in dense.layers:
        layer.norm.eps = 1e-12
    return dense, *without(dense, drop)


def test_weights_hold_what_factors_on_the_stream_would_do() -> None:
    dense, student, gaps = _normed((2, 3, 5))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    plain, _ = without(dense, (2, 3, 5))
    bridges = _fit(dense, student, gaps)
    for gap, bridge in zip(gaps, bridges, strict=True):
        factor = bridge.settings["factor"]
        assert abs(factor - 1) > 0.01
        shift_input(plain.layers[gap.position], lambda h, factor=factor: h * factor)
    unseen = calibration(seed=2).batches[0]
    assert torch.allclose(student(unseen)[0], plain(unseen)[0], rtol=1e-9, atol=1e-9)
    # and the stream of the reference is as long as the teacher's behind the last gap
    seen = list(observe(Pair(dense, plain, calibration(), Weights()), gaps[1]))
    lengths = [
        sum(float(s.weight @ getattr(s, what).norm(dim=1)) for s in seen)
        for what in ("goal", "state")
    ]
    factor = bridges[1].settings["factor"]
    # the hook that scales the state runs before the one that looks at it
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-9), factor
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_only_what_writes_behind_the_first_gap_changes() -> None:
    dense, student, gaps = _normed((2,))
    _fit(dense, student, gaps)
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {n for n, p in student.named_parameters() if p.data_ptr() not in shared}
    positions = range(2, len(student.layers))
    assert own == {f"layers.{i}.down.{leaf}" for i in positions for leaf in ("weight", "bias")}


def test_a_gap_at_the_front_is_scaled_and_one_at_the_end_needs_nothing() -> None:
    dense, student, gaps = _normed((0, 6))
    first, last = _fit(dense, student, gaps)
    assert first.kind == "scale"
    assert last.kind == "none"
    assert "no layer behind it is read" in last.note


@pytest.mark.parametrize("kind", [PostNorm, Scaled])
def test_layers_that_do_not_hand_their_input_on_are_refused(kind: type[nn.Module]) -> None:
    dense = tower(kind, norm=nn.LayerNorm(WIDTH))
    student, gaps = without(dense, (3,))
    with pytest.raises(PlanError, match=rf"cannot be folded.*{kind.__name__}"):
        _fit(dense, student, gaps)


def test_a_reader_without_norm_is_refused_and_nothing_is_left_half_done() -> None:
    dense = tower(PreNorm)
    student, gaps = without(dense, (3,))
    with pytest.raises(PlanError, match="reads the stream without a norm"):
        _fit(dense, student, gaps)


def test_writers_of_attention_and_feed_forward_are_told_from_what_feeds_them() -> None:
    class Block(nn.Module):
        """Square maps everywhere, so shapes alone tell nothing."""

        def __init__(self) -> None:
            super().__init__()
            for name in ("value", "out", "gate", "up", "down"):
                setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name != "out"))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + self.out(self.value(self.norm(hidden)))
            normed = self.norm(hidden)
            return hidden + self.down(self.gate(normed).sigmoid() * self.up(normed))

    torch.manual_seed(0)
    block = Block().double()
    with torch.no_grad():
        found = find_writers(Call(block, (calibration().batches[0],), {}))
    assert found == [block.out, block.down]
