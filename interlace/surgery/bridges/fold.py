"""`fold`: the effect of the removed layers, folded into the last projection before the cut.

`refit` goes on with the kept layers behind: each one's last projection is fitted, in the same way,
to what the same layer gives in the teacher, so that what a cut has left over does not grow on its
way through them.

With x the input of that projection W, o = W x + b what it adds to the residual stream, s the
student's state behind the cut and t the teacher's, least squares finds the change of W (and of b
where there is one) that explains what is missing:

    min over M of   sum over tokens of  weight |t - s - M x|^2  +  penalty |M|^2

and W + M takes the place of W; where a layer multiplies what it adds by a factor per channel
(LayerScale), M is divided by it. In post-norm layers (BERT, BLIP's text towers) the sum passes
LayerNorm, s = gamma (z - mean) / sigma + beta, so the missing part is brought in front of it to
first order, sigma (t - s) / gamma, with weights 1 / sigma^2, and the fit is repeated from where the
last one arrived. Where a part between two such norms was taken out, one runs behind the other:
sigma and gamma are then the products of both. Where a norm stands behind the projection and its
result is added (Gemma, GLM), s = residual + gamma z / sigma with z = o, which is fitted in the same
way; then gamma, since no projection in front of a norm makes what it adds longer.

Derivation: docs/math/bridges.md.
Source: ReplaceMe, arXiv 2505.02819, solves for a D x D map behind the projection; here the
projection itself is fitted, which holds that map as the special case M = (T - I) W.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import PlanError
from interlace.models.discovery import routes
from interlace.surgery.bridges.least_squares import NormalEquations, choose
from interlace.surgery.bridges.names import FOLD, REFIT
from interlace.surgery.bridges.observe import Pair, observe
from interlace.surgery.bridges.resting import Start, idling, starting
from interlace.surgery.bridges.structure import (
    Norm,
    Projection,
    find_projection,
    first_calls,
    read_elsewhere,
)
from interlace.surgery.bridges.weights import Weights, changed, put_weights, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace.records import Bridge
    from interlace.surgery.bridges.gaps import Gap

# Linearised fits through a LayerNorm are repeated at most so often.
_MAX_ROUNDS = 4
# Channels whose norm weight is small against the others say little about what stands before it.
_DAMPING = 0.1


def fit_fold(pair: Pair, gaps: Sequence[Gap]) -> list[Bridge]:
    """Fit the projection before every gap of one tower, front to back.

    Each one is fitted on what the student computes with those before it in place. So it corrects
    what they left over, and its inputs are those that it will see.

    Args:
        pair: the models; the student's projections get weights of their own.
        gaps: the gaps of the tower, front to back; those of no layers refit the one before them.

    Returns:
        What was done at each gap.

    Raises:
        PlanError: a layer to fold into does not add its last projection to the residual stream.
    """
    return [_fold(pair, gap) for gap in gaps]


def _fold(pair: Pair, gap: Gap) -> Bridge:
    projection = _place(pair, gap)
    if isinstance(projection, str):
        return gap.bridge(note=projection)
    linear = projection.linear
    # held-out error before each round, and the weights it is the error of
    rounds: list[tuple[float, Weights]] = []
    ridge = math.inf
    while True:
        both = _equations(pair, gap, projection)
        # through a norm the held-out samples decide how long it goes on, so they stay apart
        solution = choose(*both, refit=not projection.norms)
        better = not rounds or solution.before < rounds[-1][0]
        if better:
            rounds.append((solution.before, weights_of(linear)))
        if not better or solution.change is None or len(rounds) > _MAX_ROUNDS:
            break
        ridge = min(ridge, solution.ridge)
        _change(projection, solution.change)
        if not projection.norms:
            # the error of a linear fit is known without measuring it
            rounds.append((solution.after, weights_of(linear)))
            break
    error, best = rounds[-1]
    put_weights(linear, best)
    settings = {"ridge": ridge, "rounds": len(rounds) - 1} if len(rounds) > 1 else {}
    if projection.sandwiched:
        gained = _gain(pair, gap, projection.norms[0])
        if gained < error:
            error, settings["gain"] = gained, True
    if not settings:
        return gap.bridge(note="no change of the layer before it came closer on held-out samples")
    return gap.bridge(
        FOLD if gap.dropped else REFIT,
        error_before=rounds[0][0],
        error_after=error,
        settings=settings,
    )


def _place(pair: Pair, gap: Gap) -> Projection | str:
    """Find the projection before a gap, or say why there is none to be changed.

    Raises:
        PlanError: there is none, and removed layers would have to be folded into it.
    """
    if gap.after is None:
        return "no kept layer stands before it that could take it over"
    layers: Any = pair.student.get_submodule(gap.path)
    layer = layers[gap.position - 1]
    reached, calibration = pair.reached, pair.calibration

    def run(batch: Mapping[str, Any]) -> Any:
        # a probe of its own starts at the front; batches before this one do not reach the tower
        known = reached.student if any(batch is each for each in calibration.batches) else Start()
        with starting(layers, known, gap.tower, reached.forms):
            return calibration.run(pair.student, batch)

    with idling(layers[gap.position :], gap.tower, reached.forms):
        called = first_calls([layer], calibration.probes, run)
    found = find_projection(called[1][0]) if called else None
    if called is None or found is None:
        why = (
            "does not add its last linear projection to the residual stream, nor straight before a "
            "LayerNorm"
        )
        if any(map(routes, layer.modules())):
            why = "adds what experts make of its input, which is no product of one matrix"
        if not gap.dropped or gap.narrowed:
            return f"layer {gap.after} {why}"
        raise PlanError(
            f"Layer {gap.after} of the {gap.tower} tower ({type(layer).__name__}) {why}, so "
            f"nothing can be folded into it for {gap}. Use bridges='none' for this tower."
        )
    # others that read a layer expect what it gave in the teacher, which is what a refit aims at
    if gap.dropped and not gap.ends:
        behind = layers[gap.position]
        if read_elsewhere(layer, behind, partial(run, called[0])):
            return (
                f"the output of layer {gap.after} is also read by another part of the model, which "
                "expects it as it is"
            )
    return found


def _equations(
    pair: Pair, gap: Gap, projection: Projection
) -> tuple[NormalEquations, NormalEquations]:
    """Stream the normal equations of the samples to fit on, and of the held-out ones."""
    linear = projection.linear
    norms = {f"norm {place}": norm for place, norm in enumerate(projection.norms)}
    modules = {"features": linear, **{place: norm.module for place, norm in norms.items()}}
    both = tuple(
        NormalEquations(
            linear.in_features,
            linear.out_features,
            intercept=linear.bias is not None,
            device=linear.weight.device,
        )
        for _ in range(2)
    )
    for seen in observe(pair, gap, modules):
        goal, weight = seen.goal.double(), seen.weight
        missing = goal - seen.state.double()
        for place, norm in norms.items():
            sigma = norm.sigma(seen.inputs[place])
            weight = weight / sigma.square()
            goal, missing = goal * sigma[:, None], missing * sigma[:, None]
        for equations, rows in zip(both, (~seen.held, seen.held), strict=True):
            features = seen.inputs["features"][rows]
            equations.add(features, missing[rows], weight[rows], goal[rows])
    return both[0], both[1]


def _gain(pair: Pair, gap: Gap, norm: Norm) -> float:
    """Fit the weight of a norm whose result is added to the stream, channel by channel.

    What a projection in front of a norm gives cannot become longer; its weight can.

    Returns:
        The error on held-out samples, as a share of the goal's squared size; the weight is left as
        it is where no other is better on them.
    """
    # per channel, on samples to fit on and on held-out ones: sum w n d, sum w n^2
    sums = torch.zeros(2, 2, len(norm.gamma), dtype=torch.float64, device=norm.gamma.device)
    energy = size = 0.0
    for seen in observe(pair, gap, {"norm": norm.module}):
        given, goal = seen.inputs["norm"].double(), seen.goal.double()
        normed, missing = given / norm.sigma(given)[:, None], goal - seen.state.double()
        for own, rows in zip(sums, (~seen.held, seen.held), strict=True):
            weighed = seen.weight[rows, None] * normed[rows]
            own += torch.stack([(weighed * each[rows]).sum(0) for each in (missing, normed)])
        held = seen.weight[seen.held]
        energy += float(held @ missing[seen.held].square().sum(1))
        size += float(held @ goal[seen.held].square().sum(1))
    (cross, square), (held_cross, held_square) = sums
    change = torch.where(square > 0, cross / square, torch.zeros_like(cross))
    left = energy - float((2 * change * held_cross - change.square() * held_square).sum())
    if left < energy:
        module: Any = norm.module
        module.weight = changed(module.weight, lambda value: value + change)
    return min(left, energy) / (size or 1.0)


def _change(projection: Projection, change: torch.Tensor) -> None:
    """Give the projection weights of its own: old ones plus the change M [F, D]."""
    linear = projection.linear
    if projection.norms:
        # the equations are those of gamma times the change
        gamma = torch.stack([norm.gamma for norm in projection.norms]).prod(0)
        damped = gamma.square() + (_DAMPING**2) * gamma.square().mean()
        change = change * (gamma / damped)
    if projection.scale is not None:
        # nothing that a channel without a factor gives would be seen
        scale = projection.scale
        change = torch.where(scale == 0, torch.zeros_like(change), change / scale)
    features = linear.in_features
    weight = changed(linear.weight, lambda value: value + change[:features].T)
    bias = changed(linear.bias, lambda value: value + change[features])
    put_weights(linear, (weight, bias))
