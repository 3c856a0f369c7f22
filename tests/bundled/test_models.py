"""The bundled models: small, standard, and really able to do their tasks."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from safetensors import safe_open

import interlace as il
from interlace.bundled import NAMES, resolve
from interlace.bundled.train import PHASES, Phase, _sample, train
from interlace.errors import ConfigError

MEGABYTES_8 = 8_000_000


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_bf16_and_standard(name: str) -> None:
    folder = Path(resolve(f"bundled:{name}"))
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= MEGABYTES_8
    with safe_open(weights, "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    _, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_depths_are_those_that_pruning_needs() -> None:
    qwen = il.open_model("bundled:qwen3-vl")
    assert qwen.towers["text"].num_layers >= 16
    config = qwen.model.config.text_config
    assert config.num_key_value_heads < config.num_attention_heads
    assert qwen.model.config.vision_config.deepstack_visual_indexes
    clip = il.open_model("bundled:clip")
    assert min(clip.towers[name].num_layers for name in ("text", "vision")) >= 12


@pytest.mark.parametrize(
    ("name", "task", "metric", "at_least"),
    [
        ("qwen3-vl", "vqa", "accuracy", 0.95),
        ("qwen3-vl", "caption", "exact_match", 0.80),
        ("clip", "retrieval", "image_to_text_r1", 0.90),
        ("blip", "caption", "exact_match", 0.80),
    ],
)
def test_held_out_scenes_are_solved(name: str, task: str, metric: str, at_least: float) -> None:
    vlm = il.open_model(f"bundled:{name}", dtype="float32")
    report = il.evaluate(vlm, tasks=(task,), count=192, seed=77, batch_size=64, max_new_tokens=56)
    assert report.metrics[task][metric] >= at_least


def test_training_conversations_have_the_shape_of_the_task() -> None:
    rng = random.Random(0)
    for phase in (*PHASES["qwen3-vl"], *PHASES["qwen3-vl-crowded"]):
        samples = [_sample(str(number), rng, phase, easy=False) for number in range(60)]
        lengths = {len(sample.turns) for sample in samples}
        assert lengths == {2, 2 * phase.questions}
        assert all(sample.turns[0].text.startswith("<image>\n") for sample in samples)
        assert all("<image>" not in turn.text for sample in samples for turn in sample.turns[1:])


def test_a_few_training_steps_lower_the_loss(monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.setitem(PHASES, "blip", (Phase(100, 8, 1e-3, warmup_steps=5),))
    # by name, since what ran before in this process may have made the package quieter
    with caplog.at_level("INFO", logger="interlace"):
        train("blip", tmp_path / "blip", bf16=False)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", caplog.text)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert il.open_model(tmp_path / "blip").processor is not None


def test_a_model_for_crowded_scenes_begins_as_the_bundled_one(
    monkeypatch, tmp_path: Path, caplog
) -> None:
    (usual,) = PHASES["blip-crowded"]
    monkeypatch.setitem(PHASES, "blip-crowded", (replace(usual, steps=50, batch_size=4),))
    with caplog.at_level("INFO", logger="interlace"):
        train("blip-crowded", tmp_path / "blip", bf16=False)
    (loss,) = (float(loss) for loss in re.findall(r"loss ([\d.]+)", caplog.text))
    # fresh weights start at 4
    assert loss < 1.0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'clip'"):
        resolve("bundled:clipp")
    assert resolve("some/folder") == "some/folder"
