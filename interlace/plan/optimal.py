"""The best disjoint triplets there are, where the published rule takes them greedily.

Legend: L layers, n layers to drop; a triplet i, i+1, i+2 has i <= L-4 and the value s_3(i), a pair
i, i+1 has i <= L-3 and the value s_2(i), as in the published rule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from interlace.plan.published import Assembly
from interlace.plan.rules import by_score

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interlace.plan.rules import Choice, Problem

# Similarities as whole numbers of 2**-64: sums are exact, so equal totals compare as equal.
_BITS = 64


def _exact(values: Mapping[int, float]) -> dict[int, int]:
    return {start: int(math.ldexp(value, _BITS)) for start, value in values.items()}


def most_triplets(num_layers: int, triplets: Mapping[int, float]) -> int:
    """Return how many of these triplets fit beside each other."""
    best = [0] * (num_layers + 4)
    for start in range(num_layers - 1, -1, -1):
        best[start] = best[start + 1]
        if start in triplets:
            best[start] = max(best[start], 1 + best[start + 3])
    return best[0]


def best_packing(
    num_layers: int,
    triplets: Mapping[int, float],
    pairs: Mapping[int, float],
    num_triplets: int,
    num_pairs: int,
) -> tuple[list[int], list[int]] | None:
    """Choose disjoint triplets and pairs, so many of each, with the highest sum of values.

    Dynamic programming from the last layer to the first over (layer, triplets left, pairs left):
    O(L * num_triplets * num_pairs). Of equal sums the one with the earlier starts wins.

    Args:
        num_layers: L.
        triplets: start -> value of the triplets that may be taken.
        pairs: start -> value of the pairs that may be taken.
        num_triplets: triplets to take.
        num_pairs: pairs to take.

    Returns:
        The starts of the triplets and of the pairs, ascending; None where so many do not fit.
    """
    three, two = _exact(triplets), _exact(pairs)
    empty: dict[tuple[int, int], int] = {(0, 0): 0}
    # best[i][(t, p)]: highest sum of t triplets and p pairs among the layers i..L-1
    best = [empty] * (num_layers + 4)
    for start in range(num_layers - 1, -1, -1):
        table = dict(best[start + 1])
        options = ((start in three, 3, (1, 0)), (start in two, 2, (0, 1)))
        for there, length, (more_triplets, more_pairs) in options:
            if not there:
                continue
            value = three[start] if length == 3 else two[start]
            for (used_triplets, used_pairs), total in best[start + length].items():
                key = (used_triplets + more_triplets, used_pairs + more_pairs)
                fits = key[0] <= num_triplets and key[1] <= num_pairs
                # "or equal" prefers taking here to taking later
                if fits and (key not in table or total + value >= table[key]):
                    table[key] = total + value
        best[start] = table
    key = (num_triplets, num_pairs)
    if key not in best[0]:
        return None
    chosen: tuple[list[int], list[int]] = ([], [])
    start = 0
    while key != (0, 0):
        total = best[start][key]
        less = (key[0] - 1, key[1])
        if start in three and best[start + 3].get(less) == total - three[start]:
            chosen[0].append(start)
            start, key = start + 3, less
            continue
        less = (key[0], key[1] - 1)
        if start in two and best[start + 2].get(less) == total - two[start]:
            chosen[1].append(start)
            start, key = start + 2, less
            continue
        start += 1
    return chosen


def triplet_optimal(problem: Problem) -> Choice:
    """Take the n disjoint triplets with the highest total s_3.

    Where n triplets do not fit, as many as leave room for pairs of neighbours to make up the rest,
    with the highest total of s_3 and s_2. Roles within a triplet or pair are as in `interlace`;
    selection order is by falling s_3, then by falling s_2. A triplet with one protected layer
    among its first two drops the other; one with two is not taken. With weights, the values of
    weights.py take the places of s_3 and s_2.

    Raises:
        PlanError: a needed pack was not scored, or even pairs do not make up the rest.
    """
    made = Assembly(problem)
    layers, wanted = problem.num_layers, problem.num_drop
    s3 = problem.group_scores(3, made.dropped)
    triplets = {start: value for start, value in s3.items() if made.usable(start)}
    most = min(wanted, most_triplets(layers, triplets))
    pairs: dict[int, float] = {}
    if most < wanted:
        s2 = problem.group_scores(2, made.dropped)
        pairs = {start: value for start, value in s2.items() if made.usable(start)}
    for count in range(most, -1, -1):
        packing = best_packing(layers, triplets, pairs, count, wanted - count)
        if packing is None:
            continue
        for start in by_score((start, triplets[start]) for start in packing[0]):
            made.add(start, 3, triplets[start])
        for start in by_score((start, pairs[start]) for start in packing[1]):
            made.add(start, 2, pairs[start])
        return made.choice()
    raise problem.shortage(most, "disjoint triplets, and not enough pairs,")
