"""What a batch holds for the loss: model inputs, tokens to predict, what terms are averaged over.

Legend: B batch, T tokens of the sequence that the head sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import DataError
from interlace.models.predictor import IGNORED, targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Everything `count_items` may count.
COUNTED = (
    "samples",
    "rows",
    "tokens",
    "labels",
    "answers",
    "square_labels",
    "tower:text",
    "tower:text_encoder",
    "tower:vision",
)

# What the predictive loss is divided by, by `HealSettings.loss_reduction`.
REDUCED_BY = {"token": "labels", "sample": "answers", "square": "square_labels"}
# A token of an answer of n tokens counts n to this power.
_POWERS = {"sample": -1.0, "square": -0.5}

Batch = dict[str, Any]


def label_weights(counted: Tensor, reduction: str) -> Tensor | None:
    """Return what every token to predict counts in the loss.

    Args:
        counted: [B, T] bool, the tokens to predict.
        reduction: "token" (all alike), "sample" (1 / n for an answer of n tokens) or "square"
            (1 / sqrt n).

    Returns:
        [N] fp32, in the order of `counted`'s true entries; None where all count alike.

    Source: the three ways and their names: InternVL 2.5 (arXiv 2412.05271), section 3.3.
    """
    if reduction == "token":
        return None
    lengths = counted.sum(1, keepdim=True).float().clamp_min(1.0)
    return lengths.pow(_POWERS[reduction]).expand(counted.shape)[counted]


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
        padding left out); "labels" (tokens to predict), "answers" (samples with some) and
        "square_labels" (sum over samples of the square root of their number); "tower:..." (tokens
        of a tower that has padding).

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
        lengths = (targets_of(batch["labels"], shift=shift) != IGNORED).sum(1)
        counts["labels"] = float(lengths.sum())
        counts["answers"] = float((lengths > 0).sum())
        counts["square_labels"] = float(lengths.double().sqrt().sum())
    for tower, mask in token_masks(batch, has_decoder=has_decoder).items():
        counts[f"tower:{tower}"] = float(mask.sum())
    return counts
