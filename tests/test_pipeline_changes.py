"""What a recipe says of how a model runs: a run that goes on does again what depends on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import qwen3_vl
from tiny_processors import qwen_processor

import interlace as il
from interlace._stages import key_of
from interlace.config import Recipe
from interlace.pipeline import _measure

if TYPE_CHECKING:
    from pathlib import Path

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"path": "bundled:clip", "dtype": "float32", "device": "cpu"},
    "data": {"calibration_count": 8, "heal_count": 8},
    "plan": {"num_drop": 1, "towers": ["text"]},
    "heal": {"max_steps": 0},
    "eval": {"tasks": ["retrieval"], "count": 8},
    "export": {"verify": False},
}


@pytest.mark.parametrize("more", [{}, {"progressive": {"stages": 1}}])
def test_a_model_in_another_precision_is_another_to_cut_and_export(
    more: dict[str, Any], tmp_path: Path
) -> None:
    first = il.run(Recipe.from_dict({**SECTIONS, **more}), tmp_path / "out")
    assert il.open_model(first.folder).dtype is torch.float32
    half = {**SECTIONS, **more, "model": {**SECTIONS["model"], "dtype": "bfloat16"}}
    second = il.run(Recipe.from_dict(half), tmp_path / "out")
    assert second.skipped == ()
    assert il.open_model(second.folder).dtype is torch.bfloat16


def test_a_model_with_another_processor_or_generation_is_another() -> None:
    def key(
        template: str = "{{ messages }}",
        side: int = 16,
        dtype: Any = torch.float32,
        forbidden: list[int] | None = None,
    ) -> str:
        processor = qwen_processor()
        processor.chat_template = template
        processor.image_processor.size = {"shortest_edge": side, "longest_edge": side}
        vlm = il.open_model(qwen3_vl().to(dtype), processor=processor)
        vlm.model.generation_config.suppress_tokens = forbidden
        return key_of(vlm, "same weights")

    keys = [
        key(),
        key("{{ messages | length }}"),
        key(side=32),
        key(dtype=torch.bfloat16),
        key(forbidden=[3]),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_speed_is_that_of_a_device() -> None:
    def made_of(device: str, task: str) -> list[Any]:
        recipe = Recipe.from_dict({**SECTIONS, "eval": {"tasks": [task]}})
        vlm: Any = SimpleNamespace(device=torch.device(device))
        return _measure(recipe, vlm, None)[1]

    assert made_of("cpu", "speed") != made_of("cuda", "speed")
    # quality is the same wherever it is measured
    assert made_of("cpu", "retrieval") == made_of("cuda", "retrieval")
