from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.errors import PlanError
from interlace.plan import make_plan
from interlace.plan.optimal import best_packing
from interlace.records import Scores


def brute_force(num_layers, triplets, pairs, num_triplets, num_pairs):
    """Highest total over all ways to place so many disjoint triplets and pairs; None if none."""
    best = None
    for three in itertools.combinations(triplets, num_triplets):
        for two in itertools.combinations(pairs, num_pairs):
            covered = [i + k for i in three for k in range(3)] + [
                i + k for i in two for k in (0, 1)
            ]
            if len(set(covered)) == len(covered):
                total = sum(triplets[i] for i in three) + sum(pairs[i] for i in two)
                best = total if best is None else max(best, total)
    return best


@st.composite
def packings(draw):
    num_layers = draw(st.integers(3, 11))
    # sixteenths add up without rounding, and are few enough for ties
    value = st.integers(-16, 16).map(lambda k: k / 16)
    free = draw(st.sets(st.integers(0, num_layers - 1)))
    triplets = {i: draw(value) for i in range(num_layers - 3) if i not in free}
    pairs = {i: draw(value) for i in range(num_layers - 2) if i not in free}
    return num_layers, triplets, pairs, draw(st.integers(0, 3)), draw(st.integers(0, 2))


@settings(max_examples=100, deadline=None)
@given(packings())
def test_best_packing_equals_brute_force(case):
    _, triplets, pairs, _, _ = case
    found, expected = best_packing(*case), brute_force(*case)
    assert (found is None) == (expected is None)
    if found is not None:
        three, two = found
        assert len(three) == case[3]
        assert len(two) == case[4]
        covered = [i + k for i in three for k in range(3)] + [i + k for i in two for k in (0, 1)]
        assert len(set(covered)) == len(covered)
        assert sum(triplets[i] for i in three) + sum(pairs[i] for i in two) == expected


@st.composite
def tables(draw):
    num_layers = draw(st.integers(6, 30))
    value = st.integers(0, 32).map(lambda k: k / 32)
    packs = {
        p: draw(st.lists(value, min_size=num_layers - p, max_size=num_layers - p))
        for p in (1, 2, 3)
    }
    protect = draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers // 3))
    return Scores.from_similarity("text", packs, num_layers), protect, draw(st.integers(1, 8))


def total(plan, packs):
    """Sum of s3 over the triplets and s2 over the pairs of a plan."""
    starts = [min(pair) for pair in zip(plan.drop, plan.tune, strict=True)]
    count = len(plan.freeze)
    return sum(packs[3][i] for i in starts[:count]) + sum(packs[2][i] for i in starts[count:])


@settings(max_examples=60, deadline=None)
@given(tables())
def test_disjoint_and_never_worse_than_greedy(case):
    scores, protect, count = case
    packs = scores["text"].similarity["all"]
    count = min(count, scores["text"].num_layers - 2 - len(protect))
    if count < 1:
        return
    plans = []
    for rule in ("interlace", "triplet_optimal"):
        try:
            plans.append(make_plan(scores, num_drop=count, rule=rule, protect=protect)["text"])
        except PlanError:
            plans.append(None)
    greedy, best = plans
    for plan in plans:
        if plan is not None:
            assert not set(plan.drop) & protect
            for drop, tune, anchor in zip(plan.drop, plan.tune, plan.freeze, strict=False):
                assert abs(drop - tune) == 1
                assert anchor == max(drop, tune) + 1
    if greedy is not None:
        assert best is not None
        assert len(best.freeze) >= len(greedy.freeze)
        if len(best.freeze) == len(greedy.freeze):
            assert total(best, packs) >= total(greedy, packs)


def test_finds_triplets_where_greedy_blocks_itself():
    # greedy takes 1-2-3 and then 5-6-7, which leaves no neighbours without a role: it fails. But
    # 0-1-2, 3-4-5 and 6-7-8 fit beside each other.
    s3 = [0.80, 0.90, 0.10, 0.80, 0.10, 0.85, 0.80]
    scores = Scores.from_similarity("text", {1: [0.5] * 9, 2: [0.1] * 8, 3: s3}, 10)
    with pytest.raises(PlanError, match="only 2 disjoint triplets and pairs"):
        make_plan(scores, num_drop=3, rule="interlace")
    best = make_plan(scores, num_drop=3, rule="triplet_optimal")["text"]
    assert (best.drop, best.tune, best.freeze) == ((0, 3, 6), (1, 4, 7), (2, 5, 8))


def test_pairs_fill_up_and_their_shortage_is_an_error():
    scores = Scores.from_similarity("text", {1: [0.5] * 7, 2: [0.5] * 6, 3: [0.5] * 5}, 8)
    plan = make_plan(scores, num_drop=3, rule="triplet_optimal")["text"]
    assert len(plan.drop) == 3
    assert len(plan.freeze) == 1
    with pytest.raises(PlanError, match=r"4 of 8 layers.*only 2 disjoint triplets"):
        make_plan(scores, num_drop=4, rule="triplet_optimal")
