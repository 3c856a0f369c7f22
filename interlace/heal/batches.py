"""What a batch holds for the loss: model inputs, tokens to predict, what terms are averaged over.

Legend: B batch, T tokens of the sequence that the head sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from interlace.errors import DataError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

IGNORED = -100

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


def is_encoder_decoder(owner: nn.Module) -> bool:
    """Tell whether the model that owns the head reads its labels unshifted through a decoder."""
    return bool(getattr(getattr(owner, "config", None), "is_encoder_decoder", False))


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


def targets_of(labels: Tensor, *, shift: bool) -> Tensor:
    """Return the token that every place predicts, [B, T] int64, -100 where none counts."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels


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


def model_inputs(batch: Mapping[str, Any], owner: nn.Module, objective: str) -> Batch:
    """Return the keyword arguments of the forward pass, labels left out.

    A model that is given labels computes full logits for a loss of its own. The decoders that read
    their input from the labels get it here instead.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch.get("labels")
    if labels is None or "decoder_input_ids" in inputs:
        return inputs
    if is_encoder_decoder(owner):
        prepare: Any = owner.prepare_decoder_input_ids_from_labels
        inputs["decoder_input_ids"] = prepare(labels=labels)
    elif objective == "vqa":
        config: Any = getattr(owner, "config", None)
        padding = getattr(config, "pad_token_id", None) or 0
        inputs["decoder_input_ids"] = labels.masked_fill(labels == IGNORED, padding)
        inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs


def aligned(hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the places of `hidden` that `targets` [B, T] speaks of, [B, T, D].

    Raises:
        ShapeError: there are fewer places than labels.
    """
    places = hidden[:, -targets.shape[1] :]
    if places.shape[:2] != targets.shape:
        raise ShapeError(
            f"The labels have the shape {tuple(targets.shape)}, but the model predicts at "
            f"{tuple(hidden.shape[:2])} places. The collator does not fit this model."
        )
    return places
