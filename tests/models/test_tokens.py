"""Units and modalities of the rows that a tower's first layer receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, tiny_inputs

from interlace.errors import ShapeError
from interlace.models import VLM, open_model, token_units

# Tower -> (rows per unit, text rows, vision rows, ignored rows) of the tiny inputs.
EXPECTED = {
    "qwen3_vl": {"vision": ([16, 24], 0, 40, 0), "text": ([13, 13], 15, 10, 1)},
    "llava_next": {"vision": ([34, 34], 0, 68, 0), "text": ([43, 43], 11, 72, 3)},
    "siglip2": {"vision": ([16, 16], 0, 28, 4), "text": ([9, 9], 18, 0, 0)},
    "blip_vqa": {
        "vision": ([17, 17], 0, 34, 0),
        "text_encoder": ([9, 9], 15, 0, 3),
        "text": ([6, 6], 11, 0, 1),
    },
    "blip2_t5": {
        "vision": ([17, 17], 0, 34, 0),
        "qformer": ([5, 5], 10, 0, 0),
        "text_encoder": ([12, 12], 11, 10, 3),
        "text": ([6, 6], 11, 0, 1),
    },
}


def received(vlm: VLM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the first layer of every tower is given."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    for name, tower in vlm.towers.items():
        tower.layers[0].register_forward_pre_hook(watch(name), with_kwargs=True)
    with torch.no_grad():
        vlm.model(**inputs)
    return seen


@pytest.mark.parametrize("name", list(EXPECTED))
def test_units_and_modalities(name: str) -> None:
    vlm = open_model(TINY[name]())
    inputs = tiny_inputs(name, vlm.model)
    hidden = received(vlm, inputs)
    assert set(hidden) == set(EXPECTED[name])
    for tower, (rows, text, vision, ignored) in EXPECTED[name].items():
        units, modality = token_units(vlm, tower, inputs, hidden[tower])
        assert units.dtype is torch.int64
        assert modality.dtype is torch.int8
        assert units.bincount().tolist() == rows
        counts = [int((modality == kind).sum()) for kind in (0, 1, -1)]
        assert counts == [text, vision, ignored]


def test_vision_rows_are_the_image_tokens() -> None:
    vlm = open_model(TINY["llava"]())
    inputs = tiny_inputs("llava", vlm.model)
    batch, length = inputs["input_ids"].shape
    _, modality = token_units(vlm, "text", inputs, torch.zeros(batch, length, 32))
    image = vlm.family.image_token_id(vlm.model)
    assert torch.equal(modality.view(batch, length) == 1, inputs["input_ids"] == image)


def test_foreign_hidden_states_are_refused() -> None:
    vlm = open_model(TINY["qwen3_vl"]())
    inputs = tiny_inputs("qwen3_vl", vlm.model)
    with pytest.raises(ShapeError, match=r"shape \[2, 5, 32\].*\[2, 13\]"):
        token_units(vlm, "text", inputs, torch.zeros(2, 5, 32))
    with pytest.raises(ShapeError, match="40 patches"):
        token_units(vlm, "vision", inputs, torch.zeros(39, 32))
