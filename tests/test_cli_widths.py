"""Heads, neurons and parts of layers on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_heads_and_neurons_are_planned(interlace, tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    step = interlace(
        "score", "bundled:qwen3-vl", "-o", scores, "--count", 4, "--tower", "text", "--metrics",
        "similarity,head_norm,ffn_norm",
    )  # fmt: skip
    assert step[0] == 0, step
    step = interlace(
        "plan", scores, "-o", plan, "--num-drop", 2, "--heads", 0.5, "--ffn", "text=0.25",
        "--spread", "global", "--graft", 0.5, "--width-metrics", "ffn=random",
    )  # fmt: skip
    assert step[0] == 0, step
    made = json.loads(plan.read_text())
    assert made["settings"]["heads"] == 0.5
    assert made["settings"]["ffn"] == {"text": 0.25}
    assert made["settings"]["width_metrics"] == {"ffn": "random"}
    text = made["towers"]["text"]
    assert len(text["drop"]) == 2
    assert text["cut"]
    assert text["graft"]
    # widths alone drop nothing
    step = interlace("plan", scores, "-o", plan, "--ffn", 0.25, "--overwrite")
    assert step[0] == 0, step
    assert json.loads(plan.read_text())["towers"]["text"]["drop"] == []


def test_parts_of_layers_are_planned_and_taken_out(interlace, tmp_path: Path) -> None:
    scores, plan, student = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "out"
    shares = ("--attention-parts", "text=0.4,vision=0.4", "--ffn-parts", 0.4)
    metrics = "similarity,attention_relevance,mlp_relevance"
    assert interlace("score", "bundled:clip", "-o", scores, "--metrics", metrics)[0] == 0
    assert interlace("plan", scores, "-o", plan, *shares)[0] == 0
    towers = json.loads(plan.read_text())["towers"].values()
    assert [set(tower["parts"]) for tower in towers] == [{"self_attn", "mlp"}] * 2
    assert interlace("prune", "bundled:clip", plan, "-o", student)[0] == 0
    assert not json.loads((student / "interlace.json").read_text())["standard"]
