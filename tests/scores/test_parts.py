"""From the relevance of parts to a student without them, and scores of that student."""

from __future__ import annotations

import pytest
import torch
from scores.written_out import TOLERANCE, labelled, opened

from interlace.plan import make_plan
from interlace.scores import score
from interlace.scores.losses import SampleLoss
from interlace.surgery import prune


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
