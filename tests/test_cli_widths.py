"""Heads, neurons and parts of layers on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.config import Recipe


@pytest.fixture(scope="module")
def without_similarity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the text tower of the bundled CLIP by all but the similarity."""
    import interlace as il

    path = tmp_path_factory.mktemp("scores") / "scores.json"
    vlm = il.open_model("bundled:clip", dtype="float32")
    calibration = il.samples("scenes", count=4, tasks=("retrieval",), processor=vlm.processor)
    metrics = ("relevance", "head_norm")
    il.score(vlm, calibration, metrics=metrics, towers=("text",)).save(path)
    return path


def test_scores_without_the_similarity_are_told(
    interlace, without_similarity: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    code, _, error = interlace("plan", without_similarity, "-o", plan)
    assert code == 2
    assert "The similarity was not scored" in error
    assert "--metrics similarity" in error
    weights = error.split("such as ")[1].strip().rstrip(".").split()
    assert weights == ["--weights", "relevance=1"]
    # as it says
    assert interlace("plan", without_similarity, "-o", plan, *weights)[0] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--heads", "0.5", "--weights", "bogus=1"), "by weights, but none are dropped"),
        (("--heads", "0.5", "--rule", "shortgpt"), "by rule='shortgpt', but none are dropped"),
        (("--heads", "0.5", "--rule", "interlace"), "by rule='interlace', but none are dropped"),
        (("--heads", "0.5", "--group", "vision"), "by group='vision', but none are dropped"),
        (("--num-drop", "1", "--rule", "last", "--group", "text"), "'last' looks at none"),
    ],
)
def test_what_would_be_ignored_is_refused(
    interlace, without_similarity: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    code, _, error = interlace("plan", without_similarity, "-o", tmp_path / "plan.json", *options)
    assert code == 2
    assert says in error
    assert not (tmp_path / "plan.json").exists()


def test_an_unknown_rule_is_told_of_those_that_plan_takes(interlace, tmp_path: Path) -> None:
    code, _, error = interlace("plan", "none.json", "-o", tmp_path / "p", "--rule", "bogus")
    assert code == 2
    known = error.split("Known: ")[1].strip().rstrip(".").split(", ")
    assert "shortgpt" in known
    for rule in known:
        told = interlace("plan", "none.json", "-o", tmp_path / "p", "--rule", rule)[2]
        assert "none.json" in told, rule


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
    metrics = ("--metrics", "similarity,attention_relevance,mlp_relevance", "--count", 32)
    assert interlace("score", "bundled:clip", "-o", scores, *metrics)[0] == 0
    assert interlace("plan", scores, "-o", plan, *shares)[0] == 0
    towers = json.loads(plan.read_text())["towers"].values()
    assert [set(tower["parts"]) for tower in towers] == [{"self_attn", "mlp"}] * 2
    assert interlace("prune", "bundled:clip", plan, "-o", student)[0] == 0
    assert not json.loads((student / "interlace.json").read_text())["standard"]


def test_progressive_scores_what_a_split_is_to_be_judged_by(
    interlace, recipes: list[Recipe], tmp_path: Path
) -> None:
    call = ("progressive", "bundled:clip", "-o", tmp_path / "out", "--parameters", 0.4)
    named = "heads=head_norm,ffn=ffn_norm"
    for more in ((), ("--width-metrics", named, "--fixed-time", 0.3)):
        assert interlace(*call, *more)[2] == "Error: opened\n"
    default, other = recipes
    assert default.score.metrics == ("similarity", "head_obs", "ffn_obs")
    assert other.score.metrics == ("similarity", "head_norm", "ffn_norm")
    assert (default.plan.fixed_time, other.plan.fixed_time) == (0.0, 0.3)
    assert other.plan.width_metrics == {"heads": "head_norm", "ffn": "ffn_norm"}


def test_progressive_refuses_a_judge_of_what_it_does_not_cut(interlace, tmp_path: Path) -> None:
    named = ("--width-metrics", "heads=head_norm,ffn=ffn_norm")
    told = interlace("progressive", "bundled:clip", "-o", tmp_path / "out", *named)
    assert "judges heads, but none are cut" in told[2]
