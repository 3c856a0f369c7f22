"""The five published rules, reproduced exactly.

Source: INTERLACE (arXiv 2511.19676) and its released code: greedy, candidates by falling
similarity with ties to the lower index, pair fallback when triplets run out. Pairs of states that
end in h_L are not scored there, so a triplet starts at 0..L-4, a pair at 0..L-3, and the last layer
is dropped by `random` alone.

With weights, a score out of several metrics takes the place of s_1, s_2 and s_3 (see weights.py).
Protection is ours: without protected layers every rule gives the published selection. A protected
layer is never dropped; in a triplet or pair the other one is dropped then.
"""

from __future__ import annotations

import random as python_random
from typing import TYPE_CHECKING

from interlace.errors import PlanError
from interlace.plan.rules import Choice, by_score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace.plan.rules import Problem


class Assembly:
    """Collects triplets and pairs into a choice."""

    def __init__(self, problem: Problem) -> None:
        """Start empty."""
        self.problem = problem
        self.scores = problem.scored()
        self.drop: list[int] = []
        self.tune: list[int] = []
        self.freeze: list[int] = []
        self.reasons: dict[int, str] = {}

    def complete(self) -> bool:
        """As many layers are dropped as wanted."""
        return len(self.drop) == self.problem.num_drop

    def free(self, start: int, length: int) -> bool:
        """Tell whether none of these layers has a role yet."""
        taken = {*self.drop, *self.tune, *self.freeze}
        return taken.isdisjoint(range(start, start + length))

    def usable(self, start: int) -> bool:
        """Tell whether one of the two layers may be dropped."""
        return start not in self.problem.protected or start + 1 not in self.problem.protected

    def dropped(self, start: int) -> int:
        """Return the layer to drop of a triplet or pair: the more redundant of the first two.

        Of two equal layers the first goes; where one is protected, the other.
        """
        gone = start + 1 if self.scores[start] < self.scores[start + 1] else start
        return 2 * start + 1 - gone if gone in self.problem.protected else gone

    def add(self, start: int, length: int, value: float) -> None:
        """Take a triplet (length 3) or pair (length 2): drop one of the first two, tune the other.

        Args:
            start: its first layer.
            length: its layers.
            value: what it was chosen by.
        """
        gone = self.dropped(start)
        other = 2 * start + 1 - gone
        more = self.scores[gone] > self.scores[other]
        if more or (gone < other and self.scores[gone] == self.scores[other]):
            why = f"score {self.scores[gone]:.4f} >= {self.scores[other]:.4f} of layer {other}"
        else:
            why = f"layer {other} is protected"
        word = "triplet" if length == 3 else "pair"
        measure = f"s{length}" if self.problem.weighted is None else "weighted"
        name = f"{word} {'-'.join(str(start + k) for k in range(length))} ({measure} {value:.4f})"
        self.drop.append(gone)
        self.tune.append(other)
        self.reasons[gone] = f"{name}: {why}"
        self.reasons[other] = f"{name}: takes over from layer {gone}"
        if length == 3:
            self.freeze.append(start + 2)
            self.reasons[start + 2] = f"{name}: anchor"

    def choice(self) -> Choice:
        """Return what was collected."""
        return Choice(tuple(self.drop), tuple(self.tune), tuple(self.freeze), self.reasons)


def interlace(problem: Problem) -> Choice:
    """INTERLACE: disjoint triplets by falling s_3.

    In a triplet i, i+1, i+2 the layer with the higher s_1 among the first two is dropped (of two
    equal ones layer i), the other is tuned, and i+2 is the frozen anchor. When triplets run out,
    pairs i, i+1 of layers without a role follow by falling s_2, in the same way without an anchor.
    s_2 is needed only then.

    Raises:
        PlanError: a needed pack was not scored, or even pairs run out (where the published code
            fails).
    """
    made = Assembly(problem)
    for length in (3, 2):
        if made.complete():
            break
        values = problem.group_scores(length, made.dropped)
        for start in by_score(values.items()):
            if made.free(start, length) and made.usable(start):
                made.add(start, length, values[start])
            if made.complete():
                break
    if not made.complete():
        raise problem.shortage(len(made.drop), "disjoint triplets and pairs")
    return made.choice()


def interlace_oa(problem: Problem) -> Choice:
    """Ordered assignment: the triplets of `interlace`, but always layer i dropped and i+1 tuned.

    Raises:
        PlanError: triplets run out. There is no pair fallback: the published code takes the
            pack-2 table as an argument but does not use it, and fails.
    """
    values = problem.group_scores(3, lambda start: start)
    measure = "s3" if problem.weighted is None else "weighted"
    drop = _disjoint(problem, values, 3)
    if len(drop) < problem.num_drop:
        advice = (
            "Triplets ran out, and the rule 'interlace_oa' has no fallback to pairs (the published "
            "code fails here too). Drop fewer layers, or use 'interlace' or 'triplet_optimal'."
        )
        raise problem.shortage(len(drop), "disjoint triplets", advice)
    reasons: dict[int, str] = {}
    for start in drop:
        name = f"triplet {start}-{start + 1}-{start + 2} ({measure} {values[start]:.4f})"
        reasons[start] = f"{name}: first layer"
        reasons[start + 1] = f"{name}: takes over from layer {start}"
        reasons[start + 2] = f"{name}: anchor"
    return Choice(
        tuple(drop), tuple(i + 1 for i in drop), tuple(i + 2 for i in drop), reasons=reasons
    )


def interlace_tn(problem: Problem) -> Choice:
    """Train next: layers by falling s_1; layer i is dropped and i+1 tuned, pairs disjoint.

    Raises:
        PlanError: disjoint pairs run out (where the published code fails).
    """
    scores = problem.scored()
    drop = _disjoint(problem, scores, 2)
    if len(drop) < problem.num_drop:
        raise problem.shortage(len(drop), "disjoint pairs of neighbours")
    reasons = {layer: f"score {scores[layer]:.4f}" for layer in drop}
    reasons |= {layer + 1: f"next to layer {layer}" for layer in drop}
    return Choice(tuple(drop), tuple(layer + 1 for layer in drop), reasons=reasons)


def _disjoint(problem: Problem, values: Mapping[int, float], length: int) -> list[int]:
    """Return the starts of disjoint groups by falling value, as many as layers are to go at most.

    Groups whose first layer is protected, or that pass the end of the tower, are left out.
    """
    starts: list[int] = []
    taken: set[int] = set()
    for start in by_score(values.items()):
        group = range(start, start + length)
        inside = group.stop <= problem.num_layers
        if inside and taken.isdisjoint(group) and start not in problem.protected:
            taken.update(group)
            starts.append(start)
        if len(starts) == problem.num_drop:
            break
    return starts


def random(problem: Problem) -> Choice:
    """Draw n layers to drop, then n of the rest to tune.

    With `random.Random(seed)`: first a sample of n from the layers that may be dropped, ascending
    (all of them when none is protected), then a sample of n from all layers that remain,
    ascending. With seed 42 these are the draws of the published code, which seeds Python's global
    generator and makes the same two calls.

    Raises:
        PlanError: fewer than n layers remain to be tuned (where the published code fails).
    """
    count = problem.num_drop
    generator = python_random.Random(problem.seed)
    drop = generator.sample(problem.candidates, count)
    rest = [layer for layer in range(problem.num_layers) if layer not in drop]
    if len(rest) < count:
        raise PlanError(
            f"Tower '{problem.tower}': the rule 'random' drops {count} of {problem.num_layers} "
            f"layers and tunes {count} others, but only {len(rest)} are left (the published code "
            "fails here too). Drop at most half of the layers, or use another rule."
        )
    tune = generator.sample(rest, count)
    reasons = dict.fromkeys(drop, f"drawn with seed {problem.seed}")
    reasons |= dict.fromkeys(tune, f"drawn with seed {problem.seed}")
    return Choice(tuple(drop), tuple(tune), reasons=reasons)


def _block_fits(problem: Problem, start: int) -> bool:
    block = range(start, start + problem.num_drop)
    inside = start + 2 * problem.num_drop <= problem.num_layers
    return inside and all(layer not in problem.protected for layer in block)


def _past_the_end(problem: Problem, start: int) -> PlanError:
    count, layers = problem.num_drop, problem.num_layers
    return PlanError(
        f"Tower '{problem.tower}': the rule 'consecutive' starts at layer {start}, drops "
        f"{start}..{start + count - 1} and tunes {start + count}..{start + 2 * count - 1}, which "
        f"is past the end: the last layer is {layers - 1} (the published code fails here too). "
        "Drop fewer layers, give protect='auto' to choose among the blocks that fit, "
        "or use 'uidl'."
    )


def consecutive(problem: Problem) -> Choice:
    """Drop the n layers that start at the highest s_1, and tune the n after them.

    When guarded, the start is the best among those whose block holds no protected layer and, with
    the layers to tune, stays inside the tower.

    Raises:
        PlanError: block or tuned layers pass the end of the tower (where the published code
            fails), or no block is free of protected layers.
    """
    scores, count = problem.scored(), problem.num_drop
    starts: Sequence[int] = by_score(scores.items())
    if problem.guarded:
        starts = [start for start in starts if _block_fits(problem, start)]
        if not starts:
            raise problem.shortage(0, f"blocks of {count} layers with {count} after them")
    start = starts[0]
    if start + 2 * count > problem.num_layers:
        raise _past_the_end(problem, start)
    drop = tuple(range(start, start + count))
    tune = tuple(range(start + count, start + 2 * count))
    reasons = dict.fromkeys(drop, f"block that starts at the score {scores[start]:.4f}")
    reasons |= dict.fromkeys(tune, f"follows the block {start}..{start + count - 1}")
    return Choice(drop, tune, reasons=reasons)
