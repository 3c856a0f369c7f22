from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from progressive.runs import clip, small
from transformers import CLIPModel

import interlace as il
from interlace.config import PlanSettings, ProgressiveSettings, PruneSettings, ScoreSettings
from interlace.errors import ConfigError, DataError
from interlace.records import load_record

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def vlm() -> Any:
    return clip()


def _weights(vlm: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in vlm.model.named_parameters()}


def test_one_run_yields_every_smaller_fraction(vlm: Any, tmp_path: Path) -> None:
    before = _weights(vlm)
    made = small(vlm, tmp_path / "run")
    for name, value in vlm.model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert made.stopped == ""
    assert made.rolled_back is None
    first, second = made.stages
    assert [len(stage.layers["text"]) for stage in made.stages] == [2, 3]
    assert second.layers["text"][:2] == first.layers["text"]
    assert load_record(tmp_path / "run" / "progressive.json") == made.record
    for stage in made.stages:
        student = stage.student()
        gone = set(stage.layers["text"])
        assert student.towers["text"].original == tuple(i for i in range(12) if i not in gone)
        assert student.record.dropped == {"text": tuple(sorted(gone))}
        assert student.plan == stage.plan
        assert str(stage.plan).startswith("Plan by rule 'interlace'")
        assert 0 < stage.retention <= 1.5
    # the first stage learned gates, which are in its weights; the last had no use for them
    assert set(first.healed.gates["text"]) == set(range(12)) - set(first.layers["text"])
    assert second.healed.gates == {}
    # the heads of the two students are shared with the dense model, what trained is their own
    student = second.student()
    own = {name: value.data_ptr() for name, value in student.model.named_parameters()}
    assert own["text_projection.weight"] == vlm.model.text_projection.weight.data_ptr()
    for layer in second.plan["text"].tune:
        path = f"text_model.encoder.layers.{student.towers['text'].position(layer)}.mlp.fc1.weight"
        assert (
            own[path]
            != vlm.model.get_parameter(
                f"text_model.encoder.layers.{layer}.mlp.fc1.weight"
            ).data_ptr()
        )

    out = il.export(first.student(), tmp_path / "smaller", records=first.records, verify=False)
    plain = CLIPModel.from_pretrained(out)
    assert plain.config.text_config.num_hidden_layers == 10
    for name, value in first.student().model.named_parameters():
        assert torch.equal(value, plain.get_parameter(name)), name
    il.export(made.student, tmp_path / "whole", records=made.records, verify=False)


def test_it_heals_on_the_tokens_of_one_cut(vlm: Any, tmp_path: Path) -> None:
    plain = {"heal": {"gates": "none", "epochs": 2.0, "validation_fraction": 0.25}}
    staged = small(vlm, tmp_path / "staged", **plain, stages=3)
    single = small(vlm, tmp_path / "single", **plain, stages=1)
    assert len(staged.stages) == 3
    assert len(single.stages) == 1
    for key in ("steps", "num_samples", "tokens"):
        total = sum(getattr(stage.record, key) for stage in staged.stages)
        assert total == getattr(single.stages[0].record, key), key
    assert single.stages[0].record.num_samples == 2 * 6
    # none trains on what another validates with
    judging = {stage.healed.inputs["validation"] for stage in (*staged.stages, *single.stages)}
    assert len(judging) == 1
    assert all(len(stage.healed.validation) == 5 for stage in staged.stages)
    # a single stage is the flow of a single cut
    data = il.samples("scenes", count=8, tasks=("retrieval",), processor=vlm.processor)
    scores = il.score(vlm, data, batch_size=8, towers=("text",))
    plan = il.make_plan(scores, num_drop=3, protect="auto", towers=("text",))
    assert plan.dropped == single.stages[0].layers


def test_gates_may_stand_on_heads_in_all_stages_but_the_last(vlm: Any, tmp_path: Path) -> None:
    heal = {"gates": "l1", "gate_units": ("heads",), "validation_fraction": 0.0}
    made = small(vlm, tmp_path, heal=heal, stages=2)
    gated = [bool(stage.healed.unit_gates) for stage in made.stages]
    assert gated == [True, False]


def test_a_stage_that_would_collapse_is_rolled_back(
    vlm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # layer 0, without which this model is lost, goes in the second of four stages
    plan = PlanSettings(num_drop=10, rule="random", protect=(), towers=("text",), seed=1)
    given = {"plan": plan, "heal": {"max_steps": 0, "gates": "none"}, "stages": 4}
    given["guard_metric"] = "retrieval/text_to_image_r1"
    free = small(vlm, tmp_path / "free", **given)
    kept = [stage.retention for stage in free.stages]
    assert len(kept) == 4
    assert kept[0] > 0.9
    assert max(kept[1:]) < 0.5
    with caplog.at_level(logging.WARNING):
        guarded = small(vlm, tmp_path / "guarded", **given, min_retention=0.5)
    assert [stage.retention for stage in guarded.stages] == kept[:1]
    assert guarded.rolled_back is not None
    assert guarded.rolled_back.retention == kept[1]
    assert [stage.kept for stage in guarded.record.stages] == [True, False]
    assert "Stage 2 of 4 was rolled back" in guarded.stopped
    assert guarded.stopped in caplog.text
    gone = guarded.stages[0].layers["text"]
    assert guarded.student.towers["text"].original == tuple(i for i in range(12) if i not in gone)
    il.export(guarded.student, tmp_path / "out", records=guarded.records, verify=False)

    # a new limit decides anew; what it decides on is taken from the earlier run
    again = small(vlm, tmp_path / "guarded", **given, min_retention=0.01)
    assert again.stopped == ""
    assert again.record.stages == free.record.stages
    assert {"stage-1/scores", "stage-1/student", "stage-2/eval"} <= set(again.skipped)

    at_once = {**given, "plan": plan.replace(num_drop=6), "stages": 1, "guard_metric": None}
    nothing = small(vlm, tmp_path / "nothing", **at_once, min_retention=1.0)
    assert nothing.stages == ()
    assert nothing.student is vlm
    assert nothing.stopped.endswith("The run ends with the dense model.")


def test_the_default_rule_needs_no_callback(vlm: Any, tmp_path: Path) -> None:
    # the rule of a run without a plan of its own
    given = {"plan": None, "prune": None, "drop_fraction": {"text": 0.17}}
    given["heal"] = {"max_steps": 0}
    made = small(vlm, tmp_path / "run", **given)
    assert len(made.stages) == 2
    assert all(
        "lowest loss" in made.stages[-1].plan["text"].reasons[layer]
        for layer in made.stages[-1].layers["text"]
    )
    assert made.stages[0].healed is None
    assert made.record.settings["plan"]["rule"] == "compensated"
    assert made.record.settings["prune"]["bridges"] == "refit"
    assert made.record.settings["prune"]["token_weights"] == "fisher"


def _equal_weights(model: Any, other: Any) -> None:
    found, again = model.state_dict(), other.state_dict()
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_one_stage_can_take_a_share_of_the_parameters(vlm: Any, tmp_path: Path) -> None:
    given = {"plan": PlanSettings(towers=("text",), rule="compensated"), "score": None}
    given |= {"prune": PruneSettings(bridges="refit"), "parameters": 0.4}
    with pytest.raises(ConfigError, match="2 stages drop whole layers only"):
        small(vlm, tmp_path / "two", **given)
    with pytest.raises(ConfigError, match="drop_fraction how much of something"):
        small(vlm, tmp_path / "both", **given, drop_fraction=0.25, stages=1)
    with pytest.raises(ConfigError, match="above 0 and below 1, got 1"):
        small(vlm, tmp_path / "much", **{**given, "parameters": 1}, stages=1)
    unscored = {**given, "score": ScoreSettings()}
    with pytest.raises(ConfigError, match="Add 'head_obs' to metrics"):
        small(vlm, tmp_path / "unscored", **unscored, stages=1)
    assert not list(tmp_path.iterdir())
    named = {"heads": "head_taylor", "ffn": "random"}
    given["plan"] = given["plan"].replace(width_metrics=named)
    given |= {"stages": 1, "heal": {"gates": "none"}}
    made = small(vlm, tmp_path / "run", **given)
    (stage,) = made.stages
    layers = vlm.towers["text"].layers
    whole = sum(each.numel() for each in layers.parameters())
    lost = vlm.num_parameters() - made.student.num_parameters()
    assert lost / whole == pytest.approx(0.4, abs=0.02)
    assert stage.plan.settings["parameters"] == {"text": 0.4}
    # judged by what the plan names, which is scored without being asked for
    assert set(stage.scores["text"].importance) == {"head_taylor"}
    told = {place: sum(map(len, cut.values())) for place, cut in stage.plan["text"].cut.items()}
    assert stage.record.units == {"text": told} != {"text": {}}
    assert " units of text " in stage.record.gone_text
    assert stage.healed is not None
    # the student of the folder is the one that was made, and a second run finds it there
    _equal_weights(made.student.model, stage.student().model)
    again = small(vlm, tmp_path / "run", **given)
    assert "stage-1/student" in again.skipped
    _equal_weights(made.student.model, again.student.model)


def test_one_stage_can_take_parts(vlm: Any, tmp_path: Path) -> None:
    given = {
        "plan": PlanSettings(num_drop=1, towers=("text",), rule="compensated_parts"),
        "prune": PruneSettings(bridges={"text": "refit"}),
        "heal": {"gates": "none"},
    }
    with pytest.raises(ConfigError, match="Take stages=1"):
        small(vlm, tmp_path / "two", **given)
    made = small(vlm, tmp_path / "one", **given, stages=1)
    (stage,) = made.stages
    assert stage.record.parts == {"text": stage.plan["text"].parts} != {"text": {}}
    assert " of " in stage.record.gone_text
    assert stage.healed is not None
    # the student of the folder is the one that was made
    _equal_weights(made.student.model, stage.student().model)
    out = tmp_path / "out"
    il.export(made.student, out, records=made.records, verify=False)
    _equal_weights(made.student.model, il.open_model(out).model)


def test_bridges_are_folded_in_every_stage(vlm: Any, tmp_path: Path) -> None:
    given = {"heal": {"max_steps": 0, "gates": "none"}, "guard_metric": "loss"}
    bare = small(vlm, tmp_path / "bare", **given)
    bridged = small(vlm, tmp_path / "bridged", **given, prune=PruneSettings(bridges="fold"))
    # the rule scores the student, so later stages may differ; the first cuts the same layers
    assert bridged.stages[0].layers == bare.stages[0].layers
    assert all(b.retention > a.retention for a, b in zip(bare.stages, bridged.stages, strict=True))
    # what is kept holds the folded weights
    kept = bridged.stages[-1].student().model
    for name, value in bridged.student.model.named_parameters():
        assert torch.equal(value, kept.get_parameter(name)), name


def test_a_metric_of_the_guard_that_is_not_known_is_refused_before_scoring(
    vlm: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Unknown metric of retrieval 'text_to_image_r'"):
        small(vlm, tmp_path, guard_metric="retrieval/text_to_image_r")
    assert not list(tmp_path.rglob("*.json"))


def test_samples_may_be_plain_sequences_and_iterators(vlm: Any, tmp_path: Path) -> None:
    data = il.samples("scenes", count=8, tasks=("retrieval",), processor=vlm.processor)
    given = {"calibration": list(data), "healing": iter(data), "held_out": tuple(data)}
    nothing = {"max_steps": 0, "gates": "none"}
    made = small(vlm, tmp_path / "run", **given, heal=nothing, stages=1)
    assert {made.record.inputs[name] for name in given} == {data.fingerprint}


def test_what_cannot_work_is_refused_before_anything_is_made(vlm: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, error, says in (
        ({"rule": "slebb"}, ConfigError, "Did you mean 'sleb'"),
        ({"prune": PruneSettings(bridges="lowrank")}, ConfigError, "module at run time"),
        ({"plan": PlanSettings(num_drop=3, heads=0.25)}, ConfigError, "heads is set in the plan"),
        ({"guard_metric": "retrieval"}, ConfigError, "Give 'loss', or a task and its metric"),
        ({"guard_metric": "vqa/accuracy"}, ConfigError, "task for the guard"),
        ({"min_retention": 1.5}, ConfigError, r"within 0\.\.1"),
        ({"stages": 0}, ConfigError, "at least 1"),
        ({"plan": {"num_drop": 3}}, ConfigError, "A dict was given for PlanSettings"),
        ({"settings": 2}, ConfigError, "A int was given for ProgressiveSettings"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ({"calibration": ["a"]}, DataError, "calibration data holds a str"),
        ({"healing": "scenes"}, DataError, "healing data is a str; give samples"),
        ({"held_out": iter(())}, DataError, "held-out data holds no sample"),
        (
            {"settings": ProgressiveSettings(gate_importance=1.0), "heal": {"gates": "none"}},
            ConfigError,
            "gate_importance weighs the gates",
        ),
    ):
        with pytest.raises(error, match=says):
            small(vlm, out, **changes)
        assert not out.exists()
    with pytest.raises(ConfigError, match="output is None; give the path"):
        small(vlm, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="The last stage learns no gates"):
        small(vlm, out, stages=1)
    with pytest.raises(ConfigError, match="1 optimiser steps in all, fewer than the 2 stages"):
        small(vlm, out, heal={"max_steps": 1})
