"""Which layers must not be dropped, and which sets of layers a model can be built from.

Some towers have cross-attention only in every f-th layer (BLIP-2's Q-Former). Their configuration
can say no more than "the layer at position p has it if p is a multiple of f", so the layers that
are kept must fall into that pattern again, for some f.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from interlace.errors import ConfigError, PlanError, unknown_name
from interlace.plan.rules import finish

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from interlace.plan.rules import Choice, Problem
    from interlace.records import Scores

    Word = Literal["auto", "alignment"]
    Protect = Word | Iterable[int] | Mapping[str, Word | Iterable[int]]
    Guard = Word | tuple[int, ...]

_ACCEPTED = (
    "Give layer numbers, a dict of them per tower, 'auto' (what the scores recorded as pinned), "
    "'alignment' (these and the layers that carry the alignment of image and text), or () for none."
)


def _guard(wanted: Any) -> Guard:
    if isinstance(wanted, str):
        if wanted == "auto":
            return "auto"
        if wanted == "alignment":
            return "alignment"
        raise ConfigError(f"protect={wanted!r} is not known. {_ACCEPTED}")
    try:
        return tuple(sorted({operator.index(layer) for layer in wanted}))
    except TypeError as error:
        raise ConfigError(f"protect={wanted!r} cannot be used. {_ACCEPTED}") from error


def resolve(protect: Protect, scores: Scores) -> Guard | dict[str, Guard]:
    """Bring the argument `protect` into one form.

    Args:
        protect: layer numbers (of every planned tower), a dict of them per tower, "auto",
            "alignment", or ().
        scores: what was measured; holds the names of the towers.

    Raises:
        ConfigError: `protect` is none of these.
        PlanError: a dict names a tower without scores.
    """
    if not isinstance(protect, Mapping):
        return _guard(protect)
    for name in protect:
        if name not in scores.towers:
            raise PlanError(unknown_name("tower in protect", name, scores.towers))
    return {name: _guard(wanted) for name, wanted in protect.items()}


def protected_layers(
    guards: Guard | dict[str, Guard], scores: Scores, tower: str
) -> tuple[dict[int, str], bool]:
    """Find the protected layers of one tower.

    Args:
        guards: what `resolve` gave.
        scores: what was measured; holds the pinned and the alignment layers.
        tower: name of the tower.

    Returns:
        Layer -> reason, and whether protection was asked for at all.

    Raises:
        PlanError: a layer is outside the tower, or its alignment was not scored.
    """
    guard = guards.get(tower, ()) if isinstance(guards, dict) else guards
    if isinstance(guard, str):
        found = dict(scores[tower].pinned)
        if guard == "alignment":
            carrying = scores[tower].alignment_layers()
            if not carrying:
                raise PlanError(
                    f"Tower '{tower}': no layer is known to carry the alignment of image and text "
                    f"({'; '.join(scores[tower].notes)}). Protect it by 'auto' instead."
                )
            for layer, reason in carrying.items():
                if reason not in found.get(layer, ""):
                    why = f"alignment: {reason}"
                    found[layer] = f"{found[layer]}; {why}" if layer in found else why
        return dict(sorted(found.items())), True
    last = scores[tower].num_layers - 1
    outside = [layer for layer in guard if not 0 <= layer <= last]
    if outside:
        raise PlanError(f"The tower '{tower}' has layers 0..{last}; protect names {outside}.")
    return dict.fromkeys(guard, "by request"), bool(guard)


def expressible(kept: Sequence[int], cross_attention: Iterable[int]) -> int | None:
    """Return the smallest f for which exactly the positions 0, f, 2f, ... have cross-attention.

    Args:
        kept: kept layers, ascending.
        cross_attention: the original layers that have it.

    Returns:
        f of 1 or more; None where there is no such f.
    """
    crossing = set(cross_attention)
    flags = [layer in crossing for layer in kept]
    for frequency in range(1, len(flags) + 1):
        if all(flag == (p % frequency == 0) for p, flag in enumerate(flags)):
            return frequency
    return None


def _cheapest_kept(
    costs: Sequence[float], flags: Sequence[bool], must: Iterable[int], size: int, frequency: int
) -> tuple[float, tuple[int, ...]] | None:
    # best[p]: lowest sum of scores when p layers of those seen so far are kept
    required = set(must)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer, cost in enumerate(costs):
        following = {} if layer in required else dict(best)
        for position, (total, kept) in best.items():
            if position < size and flags[layer] == (position % frequency == 0):
                option = (total + cost, (*kept, layer))
                following[position + 1] = min(following.get(position + 1, option), option)
        best = following
    return best.get(size)


def repair(problem: Problem, choice: Choice) -> Choice:
    """Replace a choice that no configuration can express by the best one that it can.

    Of all sets of layers that may be dropped and leave an expressible tower, the one with the
    highest sum of layer scores is taken, by dynamic programming over (layer, position) for every
    f. A layer without a score (the last one) counts as much as the lowest of the others.

    Args:
        problem: the tower and what is asked for.
        choice: what the rule chose.

    Returns:
        The choice itself where it is expressible.

    Raises:
        PlanError: nothing expressible drops so many layers.
    """
    crossing = problem.scores.cross_attention_layers
    layers = range(problem.num_layers)
    if crossing is None:
        return choice
    if expressible([layer for layer in layers if layer not in choice.drop], crossing):
        return choice
    scored = problem.scored(with_tail=True)
    costs = [scored.get(layer, min(scored.values())) for layer in layers]
    flags = [layer in crossing for layer in layers]
    size = problem.num_layers - problem.num_drop
    found = []
    for each in range(1, size + 1):
        option = _cheapest_kept(costs, flags, problem.protected, size, each)
        if option is not None:
            found.append((*option, each))
    if not found:
        raise PlanError(
            f"Tower '{problem.tower}': its cross-attention is in every f-th layer "
            f"{list(crossing)}, and no {problem.num_drop} of the layers can be dropped so that "
            f"what stays has such a pattern (protected: {sorted(problem.protected)}). "
            "Drop another number of layers or protect fewer."
        )
    _, kept, frequency = min(found)
    drop = sorted((i for i in layers if i not in kept), key=lambda i: (-costs[i], i))
    rejected = sorted(choice.drop)
    why = (
        f"best set that keeps cross-attention at every position divisible by {frequency}; "
        f"the rule's own choice {rejected} cannot be expressed in the configuration"
    )
    return finish(problem, drop, dict.fromkeys(drop, why))
