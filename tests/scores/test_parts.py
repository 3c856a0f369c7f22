"""The relevance of a part is the rise of the loss of a student without it; scores of students."""

from __future__ import annotations

import pytest
import torch
from scores.written_out import TOLERANCE, labelled, opened
from tiny import TINY

from interlace.models.sites import find_sites
from interlace.plan import make_plan
from interlace.records import Plan, TowerPlan
from interlace.scores import score
from interlace.scores.losses import SampleLoss
from interlace.surgery import prune

KINDS = {"attention_relevance": "heads", "mlp_relevance": "ffn"}
# experts and recurrent layers
NOT_FOUND = (
    ("qwen3_vl_moe", "text", "mlp_relevance"),
    ("qwen3_5", "text", "attention_relevance"),
    ("qwen3_5_moe", "text", "attention_relevance"),
    ("qwen3_5_moe", "text", "mlp_relevance"),
)


@pytest.mark.parametrize("metric", KINDS)
@pytest.mark.parametrize("name", TINY)
def test_the_value_of_a_part_is_the_rise_of_the_loss_of_the_student(name: str, metric: str) -> None:
    vlm, batch = opened(name), labelled(name, 2)
    scores = score(vlm, [batch], metrics=(metric,), progress=False)
    with torch.no_grad():
        base = SampleLoss(vlm)(batch).double().mean()
    compared = set()
    for tower, own in vlm.towers.items():
        if (name, tower, metric) in NOT_FOUND:
            assert metric not in scores[tower].metrics
            assert "not found in layer" in scores[tower].notes[0]
            compared.add(tower)
            continue
        # the first attention of T5 cannot go
        layer = 1
        sites = find_sites(own.layers[layer]).values()
        found = [site for site in sites if site.kind == KINDS[metric]]
        if any(site.cross for site in found):
            # cross-attention cannot go alone, and the value is that of both
            continue
        cut = TowerPlan(own.num_layers, parts={site.name: (layer,) for site in found})
        student = prune(vlm, Plan({tower: cut}, standard=False))
        with torch.no_grad():
            rise = SampleLoss(student)(batch).double().mean() - base
        assert scores[tower].metrics[metric][layer] == pytest.approx(float(rise), abs=TOLERANCE)
        compared.add(tower)
    crossed = name in ("blip_caption", "blip_vqa", "blip2_t5") and metric == "attention_relevance"
    assert set(vlm.towers) - compared <= ({"text", "text_encoder"} if crossed else set())


@pytest.mark.parametrize(
    ("argument", "metric", "place"),
    [
        ("attention_parts", "attention_relevance", "self_attn"),
        ("ffn_parts", "mlp_relevance", "mlp"),
    ],
)
def test_a_student_loses_what_was_measured(argument: str, metric: str, place: str) -> None:
    vlm, batch = opened("llava"), labelled("llava")
    units = {"attention_parts": "head_norm", "ffn_parts": "ffn_norm"}[argument]
    scores = score(vlm, [batch], metrics=(metric, units), towers=("text",), progress=False)
    values = scores["text"].metrics[metric]
    plan = make_plan(scores, **{argument: 1.0001 / len(values)})
    (gone,) = plan["text"].parts[place]
    assert values[gone] == min(values)
    student = prune(vlm, plan)
    with torch.no_grad():
        rise = (SampleLoss(student)(batch).double() - SampleLoss(vlm)(batch).double()).mean()
    assert float(rise) == pytest.approx(values[gone], abs=TOLERANCE)
    # the student can be scored and planned again, without the part that is gone
    again = score(student, [batch], metrics=(metric, units), towers=("text",), progress=False)
    assert again["text"].metrics[metric][gone] == 0
    assert again["text"].importance[units][place][gone] == ()
    rest = make_plan(again, **{argument: 1.0001 / len(values)}, protect="auto")
    assert gone not in rest["text"].parts[place]
    share = {"attention_parts": "heads", "ffn_parts": "ffn"}[argument]
    assert gone not in make_plan(again, **{share: 0.5})["text"].cut[place]
