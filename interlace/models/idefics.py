"""Idefics3 and SmolVLM: tiles of images of which those that are black are padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interlace.models.family import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel


def _tiles(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Tiles of every sample: [samples with images]; those that are black fill a batch up."""
    pixels: torch.Tensor | None = batch.get("pixel_values")
    if pixels is None:
        return None
    real: torch.Tensor = (pixels != 0).flatten(2).any(-1).sum(1)
    return real[real > 0]


IDEFICS3 = Family(
    name="idefics3",
    model_types=("idefics3",),
    objective="chat",
    architectures=("Idefics3ForConditionalGeneration",),
    tiles=_tiles,
)

SMOLVLM = Family(
    name="smolvlm",
    model_types=("smolvlm",),
    objective="chat",
    architectures=("SmolVLMForConditionalGeneration",),
    tiles=_tiles,
)
