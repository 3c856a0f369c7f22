"""What a batch holds for the loss: model inputs, tokens to predict, what terms are averaged over.

Legend: B batch, T tokens of the sequence that the head sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import DataError
from interlace.models.prediction import IGNORED, targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Everything `count_items` may count.
COUNTED = (
    "samples",
    "rows",
    "tokens",
    "labels",
    "tower:text",
    "tower:text_encoder",
    "tower:vision",
)

Batch = dict[str, Any]


def token_masks(batch: Mapping[str, Any], *, has_decoder: bool) -> dict[str, Tensor]:
    """Return which tokens count, by tower: [B, T] bool for the towers where padding occurs.

    Args:
        batch: what the collator gave.
        has_decoder: the text tower reads the labels, the text encoder reads `input_ids`.
    """
    masks: dict[str, Tensor] = {}
    attended = batch.get("attention_mask")
    if attended is not None:
        masks["text_encoder" if has_decoder else "text"] = attended.bool()
    if has_decoder and "labels" in batch:
        masks["text"] = batch["labels"] != IGNORED
    if "pixel_attention_mask" in batch:
        masks["vision"] = batch["pixel_attention_mask"].bool()
    return masks


def num_rows(batch: Mapping[str, Any], tower: str) -> int:
    """Return how much of a tower without padding a batch fills: texts, or images (or patches)."""
    key = "input_ids" if tower.startswith("text") else "pixel_values"
    value = batch.get(key)
    return int(value.shape[0]) if isinstance(value, torch.Tensor) else 0


def count_items(batch: Mapping[str, Any], *, has_decoder: bool, shift: bool) -> dict[str, float]:
    """Count what the loss terms of a batch are averaged over.

    Returns:
        "samples" (texts); "rows" (images, or patches where a family packs them); "tokens" (text,
        padding left out); "labels" (tokens to predict); "tower:..." (tokens of a tower that has
        padding).

    Raises:
        DataError: the batch holds no text.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise DataError(
            f"A batch holds no input_ids, only {sorted(batch)}. "
            "The processor does not fit this model."
        )
    attended = batch.get("attention_mask")
    counts = {
        "samples": float(num_rows(batch, "text")),
        "rows": float(num_rows(batch, "vision")),
        "tokens": float(ids.numel() if attended is None else attended.sum()),
    }
    if "labels" in batch:
        counts["labels"] = float((targets_of(batch["labels"], shift=shift) != IGNORED).sum())
    for tower, mask in token_masks(batch, has_decoder=has_decoder).items():
        counts[f"tower:{tower}"] = float(mask.sum())
    return counts
