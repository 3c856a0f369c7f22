"""`scale`: one factor per gap, so that the residual stream is as long behind it as it was.

The factor is the ratio of the mean token norms, mean |t| over mean |s|, of the teacher's and the
student's states behind the removed layers. In a pre-norm tower every reader of the stream is a norm
that undoes factors, so instead of the stream all that is written behind the gap is scaled, by the
inverse: attention output and feed-forward projections of the layers behind it. That touches no
embedding (often tied to the head), no image feature and no DeepStack feature before the gap, and
the tower's final norm undoes what is left.

Derivation: docs/math/bridges.md.
Source: Prune&Comp, arXiv 2507.18212, which folds the factor into what is written before the cut.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.errors import PlanError
from interlace.models.states import shift_input
from interlace.surgery.bridges.observe import observe
from interlace.surgery.bridges.structure import (
    agree,
    find_writers,
    first_calls,
    predictions,
)
from interlace.surgery.bridges.weights import Weights, changed, put_weights, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace.records import Bridge
    from interlace.surgery.bridges.calibration import Calibration
    from interlace.surgery.bridges.gaps import Gap
    from interlace.surgery.bridges.observe import Pair

_INSTEAD = "Use bridges='fold' or 'none' for this tower."


def fit_scale(pair: Pair, gaps: Sequence[Gap]) -> list[Bridge]:
    """Scale the student behind every gap of one tower, front to back.

    Each factor is measured on what the student computes with those before it in place, and holds
    for all that is written behind its gap.

    Args:
        pair: the models; scaled projections of the student get weights of their own.
        gaps: the gaps of the tower, front to back.

    Returns:
        What was done at each gap.

    Raises:
        PlanError: the factor cannot be folded: layers behind a gap are not pre-norm, or something
            behind it reads or adds to the stream without a norm.
    """
    student, calibration = pair.student, pair.calibration
    layers: Any = student.get_submodule(gaps[0].path)
    batch, writers = _writers(student, gaps[0], calibration)
    plain = {each: weights_of(each) for found in writers.values() for each in found}
    made: list[Bridge] = []
    factors: dict[int, float] = {}
    whole = 1.0
    for gap in gaps:
        if gap.ends:
            note = "no layer behind it is read, so no weights are left to fold a factor into"
            made.append(gap.bridge(note=note))
            continue
        sums = _measure(pair, gap)
        # the student's stream is short of all factors so far, so this ratio holds them all
        before, whole = whole, sums.length_of_goal / sums.length_of_state
        factors[gap.position] = whole / before
        for position in range(gap.position, len(layers)):
            for writer in writers[position]:
                weight, bias = (_divided(each, whole) for each in plain[writer])
                put_weights(writer, (weight, bias))
        made.append(
            gap.bridge(
                "scale",
                error_before=sums.error(before),
                error_after=sums.error(whole),
                settings={"factor": factors[gap.position]},
            )
        )
    _check(student, gaps[0], factors, plain, partial(calibration.run, student, batch))
    return made


@dataclass
class _Sums:
    """Weighted sums over tokens: lengths over all of them, squares over the held-out ones."""

    length_of_goal: float = 0.0
    length_of_state: float = 0.0
    goal_goal: float = 0.0
    goal_state: float = 0.0
    state_state: float = 0.0

    def error(self, factor: float) -> float:
        """Held-out |t - factor s|^2 as a share of |t|^2."""
        left = self.goal_goal - 2 * factor * self.goal_state + factor**2 * self.state_state
        return max(0.0, left / self.goal_goal)


def _measure(pair: Pair, gap: Gap) -> _Sums:
    sums = _Sums()
    for seen in observe(pair, gap):
        goal, state, weight = seen.goal.double(), seen.state.double(), seen.weight
        sums.length_of_goal += float(weight @ goal.norm(dim=1))
        sums.length_of_state += float(weight @ state.norm(dim=1))
        held = weight * seen.held
        sums.goal_goal += float(held @ goal.square().sum(1))
        sums.goal_state += float(held @ (goal * state).sum(1))
        sums.state_state += float(held @ state.square().sum(1))
    return sums


def _writers(
    student: nn.Module, first: Gap, calibration: Calibration
) -> tuple[Mapping[str, Any], dict[int, list[nn.Linear]]]:
    """Find the projections with which layers behind the first gap write, and a batch to try them.

    Raises:
        PlanError: one of them is not pre-norm.
    """
    layers: Any = student.get_submodule(first.path)
    behind = list(layers)[first.position :]
    called = first_calls(behind, calibration.probes, partial(calibration.run, student))
    if called is None:
        raise PlanError(f"No batch of the data reaches the {first.tower} tower behind {first}.")
    batch, calls = called
    found: dict[int, list[nn.Linear]] = {}
    for position, call in enumerate(calls, start=first.position):
        writers = find_writers(call)
        if writers is None:
            raise PlanError(
                f"bridges='scale' cannot be folded into the {first.tower} tower: position "
                f"{position} ({type(call.layer).__name__}) does not hand its input on beside its "
                "attention and feed-forward parts, as post-norm layers and learned residual scales "
                f"do not. {_INSTEAD}"
            )
        found[position] = writers
    return batch, found


def _divided(parameter: Any, factor: float) -> Any:
    return changed(parameter, lambda value: value / factor)


def _check(
    student: nn.Module,
    first: Gap,
    factors: Mapping[int, float],
    plain: Mapping[nn.Linear, Weights],
    run: Any,
) -> None:
    """Check that the folded factors have the same effect as factors on the stream itself.

    Raises:
        PlanError: the predictions differ, so something reads or adds to the stream as it is.
    """
    folded = predictions(run())
    scaled = {each: weights_of(each) for each in plain}
    layers: Any = student.get_submodule(first.path)
    with contextlib.ExitStack() as stack:
        for position, factor in factors.items():
            stack.enter_context(shift_input(layers[position], partial(torch.mul, other=factor)))
        for writer, weights in plain.items():
            put_weights(writer, weights)
        try:
            expected = predictions(run())
        finally:
            for writer, weights in scaled.items():
                put_weights(writer, weights)
    if not all(map(agree, folded, expected)):
        raise PlanError(
            f"bridges='scale' cannot be folded into the {first.tower} tower: with the factors "
            f"{', '.join(f'{each:.4g}' for each in factors.values())} in the weights the model "
            "predicts something else than with the factors on its hidden states, so something "
            "behind the cut reads the stream without a norm (vision_feature_layer does) or adds "
            f"to it (DeepStack does). {_INSTEAD}"
        )
