"""The rule that takes out single attention and feed-forward parts instead of whole layers."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

from interlace._progress import track
from interlace.errors import ConfigError, PlanError
from interlace.plan.greedy import losses_of, no_choice
from interlace.plan.rules import Choice, nearest_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from interlace.plan.rules import Problem
    from interlace.records import TowerShape

    # (place in a layer, layer)
    Part = tuple[str, int]

# How many parts of every kind a round tries, but for the first, which tries all.
CANDIDATES = 4


def compensated_parts(problem: Problem) -> Choice:
    """Take out one part after the other, until as many parameters are gone as n layers have.

    Parts are the attentions and the feed-forward parts of layers; a layer that has lost all of them
    is dropped. Every round takes the part without which `loss` rises least per parameter, `loss`
    being that of the student with everything repaired, as in `compensated`. The first round tries
    all parts, later ones the `CANDIDATES` of every kind that were cheapest then. It ends when what
    is gone comes nearest to n average layers. The first and the last layer stay whole, and
    cross-attention goes last of its layer. Layers that lost a part are tuned, and the neighbours of
    dropped ones.

    Source: BlockPruner (arXiv 2406.10594) prunes such parts one by one, judged by perplexity and
    without repair; the repair inside of the selection is that of `compensated`.

    Raises:
        ConfigError: no loss was given, or one that cannot be asked for parts.
        PlanError: the parts are not known, too few may go, or no choice leaves a finite loss.
    """
    ask = _checked_loss(problem)
    shape = _shape_of(problem)
    sizes = _sizes(problem, shape)
    half = min(sizes.values(), default=0) / 2
    left = problem.num_drop * sum(shape.layer_parameters) / problem.num_layers
    if sum(sizes.values()) < left - half:
        inner = len({layer for _, layer in sizes})
        raise problem.shortage(inner, "layers between the first and the last")
    gone: list[Part] = []
    reasons: dict[int, str] = {}
    first: dict[Part, float] = {}
    loss = 0.0

    def without(part: Part) -> float:
        return ask(problem.tower, *_grouped([*gone, part], shape))

    most = math.ceil((left + half) / (2 * half)) if half else 0
    for number in track(range(most), description=f"compensated_parts, {problem.tower}"):
        fitting = [
            part
            for part, size in sizes.items()
            if part not in gone and size <= left + half and _may_go(part, gone, shape)
        ]
        losses, refused = losses_of(_likely(fitting, first), without)
        if not losses:
            break
        rises = {part: (value - loss) / sizes[part] for part, value in losses.items()}
        best = min(rises, key=lambda part, rises=rises: (rises[part], part))  # type: ignore[misc]
        if math.isinf(losses[best]):
            raise no_choice(problem.tower, "part", gone, refused) from refused
        first = first or rises
        gone.append(best)
        left, loss = left - sizes[best], losses[best]
        site, layer = best
        note = f"round {number + 1}: without {site}, loss {loss:.4g}"
        reasons[layer] = f"{reasons[layer]}; {note}" if layer in reasons else note
    drop, parts = _grouped(gone, shape)
    tune = nearest_kept(problem, drop)
    losing = sorted({layer for layers in parts.values() for layer in layers} - set(tune))
    return Choice(drop, (*tune, *losing), reasons=reasons, parts=parts)


def _checked_loss(problem: Problem) -> Callable[..., float]:
    asks = (
        "The rule 'compensated_parts' chooses by the loss of the model without layers and parts. "
        "Give make_plan(..., loss=callback), where callback(tower, dropped_layers, parts) returns "
        "it, parts being place -> layers that lose it; interlace.layer_loss(vlm, calibration, "
        "'compensated_parts') makes one."
    )
    if problem.loss is None:
        raise ConfigError(asks)
    try:
        inspect.signature(problem.loss).bind("", (), {})
    except TypeError as error:
        raise ConfigError(f"{asks} The one given cannot be called so: {error}.") from error
    return problem.loss


def _shape_of(problem: Problem) -> TowerShape:
    if problem.shape is None or not problem.shape.sites:
        raise PlanError(
            f"The attentions and feed-forward parts of the tower '{problem.tower}' are not known, "
            "so none can be taken out alone. Score a real model with score(), or take the rule "
            "'compensated', which drops whole layers."
        )
    if problem.scores.cross_attention_layers is not None:
        raise PlanError(
            f"In the tower '{problem.tower}' only some layers have cross-attention, in a pattern "
            "that must stay. Take 'sleb' or 'shortgpt', which drop whole layers so that it does."
        )
    return problem.shape


def _sizes(problem: Problem, shape: TowerShape) -> dict[Part, int]:
    """Return the parameters of every part that may go."""
    return {
        (site, layer): each.parameters(layer)
        for site, each in shape.sites.items()
        for layer in problem.candidates
        if each.groups[layer] and 0 < layer < problem.num_layers - 1
    }


def _may_go(part: Part, gone: Sequence[Part], shape: TowerShape) -> bool:
    """Tell whether a part may go now: cross-attention is taken out with its layer alone."""
    site, layer = part
    others = (name for name, each in shape.sites.items() if name != site and each.groups[layer])
    return not shape.sites[site].cross or all((name, layer) in gone for name in others)


def _likely(parts: Sequence[Part], first: dict[Part, float]) -> list[Part]:
    """Return the parts to try: of every kind the cheapest of the first round, or all in it.

    Those that could not go in it come first.
    """
    if not first:
        return list(parts)
    found: dict[str, list[Part]] = {}
    for part in sorted(parts, key=lambda part: (first.get(part, -math.inf), part)):
        found.setdefault(part[0], []).append(part)
    return [part for kind in found.values() for part in kind[:CANDIDATES]]


def _grouped(
    gone: Iterable[Part], shape: TowerShape
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Return the layers that lost all of their parts, in that order, and what others lost."""
    lost: dict[int, set[str]] = {}
    drop: list[int] = []
    for site, layer in gone:
        lost.setdefault(layer, set()).add(site)
        if lost[layer] == {name for name, each in shape.sites.items() if each.groups[layer]}:
            drop.append(layer)
    parts = {
        site: tuple(sorted(i for i, sites in lost.items() if site in sites and i not in drop))
        for site in shape.sites
    }
    return tuple(drop), {site: layers for site, layers in parts.items() if layers}
