"""The whole flow from a recipe: it finishes, skips what is done, and notices what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from transformers import AutoModelForImageTextToText

import interlace as il
from interlace.config import Recipe
from interlace.errors import ConfigError

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


def test_flow_skips_what_is_done_and_repeats_what_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = il.run(_recipe(tmp_path), out)
    assert first.skipped == ()
    assert first.healed is not None
    assert first.healed.steps == 2
    assert first.result.retention is not None
    plain = AutoModelForImageTextToText.from_pretrained(first.folder)
    assert plain.config.text_config.num_hidden_layers == 12
    weights = (first.folder / "model.safetensors").read_bytes()

    second = il.run(_recipe(tmp_path), out)
    assert set(second.skipped) == {"scores", "plan", "eval_raw", "heal", "eval", "export"}
    assert second.result == first.result
    assert (second.folder / "model.safetensors").read_bytes() == weights

    changed = RECIPE.replace("drop_fraction = 0.25", "drop_fraction = 0.2")
    third = il.run(_recipe(tmp_path, changed), out)
    assert third.skipped == ("scores",)
    assert len(third.plan["text"].drop) == 3


def test_missing_model_folder_is_exported_again(tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    text = RECIPE.replace("max_steps = 2", "max_steps = 0")
    first = il.run(_recipe(tmp_path, text), out)
    assert first.healed is None
    shutil.rmtree(first.folder)
    second = il.run(_recipe(tmp_path, text), out)
    assert "export" not in second.skipped
    assert second.folder.exists()


def test_unknown_recipe_key_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    text = RECIPE.replace("drop_fraction", "drop_fration")
    with pytest.raises(ConfigError, match="Did you mean 'drop_fraction'"):
        il.run(_recipe(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipe_object_and_file_are_the_same(tmp_path: Path) -> None:
    recipe = Recipe.load(_recipe(tmp_path))
    assert recipe.model.path == "bundled:qwen3-vl"
