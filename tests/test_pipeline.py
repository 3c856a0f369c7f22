"""The whole flow from a recipe: it finishes, skips what is done, and notices what changed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

import interlace as il
from interlace.errors import CheckpointError, ConfigError, InterlaceError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = """
[model]
path = "bundled:qwen3-vl"
dtype = "float32"
[data]
calibration_count = 8
heal_count = 32
[score]
towers = ["text"]
[plan]
drop_fraction = 0.25
[heal]
max_steps = 2
batch_size = 4
learning_rate = 1e-4
[eval]
tasks = ["fidelity", "vqa"]
count = 16
"""


def _recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_flow_skips_what_is_done_and_repeats_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = il.run(_recipe(tmp_path), out)
    assert first.skipped == ()
    assert first.healed is not None
    assert first.healed.steps == 2
    assert first.result.retention is not None
    plain = AutoModelForImageTextToText.from_pretrained(first.folder)
    assert plain.config.text_config.num_hidden_layers == 12
    weights = (first.folder / "model.safetensors").read_bytes()

    with monkeypatch.context() as patch:
        for name in ("prune", "heal"):
            patch.setattr(f"interlace.pipeline.{name}", lambda *_, **__: pytest.fail("done again"))
        second = il.run(_recipe(tmp_path), out)
    assert set(second.skipped) == {"scores", "plan", "eval_raw", "heal", "eval", "export"}
    assert second.result == first.result
    assert (second.folder / "model.safetensors").read_bytes() == weights

    # a stage behind healing gets the healed weights from its checkpoint
    (out / "eval.json").unlink()
    again = il.run(_recipe(tmp_path), out)
    assert set(again.skipped) == {"scores", "plan", "eval_raw", "heal", "export"}
    assert again.result.metrics == first.result.metrics

    changed = RECIPE.replace("drop_fraction = 0.25", "drop_fraction = 0.2")
    third = il.run(_recipe(tmp_path, changed), out)
    assert third.skipped == ("scores",)
    assert len(third.plan["text"].drop) == 3


def test_bridges_are_fitted_on_the_calibration_samples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = "[export]\nverify = false\n" + RECIPE.replace('["fidelity", "vqa"]', '["fidelity"]')
    text = text.replace("max_steps = 2", "max_steps = 0") + '[prune]\nbridges = "fold"\n'
    text += 'token_weights = "fisher"\n'
    bridged = il.run(_recipe(tmp_path, text), out)
    student = il.open_model(bridged.folder)
    assert {bridge.kind for bridge in student.record.bridges} == {"fold"}
    assert {b.settings["token_weights"] for b in student.record.bridges} == {"fisher"}
    assert student.record.inputs["data"] == bridged.scores.inputs["data"]
    again = il.run(_recipe(tmp_path, text), out)
    assert set(again.skipped) == {"scores", "plan", "eval_raw", "eval", "export"}
    # what was exported without a check is not taken for checked
    verified = il.run(_recipe(tmp_path, text.replace("verify = false", "verify = true")), out)
    assert set(verified.skipped) == {"scores", "plan", "eval_raw", "eval"}
    other = il.run(_recipe(tmp_path, text.replace("fold", "scale")), out)
    assert other.skipped == ("scores", "plan")


@pytest.mark.parametrize("bridge", ["fold", "refit"])
def test_a_recipe_that_only_narrows_layers_can_repair_them(bridge: str, tmp_path: Path) -> None:
    text = "[export]\nverify = false\n" + RECIPE.replace('["fidelity", "vqa"]', '["fidelity"]')
    text = text.replace("max_steps = 2", "max_steps = 0") + f'[prune]\nbridges = "{bridge}"\n'
    text = text.replace("towers =", 'metrics = ["ffn_norm"]\ntowers =')
    made = il.run(_recipe(tmp_path, text.replace("drop_fraction", "ffn")), tmp_path / "out")
    student = il.open_model(made.folder)
    assert [bridge.after for bridge in student.record.bridges] == list(range(16))
    assert student.record.bridges[0].kind == "refit"
    assert not any(bridge.dropped for bridge in student.record.bridges)


@pytest.mark.parametrize("rule", ["sleb", "compensated"])
def test_rules_that_ask_for_the_loss_need_no_code(rule: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = "[export]\nverify = false\n" + RECIPE.replace('["fidelity", "vqa"]', '["fidelity"]')
    text = text.replace("max_steps = 2", "max_steps = 0")
    text = text.replace("drop_fraction = 0.25", f"num_drop = 1\nrule = '{rule}'")
    made = il.run(_recipe(tmp_path, text + '[prune]\nbridges = "fold"\n'), out)
    (layer,) = made.plan["text"].drop
    assert made.plan.rule == rule
    assert "lowest loss" in made.plan["text"].reasons[layer]
    # a student that is cut otherwise is another one to judge
    other = il.run(_recipe(tmp_path, text), out)
    assert other.skipped == ("scores",)


def test_a_recipe_takes_parts_out_by_the_loss(tmp_path: Path) -> None:
    text = "[export]\nverify = false\n" + RECIPE.replace('["fidelity", "vqa"]', '["fidelity"]')
    text = text.replace("max_steps = 2", "max_steps = 0")
    text = text.replace("drop_fraction = 0.25", "num_drop = 1\nrule = 'compensated_parts'")
    # all parts but those of two layers stay
    text = text.replace(
        "[heal]", f"protect = {[i for i in range(16) if i not in (9, 12)]}\n[heal]", 1
    )
    made = il.run(_recipe(tmp_path, text + '[prune]\nbridges = "refit"\n'), tmp_path / "out")
    student = il.open_model(made.folder)
    tower = made.plan["text"]
    assert made.plan.rule == "compensated_parts"
    assert tower.parts
    assert set(tower.losing()) | set(tower.drop) <= {9, 12}
    assert not student.record.standard
    whole = il.open_model("bundled:qwen3-vl")
    layers = [p.numel() for p in whole.towers["text"].layers.parameters()]
    assert whole.num_parameters() - student.num_parameters() == pytest.approx(
        sum(layers) / 16, rel=0.01
    )


def test_a_recipe_takes_out_a_share_of_the_parameters(tmp_path: Path) -> None:
    text = "[export]\nverify = false\n" + RECIPE.replace('["fidelity", "vqa"]', '["fidelity"]')
    text = text.replace("max_steps = 2", "max_steps = 0")
    text = text.replace("drop_fraction = 0.25", "parameters = 0.3\nrule = 'compensated'")
    text += '[prune]\nbridges = "refit"\n'
    with pytest.raises(ConfigError, match="Add 'head_obs' to metrics"):
        il.run(_recipe(tmp_path, text), tmp_path / "out")
    metrics = 'metrics = ["similarity", "head_obs", "ffn_obs"]'
    text = text.replace("[score]", f"[score]\n{metrics}")
    with pytest.raises(ConfigError, match="2 stages drop whole layers only"):
        il.run(_recipe(tmp_path, text + "[progressive]\nstages = 2\n"), tmp_path / "out")
    made = il.run(_recipe(tmp_path, text), tmp_path / "out")
    student, whole = il.open_model(made.folder), il.open_model("bundled:qwen3-vl")
    layers = sum(p.numel() for p in whole.towers["text"].layers.parameters())
    gone = whole.num_parameters() - student.num_parameters()
    assert gone == pytest.approx(0.3 * layers, rel=0.05)
    assert made.plan["text"].cut
    assert made.plan.settings["split"]["text"]["chosen"]


def test_the_student_is_measured_fused_and_exported_as_it_was(tmp_path: Path) -> None:
    text = "[export]\nverify = false\n" + RECIPE.replace("max_steps = 2", "max_steps = 0")
    plain = il.run(_recipe(tmp_path, text), tmp_path / "plain")
    text = text.replace("[eval]", "[eval]\nfuse = true")
    fused = il.run(_recipe(tmp_path, text), tmp_path / "fused")
    for report in (fused.raw, fused.result):
        assert report is not None
        assert any("ragged_attention" in line for line in report.details["fused"])
        assert report.metrics["vqa"] == plain.result.metrics["vqa"]
        assert report.inputs == plain.result.inputs
    assert "fused" not in plain.result.details
    weights = [(each.folder / "model.safetensors").read_bytes() for each in (plain, fused)]
    assert weights[0] == weights[1]


def test_missing_model_folder_is_exported_again(tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    text = RECIPE.replace("max_steps = 2", "max_steps = 0") + 'split = "train"\n'
    first = il.run(_recipe(tmp_path, text), out)
    assert first.healed is None
    assert first.result.details["settings"]["data"].startswith("train scenes")
    shutil.rmtree(first.folder)
    left = out / f".{first.folder.name}.4711-deadbeef.tmp"
    left.mkdir()
    (left / "model.safetensors").touch()
    second = il.run(_recipe(tmp_path, text), out)
    assert "export" not in second.skipped
    assert second.folder.exists()
    # what a killed export left
    assert not left.exists()


def test_unknown_recipe_key_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    text = RECIPE.replace("drop_fraction", "drop_fration")
    with pytest.raises(ConfigError, match="Did you mean 'drop_fraction'"):
        il.run(_recipe(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("drop_fraction = 0.25", "rule = 'interlac'", "Did you mean 'interlace'"),
        ("drop_fraction = 0.25", "towers = ['vison']", "Did you mean 'vision'"),
        ("drop_fraction = 0.25", "drop_fraction = {vision = 0.5}", "scores only text"),
        ("drop_fraction = 0.25", "weights = {relevance = 1}", "weighs the metric 'relevance'"),
        ("drop_fraction = 0.25", "protect = 'alignment'", "protects by the metric 'alignment'"),
        ("drop_fraction = 0.25", "rule = 'last'\ngroup = 'text'", "'last' looks at none"),
        ("drop_fraction = 0.25", "ffn = 0.25\nrule = 'last'", "but none are dropped"),
        ("[data]", "[data]\nroot = 'there'", "root is 'there'"),
        ("towers =", "metrics = ['similarty']\ntowers =", "Did you mean 'similarity'"),
        ('"vqa"', '"vqaa"', "Did you mean 'vqa'"),
        ('"vqa"', '"retrieval"', "cannot be done by"),
        ("count = 16", "split = 'tset'", "Did you mean 'test'"),
        ("[heal]", "[prune]\nbridges = 'fodl'\n[heal]", "Did you mean 'fold'"),
        ("[heal]", "[prune]\nbridges = {vison = 'fold'}\n[heal]", "Did you mean 'vision'"),
        (
            "[plan]\ndrop_fraction = 0.25",
            "metrics = ['ffn_norm']\n[plan]\nffn = 0.25\n[prune]\nbridges = 'scale'",
            "names no layers to drop that",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_anything_is_made(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in RECIPE
    with pytest.raises(InterlaceError, match=says):
        il.run(_recipe(tmp_path, RECIPE.replace(old, new)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_folder_of_somebody_else_is_kept(tmp_path: Path) -> None:
    mine = tmp_path / "out" / "model" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        il.run(_recipe(tmp_path), tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").rglob("*")] == ["model", "mine"]


@pytest.mark.parametrize("text", ["[1]", "{", '{"scores": 3}'])
def test_a_damaged_state_is_told(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged.*Remove the folder"):
        il.run(_recipe(tmp_path), out)


def test_measuring_on_what_was_healed_with_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
        rows = [{"image": f"{name}.png", "caption": f"{name} {i}"} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    text = "[export]\nverify = false\n" + RECIPE.replace("max_steps = 2", "max_steps = 1")
    text = text.replace("[data]", f'[data]\nsource = "{tmp_path / "a.json"}"')
    text = text.replace('tasks = ["fidelity", "vqa"]', 'tasks = ["perplexity"]')
    out = tmp_path / "out"
    il.run(_recipe(tmp_path, text), out)
    assert "4 of the 4 samples to measure on were also used" in caplog.text
    caplog.clear()

    # also where it was another task for those that chose the layers
    other = text.replace("[data]", '[data]\ntasks = ["vqa"]')
    rows = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nwhat {i}?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for i in range(4)
    ]
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps(rows))
    other = other.replace(str(tmp_path / "a.json"), str(talk))
    il.run(_recipe(tmp_path, other), tmp_path / "other")
    assert "4 of the 4 samples to measure on were also used" in caplog.text
    caplog.clear()

    apart = text + f'source = "{tmp_path / "b.json"}"\n'
    second = il.run(_recipe(tmp_path, apart), out)
    assert "were also used" not in caplog.text
    assert "/b.json;" in second.result.details["settings"]["data"]
    # the records stand for the content of the data, not for its name alone
    rows = (tmp_path / "b.json").read_text().replace("b 3", "c 3")
    (tmp_path / "b.json").write_text(rows)
    third = il.run(_recipe(tmp_path, apart), out)
    assert set(third.skipped) == {"scores", "plan", "heal"}


PROGRESSIVE = """
[model]
path = "bundled:clip"
dtype = "float32"
[data]
calibration_count = 8
heal_count = 12
tasks = ["retrieval"]
[score]
towers = ["text"]
[plan]
num_drop = 3
rule = "sleb"
towers = ["text"]
[heal]
batch_size = 4
learning_rate = 1e-4
[progressive]
stages = 2
export_stages = true
[eval]
tasks = ["retrieval"]
count = 12
[export]
verify = false
"""


def test_a_progressive_recipe_exports_every_stage_and_skips_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = il.run(_recipe(tmp_path, PROGRESSIVE), out)
    assert first.progressive is not None
    assert [len(stage.gone["text"]) for stage in first.progressive.stages] == [2, 3]
    assert first.plan.dropped == first.progressive.stages[-1].gone
    assert first.raw is None
    assert first.result.retention is not None
    for folder, layers in (("model-stage-1", 10), ("model", 9)):
        config = json.loads((out / folder / "config.json").read_text())
        assert config["text_config"]["num_hidden_layers"] == layers
        assert il.open_model(out / folder).towers["text"].num_layers == layers
    assert (out / "model" / "progressive.json").exists()

    second = il.run(_recipe(tmp_path, PROGRESSIVE), out)
    assert {"stage-2/student", "eval", "export", "export/model-stage-1"} <= set(second.skipped)
    assert second.progressive == first.progressive
    assert second.result == first.result

    limited = PROGRESSIVE.replace("stages = 2", "stages = 2\nmin_retention = 1.0")
    limited = limited.replace("num_drop = 3", "num_drop = 9")
    limited = limited.replace('rule = "sleb"', 'rule = "random"\nprotect = []')
    with pytest.raises(PlanError, match=r"min_retention=1\..* So there is no student to hand over"):
        il.run(_recipe(tmp_path, limited), tmp_path / "limited")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("stages = 2", "stage = 2", "Did you mean 'stages'"),
        ("stages = 2", "guard = 'vqa/accuracy'", "task for the guard"),
        ('rule = "sleb"', 'rule = "slebb"', "Did you mean 'sleb'"),
        ("stages = 2", "gate_importance = 1.0", "gates is 'none'"),
    ],
)
def test_a_progressive_recipe_is_checked_first(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(InterlaceError, match=says):
        il.run(_recipe(tmp_path, PROGRESSIVE.replace(old, new)), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_smaller_model_of_somebody_else_is_kept(tmp_path: Path) -> None:
    mine = tmp_path / "out" / "model-stage-1" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="model-stage-1 exists already"):
        il.run(_recipe(tmp_path, PROGRESSIVE), tmp_path / "out")
    assert mine.read_text() == "mine"
