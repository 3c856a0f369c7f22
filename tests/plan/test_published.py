"""The published rules against a slow, literal telling of them, and cases worked out by hand."""

from __future__ import annotations

import random

import pytest

from interlace.errors import PlanError
from interlace.plan import make_plan
from interlace.records import Scores

PUBLISHED = ("interlace", "interlace_oa", "interlace_tn", "random", "consecutive")


class PublishedFailsError(Exception):
    pass


def falling(table):
    """Starts by falling value; of equal ones the lower first: repeatedly take the first maximum."""
    left, order = dict(enumerate(table)), []
    while left:
        best = list(left.values()).index(max(left.values()))
        order.append(list(left)[best])
        del left[order[-1]]
    return order


def told_interlace(packs, n, num_layers):
    s1, s2, s3 = packs[1], packs[2], packs[3]
    role = ["none"] * num_layers
    drop, tune, freeze = [], [], []
    for table, width in ((s3, 3), (s2, 2)):
        for i in falling(table):
            if len(drop) == n:
                break
            if any(role[i + k] != "none" for k in range(width)):
                continue
            goes = i if s1[i] >= s1[i + 1] else i + 1
            stays = i + 1 if goes == i else i
            role[goes], role[stays] = "drop", "tune"
            drop.append(goes)
            tune.append(stays)
            if width == 3:
                role[i + 2] = "freeze"
                freeze.append(i + 2)
    if len(drop) < n:
        raise PublishedFailsError
    return tuple(drop), tuple(tune), tuple(freeze)


def told_oa(packs, n, num_layers):
    role = ["none"] * num_layers
    drop, tune, freeze = [], [], []
    for i in falling(packs[3]):
        if len(drop) < n and role[i : i + 3] == ["none"] * 3:
            role[i : i + 3] = ["drop", "tune", "freeze"]
            drop, tune, freeze = [*drop, i], [*tune, i + 1], [*freeze, i + 2]
    if len(drop) < n:
        raise PublishedFailsError
    return tuple(drop), tuple(tune), tuple(freeze)


def told_tn(packs, n, num_layers):
    role = ["none"] * num_layers
    drop = []
    for i in falling(packs[1]):
        if len(drop) < n and role[i : i + 2] == ["none"] * 2:
            role[i : i + 2] = ["drop", "tune"]
            drop.append(i)
    if len(drop) < n:
        raise PublishedFailsError
    return tuple(drop), tuple(i + 1 for i in drop), ()


def told_random(packs, n, num_layers):
    if 2 * n > num_layers:
        raise PublishedFailsError
    random.seed(42)
    drop = random.sample(range(num_layers), n)
    rest = []
    for layer in range(num_layers):
        if layer not in drop:
            rest.append(layer)
    return tuple(drop), tuple(random.sample(rest, n)), ()


def told_consecutive(packs, n, num_layers):
    start = falling(packs[1])[0]
    if start + 2 * n > num_layers:
        raise PublishedFailsError
    return tuple(range(start, start + n)), tuple(range(start + n, start + 2 * n)), ()


TOLD = dict(
    zip(
        PUBLISHED,
        (told_interlace, told_oa, told_tn, told_random, told_consecutive),
        strict=True,
    )
)


@pytest.mark.parametrize("levels", [None, 40, 4], ids=["distinct", "some ties", "many ties"])
@pytest.mark.parametrize("rule", PUBLISHED)
def test_selection_order_equals_the_literal_telling(rule, levels, random_scores):
    failed = 0
    for num_layers in (8, 9, 11, 14, 17, 20, 24, 28, 33, 36, 41, 48):
        for seed in range(3):
            scores = random_scores(num_layers, 100 * num_layers + seed, levels=levels, most=3)
            packs = scores["text"].similarity["all"]
            for fraction in (0.13, 0.25, 0.3, 0.5):
                n = int(num_layers * fraction)
                try:
                    expected = TOLD[rule](packs, n, num_layers)
                except PublishedFailsError:
                    failed += 1
                    with pytest.raises(PlanError):
                        make_plan(scores, drop_fraction=fraction, rule=rule)
                    continue
                plan = make_plan(scores, drop_fraction=fraction, rule=rule)["text"]
                assert (plan.drop, plan.tune, plan.freeze) == expected
    # half of the layers is too much for every rule that needs neighbours now and then
    assert failed > 0 or rule == "random"


def scores_of(s1, s2, s3):
    return Scores.from_similarity("text", {1: s1, 2: s2, 3: s3}, len(s1) + 1)


def test_interlace_by_hand():
    # L = 9. s3 is best at 2 (triplet 2,3,4), then 5 (5,6,7); s1 decides who goes.
    s1 = [0.9, 0.9, 0.5, 0.6, 0.1, 0.8, 0.8, 0.2]
    s3 = [0.3, 0.2, 0.9, 0.8, 0.7, 0.6]
    plan = make_plan(scores_of(s1, [0.1] * 7, s3), num_drop=2)["text"]
    # 3 beats 2; 5 and 6 are equal, so the first goes
    assert (plan.drop, plan.tune, plan.freeze) == ((3, 5), (2, 6), (4, 7))
    assert plan.kept == (0, 1, 2, 4, 6, 7, 8)
    # no triplet is left among 0, 1, 8: the pair 0-1 follows, equal, so 0 goes, without an anchor
    plan = make_plan(scores_of(s1, [0.1] * 7, s3), num_drop=3)["text"]
    assert (plan.drop, plan.tune, plan.freeze) == ((3, 5, 0), (2, 6, 1), (4, 7))
    # the last layer is in no pair, so nothing is left for a fourth
    with pytest.raises(PlanError, match="only 3 disjoint triplets and pairs"):
        make_plan(scores_of(s1, [0.1] * 7, s3), num_drop=4)


def test_all_equal_scores_go_from_the_front():
    scores = scores_of([0.5] * 11, [0.5] * 10, [0.5] * 9)
    assert make_plan(scores, num_drop=3)["text"].drop == (0, 3, 6)
    assert make_plan(scores, num_drop=3, rule="interlace_tn")["text"].drop == (0, 2, 4)
    assert make_plan(scores, num_drop=3, rule="consecutive")["text"].drop == (0, 1, 2)


def test_pack_2_is_needed_only_when_triplets_run_out():
    packs = {1: [0.5] * 8, 3: [0.1, 0.9, 0.1, 0.1, 0.1, 0.9]}
    scores = Scores.from_similarity("text", packs, 9)
    assert make_plan(scores, num_drop=2)["text"].drop == (1, 5)
    with pytest.raises(PlanError, match=r"Pack 2 .*not scored.*scored: 1, 3.*packs="):
        make_plan(scores, num_drop=3)


def test_where_the_published_code_fails_the_error_says_so():
    scores = scores_of([0.1] * 7 + [0.9], [0.5] * 7, [0.1, 0.9, 0.1, 0.1, 0.1, 0.9])
    with pytest.raises(PlanError, match=r"only 2 disjoint triplets.*no fallback to pairs"):
        make_plan(scores, num_drop=3, rule="interlace_oa")
    with pytest.raises(PlanError, match=r"starts at layer 7.*past the end.*last layer is 8"):
        make_plan(scores, num_drop=2, rule="consecutive")
    with pytest.raises(PlanError, match="only 4 are left"):
        make_plan(scores, num_drop=5, rule="random")


def test_count_is_int_of_the_product_with_its_rounding_error(random_scores):
    # 100 * 0.29 is 28.999999999999996
    scores = random_scores(100, 0)
    assert len(make_plan(scores, drop_fraction=0.29)["text"].drop) == 28
    scores = random_scores(36, 0)
    counts = [
        len(make_plan(scores, drop_fraction=f, rule="shortgpt")["text"].drop)
        for f in (0.1, 0.15, 0.2, 0.25)
    ]
    assert counts == [3, 5, 7, 9]


def test_random_leaves_the_global_generator_alone_and_follows_its_seed(random_scores):
    scores = random_scores(20, 0)
    random.seed(7)
    before = random.getstate()
    first = make_plan(scores, num_drop=5, rule="random", seed=1)
    assert random.getstate() == before
    assert make_plan(scores, num_drop=5, rule="random", seed=1) == first
    assert make_plan(scores, num_drop=5, rule="random", seed=2)["text"].drop != first["text"].drop


@pytest.mark.parametrize("rule", PUBLISHED)
def test_protected_layers_are_never_dropped(rule, random_scores):
    for seed in range(30):
        scores = random_scores(18, seed, levels=6)
        guarded = {0, 1, 2, 9, 17}
        plan = make_plan(scores, num_drop=3, rule=rule, protect=guarded)["text"]
        assert len(plan.drop) == len(plan.tune) == 3
        assert not guarded & set(plan.drop)


def test_one_protected_layer_of_a_triplet_hands_the_drop_to_the_other():
    s1 = [0.9, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    scores = scores_of(s1, [0.1] * 6, [0.9, 0.1, 0.1, 0.1, 0.1])
    plan = make_plan(scores, num_drop=1, protect=(0,))["text"]
    assert (plan.drop, plan.tune, plan.freeze) == ((1,), (0,), (2,))
    assert "layer 0 is protected" in plan.reasons[1]
    assert plan.reasons[0].endswith("protected: by request")
    # both protected: the triplet is not taken at all
    plan = make_plan(scores, num_drop=1, protect=(0, 1))["text"]
    assert plan.drop == (2,)


def test_consecutive_under_protection_chooses_among_blocks_that_fit():
    scores = scores_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9], [0.5] * 7, [0.5] * 6)
    plan = make_plan(scores, num_drop=2, rule="consecutive", protect="auto")["text"]
    assert (plan.drop, plan.tune) == ((5, 6), (7, 8))
    plan = make_plan(scores, num_drop=2, rule="consecutive", protect=(5,))["text"]
    assert (plan.drop, plan.tune) == ((3, 4), (5, 6))
    with pytest.raises(PlanError, match=r"blocks of 2 layers"):
        make_plan(scores, num_drop=2, rule="consecutive", protect=(1, 3, 5))
