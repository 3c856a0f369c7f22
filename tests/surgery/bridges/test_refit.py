"""`refit`: the layers behind a cut, or that lost a part of themselves, fitted as well."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from surgery.bridges.toys import Gated, PreNorm, Weights, calibration, tower, without
from tiny import tiny_inputs

from interlace.errors import ConfigError
from interlace.models import VLM, family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune
from interlace.surgery.bridges.fold import fit_fold
from interlace.surgery.bridges.gaps import Gap
from interlace.surgery.bridges.observe import Pair


def _fit(dense: Any, student: Any, gaps: Any) -> Any:
    with torch.no_grad():
        return fit_fold(Pair(dense, student, calibration(num_batches=8), Weights()), gaps)


def _far(dense: Any, student: Any) -> float:
    (unseen,) = calibration(num_batches=1, seed=2).batches
    return float((student(unseen)[0] - dense(unseen)[0]).norm())


def test_layers_behind_a_cut_bring_the_student_nearer_than_the_fold_alone() -> None:
    dense = tower(PreNorm)
    (folded, gaps), (refitted, more) = without(dense, (2,)), without(dense, (2,), refit=True)
    _fit(dense, folded, gaps)
    bridges = _fit(dense, refitted, more)
    assert _far(dense, refitted) < 0.9 * _far(dense, folded)
    assert [(b.dropped, b.after) for b in bridges] == [
        ((2,), 1),
        ((), 3),
        ((), 4),
        ((), 5),
        ((), 6),
    ]
    assert [b.kind for b in bridges][:2] == ["fold", "refit"]
    assert all(b.kind == "none" or b.error_after < b.error_before for b in bridges)
    shared = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {n.split(".")[1] for n, p in refitted.named_parameters() if p.data_ptr() not in shared}
    assert own == {str(i + 1) for i, b in enumerate(bridges) if b.kind != "none"}


def test_a_layer_whose_like_gives_the_same_stays_as_it_is() -> None:
    dense = tower(PreNorm)
    student, _ = without(dense, ())
    (bridge,) = _fit(dense, student, [Gap("text", "layers", (), 3, 4, 4)])
    assert bridge.kind == "none"
    assert all(map(torch.equal, student.state_dict().values(), dense.state_dict().values()))


def test_a_layer_without_a_place_to_fit_is_left_and_says_so() -> None:
    dense = tower(PreNorm)
    dense.layers[4] = tower(Gated).layers[4]
    student, gaps = without(dense, (2,), refit=True)
    bridges = _fit(dense, student, gaps)
    assert [b.after for b in bridges if "does not add" in b.note] == [4]


class _Tapped(torch.nn.Module):
    """Hands out the state behind layer 4 as well."""

    def __init__(self, inner: Any, position: int) -> None:
        super().__init__()
        self.layers, self.position = inner.layers, position

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = [hidden := layer(hidden) for layer in self.layers]
        return states[-1], states[self.position]


def test_what_others_read_of_a_layer_comes_nearer_too() -> None:
    dense = tower(PreNorm)
    (plain, gaps), (student, more) = without(dense, (2,)), without(dense, (2,), refit=True)
    _fit(dense, plain, gaps)
    _fit(_Tapped(dense, 4), _Tapped(student, 3), more)
    (unseen,) = calibration(num_batches=1, seed=2).batches
    goal = _Tapped(dense, 4)(unseen)[1]
    far = [(_Tapped(each, 3)(unseen)[1] - goal).norm() for each in (student, plain)]
    assert far[0] < far[1]


@pytest.fixture(scope="module")
def clip() -> VLM:
    model = tiny.clip(text=5, vision=3)
    return VLM(model, family_of(model), name="clip")


# neurons of one layer, and the attention of another
NARROW = {
    "mlp": TowerPlan(5, cut={"mlp": {1: tuple(range(8))}}),
    "attention": TowerPlan(5, parts={"self_attn": (2,)}),
}


@pytest.mark.parametrize("what", NARROW)
@pytest.mark.parametrize("bridge", ["fold", "refit"])
def test_narrower_layers_are_fitted_alone_or_from_the_first_one_on(
    clip: VLM, what: str, bridge: str
) -> None:
    plan = Plan({"text": NARROW[what]}, standard=False)
    data = [tiny_inputs("clip", clip.model, batch=4, seed=seed) for seed in range(4)]
    student = prune(clip, plan, bridges=bridge, data=data)
    first = 1 if what == "mlp" else 2
    fitted = list(range(first, 5)) if bridge == "refit" else [first]
    assert [bridge.after for bridge in student.record.bridges] == fitted
    assert student.record.bridges[0].kind == "refit"
    plain = prune(clip, plan)
    inputs = tiny_inputs("clip", clip.model, batch=4, seed=9)
    with torch.no_grad():
        goal, near, far = (each.model(**inputs).text_embeds for each in (clip, student, plain))
    assert (near - goal).norm() < (far - goal).norm()


def test_a_tower_that_loses_nothing_is_refused(clip: VLM) -> None:
    plan = Plan({"text": TowerPlan(5, drop=(2,)), "vision": TowerPlan(3)})
    with pytest.raises(ConfigError, match="vision tower, which loses nothing by this plan"):
        prune(clip, plan, bridges={"vision": "refit"}, data=[tiny_inputs("clip", clip.model)])
