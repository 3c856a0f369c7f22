from __future__ import annotations

import pytest

from interlace.config import (
    DataSettings,
    EvalSettings,
    ExportSettings,
    HealSettings,
    ModelSettings,
    PlanSettings,
    PruneSettings,
    Recipe,
    ScoreSettings,
)
from interlace.errors import ConfigError

RECIPE = """
[model]
path = "some/model"
dtype = "bfloat16"

[data]
source = "scenes"
tasks = ["vqa", "caption"]

[score]
packs = "all"

[plan]
drop_fraction = { text = 0.25, vision = 0.5 }
rule = "triplet_optimal"
protect = { text = [0, 1] }

[heal]
epochs = 2
learning_rate = 1e-4
save_steps = 50
"""


def test_a_recipe_is_read(tmp_path):
    path = tmp_path / "recipe.toml"
    # as editors of Windows save it
    path.write_text(RECIPE, encoding="utf-8-sig")
    recipe = Recipe.load(path)
    assert recipe.model == ModelSettings(path="some/model", dtype="bfloat16")
    assert recipe.data.tasks == ("vqa", "caption")
    assert recipe.score.packs == "all"
    assert recipe.plan.drop_fraction == {"text": 0.25, "vision": 0.5}
    assert recipe.plan.protect == {"text": (0, 1)}
    assert recipe.heal.epochs == 2.0
    assert recipe.heal.warmup_fraction == 0.03
    assert recipe.prune == PruneSettings()
    assert recipe.eval == EvalSettings()
    assert recipe.export == ExportSettings()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_all_defaults_hold_up():
    recipe = Recipe.from_dict({"model": {"path": "m"}})
    assert recipe.plan.drop_fraction == 0.25
    assert recipe.plan.protect == "auto"
    assert recipe.data == DataSettings()
    assert recipe.score == ScoreSettings(metrics=["similarity"], packs=[1, 2, 3])
    counted = PlanSettings(num_drop=3)
    assert (counted.drop_fraction, counted.num_drop) == (None, 3)
    assert PlanSettings(protect="alignment").protect == "alignment"
    mixed = PlanSettings(protect={"text": "alignment", "vision": [1]}, weights={"relevance": 1})
    assert mixed.protect == {"text": "alignment", "vision": (1,)}
    assert mixed.weights == {"relevance": 1.0}
    # an explicit empty list asks for the published rules unguarded
    assert PlanSettings(protect=[]).protect == ()


MODEL = {"path": "m"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"modl": MODEL}, "Unknown recipe section 'modl'. Did you mean 'model'"),
        ({}, r"no model. Add a section \[model\]"),
        ({"model": {}}, "missing recipe key path"),
        ({"model": {"path": " "}}, "path is empty"),
        ({"model": "m"}, r"\[model\]: expected ModelSettings, got 'm'"),
        ({"model": {**MODEL, "dtype": "bf16"}}, "Did you mean 'bfloat16'"),
        ({"model": MODEL, "heal": {"lerning_rate": 1}}, r"\[heal\].*Did you mean 'learning_rate'"),
        ({"model": MODEL, "heal": {"learning_rate": 0}}, "above 0 and at most 1"),
        (
            {"model": MODEL, "heal": {"learning_rate": "fast"}},
            r"learning_rate: expected float, got 'fast'",
        ),
        ({"model": MODEL, "heal": {"learning_rate": float("nan")}}, "above 0"),
        ({"model": MODEL, "heal": {"epochs": float("inf")}}, "at least 0, and finite, got inf"),
        (
            {"model": MODEL, "heal": {"epochs": 10**400}},
            r"expected float, got 10{76}\.\.\. ",
        ),
        (
            {"model": MODEL, "heal": {"batch_size": 10**400}},
            r"below 9223\d+, got 10{76}\.\.\.",
        ),
        ({"model": MODEL, "heal": {"seed": 2**32}}, r"within 0\.\.4294967295, got 4294967296"),
        ({"model": MODEL, "heal": {"batch_size": 0}}, "at least 1"),
        ({"model": MODEL, "heal": {"batch_size": 1.5}}, "expected int, got 1.5"),
        ({"model": MODEL, "heal": {"batch_size": True}}, "expected int, got True"),
        ({"model": MODEL, "heal": {"bf16": 1}}, "expected bool, got 1"),
        ({"model": MODEL, "heal": {"warmup_fraction": 1.5}}, r"within 0\.\.1"),
        ({"model": MODEL, "heal": {"schedule": "cosin"}}, "Did you mean 'cosine'"),
        (
            {"model": MODEL, "heal": {"ce_weight": 0, "hidden_weight": 0, "kl_weight": 0}},
            "nothing to train on",
        ),
        ({"model": MODEL, "heal": {"gate_units": ["neuron"]}}, "Did you mean 'neurons'"),
        ({"model": MODEL, "heal": {"gate_units": []}}, "gate_units is empty"),
        ({"model": MODEL, "heal": {"gate_units": ["heads"]}}, "nothing would be gated"),
        ({"model": MODEL, "plan": {"drop_fraction": 1.0}}, "above 0 and below 1"),
        ({"model": MODEL, "plan": {"drop_fraction": {"text": 1.5}}}, "above 0 and below 1"),
        ({"model": MODEL, "plan": {"drop_fraction": 0.2, "num_drop": 2}}, "not both"),
        ({"model": MODEL, "plan": {"num_drop": 0}}, "at least 1"),
        ({"model": MODEL, "plan": {"protect": "atuo"}}, "protect"),
        ({"model": MODEL, "score": {"packs": [0]}}, "at least 1"),
        ({"model": MODEL, "score": {"packs": []}}, "at least 1"),
        ({"model": MODEL, "score": {"metrics": []}}, "metrics is empty"),
        ({"model": MODEL, "data": {"tasks": ["vqq"]}}, "Did you mean 'vqa'"),
        ({"model": MODEL, "data": {"max_bad_fraction": 2}}, r"within 0\.\.1"),
        ({"model": MODEL, "prune": {"bridge": "fold"}}, "Did you mean 'bridges'"),
        ({"model": MODEL, "prune": {"rank": 0}}, "at least 1"),
        ({"model": MODEL, "eval": {"tasks": []}}, "tasks is empty"),
        ({"model": MODEL, "export": {"overwrite": "yes"}}, "expected bool"),
    ],
)
def test_bad_recipes_are_refused_in_words(sections, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict(sections)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        Recipe.load(tmp_path / "missing.toml")
    path = tmp_path / "recipe.toml"
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        Recipe.load(path)
    path.write_text(f"[heal]\nepochs = {'9' * 5000}\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        Recipe.load(path)
    path.write_text("[model]\npath = 'm'\n[heel]\n")
    with pytest.raises(ConfigError, match=r"recipe\.toml: .*Did you mean 'heal'"):
        Recipe.load(path)


def test_replace_checks_names_and_values():
    settings = HealSettings().replace(max_steps=5, learning_rate=1e-3)
    assert (settings.max_steps, settings.learning_rate) == (5, 1e-3)
    with pytest.raises(ConfigError, match=r"setting of HealSettings 'lerning_rate'. Did you mean"):
        HealSettings().replace(lerning_rate=1)
    with pytest.raises(ConfigError, match="at least 0"):
        HealSettings().replace(max_steps=-1)
