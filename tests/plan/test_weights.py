"""Plans by several metrics; plans without weights are what they were."""

from __future__ import annotations

import hashlib
import json
import random
import statistics

import pytest

from interlace.errors import InterlaceError, PlanError
from interlace.plan import make_plan
from interlace.plan.rules import USE_LOSS, USE_WEIGHTS
from interlace.records import Scores, TowerScores

# Of every plan below, made before weights could rank triplets, with reasons and exact scores.
BEFORE = "6620b9658f96cab21be2fc058221c5994562978ba767f4c446718bd0b5af01f8"


def _tables(seed: int) -> Scores:
    draw = random.Random(seed)
    layers = (8, 12, 16, 24, 36)[seed % 5]
    levels = (None, 5)[seed % 2]

    def value() -> float:
        return draw.randrange(levels) / levels if levels else draw.uniform(0.3, 1)

    packs = {p: [value() for _ in range(layers - p)] for p in range(1, layers)}
    return Scores.from_similarity(
        "text",
        packs,
        layers,
        pinned={0: "a", 1: "b", layers - 1: "last"},
        tail={p: value() for p in range(1, layers)},
        cross_attention_layers=range(0, layers, 2) if seed % 3 == 0 else None,
    )


def _mixed(_: str, gone: tuple[int, ...]) -> float:
    return sum((i * 7) % 5 + i / 10 for i in gone)


def _sum(_: str, gone: tuple[int, ...]) -> float:
    return float(sum(gone))


def test_plans_without_weights_are_unchanged_bit_for_bit() -> None:
    digest = hashlib.sha256()
    first = ("interlace", "interlace_oa", "interlace_tn", "random", "consecutive")
    rules = (*first, "triplet_optimal", "shortgpt", "uidl", "last", "uniform", "sleb")
    for seed in range(30):
        scores = _tables(seed)
        for rule in rules:
            for fraction in (0.1, 0.25, 0.33, 0.5):
                for protect in ((), "auto", (2, 3)):
                    found: object
                    try:
                        plan = make_plan(
                            scores,
                            drop_fraction=fraction,
                            rule=rule,
                            protect=protect,
                            loss=_mixed if rule in USE_LOSS else None,
                        )["text"]
                        shown = [repr(score) for score in plan.layer_scores]
                        found = [plan.drop, plan.tune, plan.freeze, shown, plan.reasons]
                    except InterlaceError as error:
                        found = str(error)
                    digest.update(json.dumps(found, sort_keys=True).encode())
    assert digest.hexdigest() == BEFORE


@pytest.mark.parametrize("rule", sorted(USE_WEIGHTS))
def test_the_similarity_alone_gives_the_published_choice(rule: str, random_scores) -> None:
    for seed in range(8):
        scores = random_scores(16, seed)
        for count in (1, 2, 3):
            given = {
                "num_drop": count,
                "rule": rule,
                "protect": (0,),
                "loss": _sum if rule in USE_LOSS else None,
            }
            plain, weighted = (
                make_plan(scores, **given, weights=weights)["text"]
                for weights in (None, {"similarity": 0.7})
            )
            assert (plain.drop, plain.tune, plain.freeze) == (
                weighted.drop,
                weighted.tune,
                weighted.freeze,
            )


def _z(values: list[float]) -> list[float]:
    return [(v - statistics.fmean(values)) / statistics.pstdev(values) for v in values]


def _with_metrics(scores: Scores, **metrics: list[float]) -> Scores:
    return Scores(towers={"text": TowerScores(**{**vars(scores["text"]), "metrics": metrics})})


def test_a_triplet_is_worth_its_similarity_less_the_importance_of_the_layer_it_drops(
    random_scores,
) -> None:
    draw = random.Random(5)
    for seed in range(20):
        relevance = [draw.uniform(0, 3) for _ in range(9)]
        scores = _with_metrics(random_scores(9, seed), relevance=relevance)
        weights = {"similarity": 1.5, "relevance": 2.0}
        plan = make_plan(scores, num_drop=1, weights=weights)["text"]
        s1, s3 = (list(scores["text"].packs(p)) for p in (1, 3))
        # the last layer has no similarity, so it takes no part in the standard scores
        importance = _z(relevance[:8])
        layer = [1.5 * a - 2.0 * b for a, b in zip(_z(s1), importance, strict=True)]
        assert plan.layer_scores[:8] == pytest.approx(layer)
        dropped = [max((i, i + 1), key=lambda j: (layer[j], -j)) for i in range(6)]
        value = [1.5 * a - 2.0 * importance[j] for a, j in zip(_z(s3), dropped, strict=True)]
        best = max(range(6), key=lambda i: (value[i], -i))
        assert plan.drop == (dropped[best],)
        assert plan.freeze == (best + 2,)
        assert f"(weighted {value[best]:.4f})" in plan.reasons[best + 2]
        # the ordered rule drops the first layer of its triplets
        plan = make_plan(scores, num_drop=1, weights=weights, rule="interlace_oa")["text"]
        value = [1.5 * a - 2.0 * importance[i] for i, a in enumerate(_z(s3))]
        assert plan.drop == (max(range(6), key=lambda i: (value[i], -i)),)


def test_importance_alone_needs_no_similarity() -> None:
    relevance = (9.0, 3.0, 1.0, 4.0, 5.0, 2.0, 6.0, 0.0)
    tower = TowerScores(num_layers=8, metrics={"relevance": relevance})
    scores, weights = Scores(towers={"text": tower}), {"relevance": 1.0}
    for rule, drop in (
        ("shortgpt", (7, 2)),
        ("interlace_tn", (2, 5)),
        # triplets start at 0..4: 1-2-3 or 2-3-4 drops 2, of equal ones the first; then 4-5-6
        ("interlace", (2, 5)),
        ("triplet_optimal", (2, 5)),
    ):
        plan = make_plan(scores, num_drop=2, rule=rule, weights=weights)["text"]
        assert plan.drop == drop, rule
    assert make_plan(scores, num_drop=1, rule="shortgpt", weights=weights, protect=(7,))[
        "text"
    ].drop == (2,)
    with pytest.raises(PlanError, match=r"similarity was not scored.* --weights relevance=1"):
        make_plan(scores, num_drop=2, weights={"relevance": 1, "similarity": 1})


def test_the_balanced_group_gives_image_and_text_equal_mass() -> None:
    tower = TowerScores(
        num_layers=5,
        similarity={
            # 9 of 10 tokens are of images
            "all": {1: (0.91, 0.82, 0.55, 0.2), 2: (0.5, 0.5, 0.5)},
            "text": {1: (0.1, 1.0, 0.1, 0.2), 2: (0.5, 0.5, 0.5)},
            "vision": {1: (1.0, 0.8, 0.6, 0.2), 2: (0.5, 0.1, 0.5)},
        },
        tail={"text": {1: 0.2}, "vision": {1: 1.0}},
    )
    scores = Scores(towers={"text": tower})
    assert tower.packs(1, "balanced") == pytest.approx((0.55, 0.9, 0.35, 0.2))
    assert tower.packs(2, "balanced") == pytest.approx((0.5, 0.3, 0.5))
    assert tower.end(1, "balanced") == pytest.approx(0.6)
    assert make_plan(scores, num_drop=1, rule="shortgpt")["text"].drop == (0,)
    balanced = make_plan(scores, num_drop=2, rule="shortgpt", group="balanced")["text"]
    assert balanced.drop == (1, 4)
    one = TowerScores(num_layers=3, similarity={"vision": {1: (0.5, 0.25)}})
    assert one.packs(1, "balanced") == (0.5, 0.25)
    assert one.end(1, "balanced") is None
    with pytest.raises(PlanError, match="Pack 3 of group 'balanced' was not scored"):
        tower.packs(3, "balanced")
    with pytest.raises(PlanError, match=r"Did you mean 'balanced'\?.*balanced, text, vision"):
        tower.packs(1, "balancd")
    with pytest.raises(PlanError, match="similarity was not scored"):
        TowerScores(num_layers=3).packs(1, "balanced")


def test_layers_that_carry_the_alignment_are_protected(random_scores) -> None:
    plain = random_scores(16, 1, pinned={0: "injected here", 15: "last layer"})
    change = [0.0] * 16
    change[3], change[7] = 0.4, 0.5
    fields = {"alignment": {0: "injected here", 5: "a projector reads it"}}
    tower = TowerScores(**{**vars(plain["text"]), "metrics": {"alignment": change}, **fields})
    scores = Scores(towers={"text": tower})
    # two of 16 layers by what was measured
    assert list(tower.alignment_layers()) == [0, 3, 5, 7]
    plan = make_plan(scores, num_drop=10, rule="shortgpt", protect="alignment")["text"]
    assert set(plan.drop) == set(range(16)) - {0, 3, 5, 7, 15} - {
        min(set(range(16)) - {0, 3, 5, 7, 15}, key=lambda i: tower.packs(1)[i])
    }
    # said once, though it is pinned and carries the alignment
    assert plan.reasons[0].endswith("; protected: injected here")
    assert "a projector reads it" in plan.reasons[5]
    assert plan.reasons[7].endswith("by 0.500 (rank 1 of 16)")
    assert "last layer" in plan.reasons[15]
    both = make_plan(scores, num_drop=2, protect={"text": "alignment"})
    assert both.settings["protect"] == {"text": "alignment"}
    # weighed instead of protected
    weighed = make_plan(scores, num_drop=2, rule="shortgpt", weights={"alignment": 1.0})["text"]
    assert weighed.drop == (0, 1)
    with pytest.raises(PlanError, match="'alignment' was not scored"):
        make_plan(plain, num_drop=2, protect="alignment")
    alone = TowerScores(**{**vars(plain["text"]), "alignment": {}, "notes": ("one modality",)})
    with pytest.raises(PlanError, match=r"no layer is known to carry .*\(one modality\)"):
        make_plan(Scores(towers={"text": alone}), num_drop=2, protect="alignment")


def test_parts_of_alignment_merge_and_are_ranked_anew() -> None:
    def part(values: tuple[float, ...], count: int, where: dict[int, str]) -> Scores:
        tower = TowerScores(
            num_layers=3,
            metrics={"alignment": values},
            alignment=where,
            num_samples=9,
            group_samples={"alignment": count},
            notes=("a note",),
        )
        return Scores(towers={"text": tower})

    one, other = part((0.4, 0.3, 0.0), 1, {2: "x"}), part((0.1, 0.3, 0.2), 3, {2: "x"})
    merged = Scores.merge(one, other)["text"]
    assert merged.metrics["alignment"] == pytest.approx((0.175, 0.3, 0.15))
    assert (list(one["text"].alignment_layers()), list(merged.alignment_layers())) == (
        [0, 2],
        [1, 2],
    )
    assert merged.group_samples["alignment"] == 4
    assert merged.notes == ("a note",)
    with pytest.raises(InterlaceError, match="differ in alignment"):
        Scores.merge(one, part((0.1, 0.3, 0.2), 3, {1: "y"}))
