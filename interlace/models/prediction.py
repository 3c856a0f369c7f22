"""How a model's predictions line up with the tokens to predict, whatever its family.

Legend: B batch, T tokens of the sequence that the head sees, D width of a token's row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional

from interlace.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

IGNORED = -100


def find_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the head and the (sub)model it belongs to, or None where there is no head."""
    # A model hands on the head of a part of it, which alone knows how its decoder is fed.
    for owner in (*model.children(), model):
        getter = getattr(owner, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        if isinstance(head, nn.Module):
            return head, owner
    return None


def is_encoder_decoder(owner: nn.Module) -> bool:
    """Tell whether the model that owns the head reads its labels unshifted through a decoder."""
    return bool(getattr(getattr(owner, "config", None), "is_encoder_decoder", False))


def targets_of(labels: Tensor, *, shift: bool) -> Tensor:
    """Return the token that every place predicts, [B, T] int64, -100 where none counts."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels


def model_inputs(batch: Mapping[str, Any], owner: nn.Module, objective: str) -> dict[str, Any]:
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
