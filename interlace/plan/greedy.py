"""Rules that drop one layer after the other, each time by the loss of what would be left.

Legend: L layers, n layers to drop.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

from interlace._progress import track
from interlace.errors import ConfigError, PlanError
from interlace.plan.rules import by_score, finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from interlace.plan.rules import Choice, Problem

    Shortlist = Callable[[list[int]], list[int]]

# How many layers a round of `compensated` tries: enough that the cheap order need not be right.
CANDIDATES = 4

T = TypeVar("T")


def sleb(problem: Problem) -> Choice:
    """Drop one layer after the other, each time the one without which the loss is lowest.

    The first and the last layer are never dropped, as in the original (its barriers of one layer
    at either end). Ties go to the lower index; a loss that is not a number counts as infinite.
    n rounds take about n (L - 2) calls of `loss`. The scores shown are the losses without the
    single layer.

    Source: SLEB (arXiv 2402.09025), algorithm 1.

    Raises:
        ConfigError: no loss was given.
        PlanError: too few layers, or no choice leaves a finite loss.
    """
    return _greedy(problem, "sleb", lambda free: free)


def compensated(problem: Problem) -> Choice:
    """Drop one layer after the other; judge the likely candidates with their cuts repaired.

    As `sleb`, but `loss` is that of the student as it will be, with the bridges of all its cuts
    fitted. That is dear, so each round tries only the `CANDIDATES` layers with the highest layer
    scores: cosine, or what `weights` name. n rounds take at most n times `CANDIDATES` calls of
    `loss`, each of which fits a bridge to every cut so far.

    Source: repair inside of the selection: Prune&Comp (arXiv 2507.18212), which scores again after
    every repaired drop; here the candidates themselves are repaired before they are compared.

    Raises:
        ConfigError: no loss was given.
        PlanError: pack 1 was not scored, too few layers, or no choice leaves a finite loss.
    """
    scores = problem.scored(with_tail=True)

    def shortlist(free: list[int]) -> list[int]:
        # layers without a score come last
        return by_score((layer, scores.get(layer, -math.inf)) for layer in free)[:CANDIDATES]

    return _greedy(problem, "compensated", shortlist)


def no_choice(tower: str, what: str, gone: object, refused: PlanError | None) -> PlanError:
    """Return the error for a round in which no candidate had a finite loss.

    Args:
        tower: its name.
        what: is taken out, such as "layer".
        gone: what went before.
        refused: why the last student that was to be judged could not be made.
    """
    stuck = f"Tower '{tower}': no {what} can be taken out after {gone}"
    if refused is None:
        return PlanError(
            f"{stuck} without the loss becoming infinite or not a number. Check the loss callback "
            "and its data."
        )
    return PlanError(
        f"{stuck}, since no student without another one can be made to be judged: {refused} This "
        "rule takes out one after the other; 'sleb' judges without making students, 'shortgpt' and "
        "others by scores alone."
    )


def losses_of(
    candidates: Iterable[T], loss: Callable[[T], float]
) -> tuple[dict[T, float], PlanError | None]:
    """Return candidate -> loss without it, and the last refusal of a student.

    NaN counts as infinite, and so does the loss of a student that cannot be made.
    """
    found: dict[T, float] = {}
    refused = None
    for each in candidates:
        try:
            value = float(loss(each))
        except PlanError as error:
            value, refused = math.inf, error
        found[each] = math.inf if math.isnan(value) else value
    return found, refused


def _greedy(problem: Problem, name: str, shortlist: Shortlist) -> Choice:
    loss = problem.loss
    if loss is None:
        raise ConfigError(
            f"The rule '{name}' chooses by the loss of the model without the layers. Give "
            "make_plan(..., loss=callback), where callback(tower, dropped_layers) returns it; "
            "interlace.layer_loss(vlm, calibration, rule) makes one."
        )
    inner = [layer for layer in problem.candidates if 0 < layer < problem.num_layers - 1]
    if len(inner) < problem.num_drop:
        raise problem.shortage(len(inner), "layers between the first and the last")
    drop: list[int] = []
    reasons: dict[int, str] = {}
    alone: tuple[float | None, ...] | None = None

    def without(layer: int) -> float:
        return loss(problem.tower, (*drop, layer))

    rounds = track(range(problem.num_drop), description=f"{name}, {problem.tower}")
    for number in rounds:
        losses, refused = losses_of(shortlist(inner), without)
        best = min(losses, key=lambda each, losses=losses: (losses[each], each))  # type: ignore[misc]
        if math.isinf(losses[best]):
            raise no_choice(problem.tower, "layer", drop, refused) from refused
        if alone is None:
            alone = tuple(losses.get(layer) for layer in range(problem.num_layers))
        drop.append(best)
        inner.remove(best)
        reasons[best] = f"round {number + 1}: lowest loss {losses[best]:.4g}"
    return finish(problem, drop, reasons, alone)
