"""Which unit (sample or image) and which modality every row of a tower's hidden states belongs to.

Legend: B batch, T tokens, N patches or query tokens per image, I images, D hidden size,
R rows = all dimensions but D.

Text towers: the unit is the row of `input_ids`; image and video placeholders are vision, padding is
ignored. Vision towers: the unit is the image, in the order of the batch; patches masked as padding
are ignored. Q-Former: the unit is the image; its query tokens count as text, since they are learned
and read like a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from interlace.models.handle import VLM

TEXT, VISION, IGNORED = 0, 1, -1

Units = tuple[torch.Tensor, torch.Tensor]


def _mismatch(tower_name: str, hidden: torch.Tensor, expected: str) -> ShapeError:
    return ShapeError(
        f"Tower '{tower_name}': a layer received hidden states of shape {list(hidden.shape)}, but "
        f"the batch says {expected}. Give the batch that the model was run on."
    )


def _by_row(hidden: torch.Tensor, modality: int) -> Units:
    """Every row [T or N, D] of a batch is one unit."""
    num_units, length = hidden.shape[0], hidden.shape[1]
    units = torch.arange(num_units, device=hidden.device).repeat_interleave(length)
    return units, torch.full_like(units, modality, dtype=torch.int8)


def _ignore(modality: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    flat = keep.reshape(-1).to(device=modality.device, dtype=torch.bool)
    return torch.where(flat, modality, torch.full_like(modality, IGNORED))


def _text_units(vlm: VLM, tower_name: str, batch: Mapping[str, Any], hidden: torch.Tensor) -> Units:
    decodes_apart = tower_name == "text" and "text_encoder" in vlm.towers
    ids: torch.Tensor | None = batch.get("input_ids")
    mask: torch.Tensor | None = batch.get("attention_mask")
    if decodes_apart:
        labels = batch.get("labels")
        ids = batch.get("decoder_input_ids", labels)
        mask = batch.get("decoder_attention_mask")
        if mask is None and labels is not None:
            mask = labels != -100
    if hidden.dim() != 3 or (ids is not None and hidden.shape[:2] != ids.shape):
        raise _mismatch(tower_name, hidden, f"tokens {list(ids.shape) if ids is not None else '?'}")
    units, modality = _by_row(hidden, TEXT)
    if ids is not None and not decodes_apart:
        for token in (vlm.family.image_token_id(vlm.model), vlm.family.video_token_id(vlm.model)):
            if token is not None:
                seen = ids.reshape(-1).to(hidden.device) == token
                modality = torch.where(seen, torch.full_like(modality, VISION), modality)
    if mask is not None:
        if mask.shape != hidden.shape[:2]:
            raise _mismatch(tower_name, hidden, f"a mask of {list(mask.shape)}")
        modality = _ignore(modality, mask != 0)
    return units, modality


def _packed(vlm: VLM, tower_name: str, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """How many patches every image, or every video, has in the one row of a vision tower."""
    grids = [batch.get(key) for key in ("image_grid_thw", "video_grid_thw")]
    lengths = [grid.prod(-1) for grid in grids if grid is not None]
    stated = vlm.family.patches(vlm.model, batch) if tower_name == "vision" else None
    return lengths if stated is None else [*lengths, stated]


def _packed_units(tower_name: str, found: list[torch.Tensor], hidden: torch.Tensor) -> Units:
    """Patches of all images in one row, as Qwen's vision towers take them: [R, D] or [1, R, D]."""
    rows = hidden.numel() // hidden.shape[-1]
    for lengths in found:
        if int(lengths.sum()) == rows:
            units = torch.repeat_interleave(lengths.to(hidden.device))
            return units, torch.full_like(units, VISION, dtype=torch.int8)
    stated = " or ".join(str(int(lengths.sum())) for lengths in found)
    raise _mismatch(tower_name, hidden, f"{stated} patches")


def token_units(vlm: VLM, tower_name: str, batch: Mapping[str, Any], hidden: torch.Tensor) -> Units:
    """Tell the rows of a tower's hidden states apart.

    Args:
        vlm: the model.
        tower_name: the tower whose layer received `hidden`.
        batch: the inputs the model was run on.
        hidden: the hidden states as a layer of the tower receives them: [B, T, D], [I, N, D], [R,
            D] or [1, R, D].

    Returns:
        (units [R] int64, counted from 0 in the order of the batch; modality [R] int8: 0 text, 1
        vision, -1 to be ignored), on the device of `hidden`.

    Raises:
        ShapeError: the hidden states are not those of this batch.
    """
    if tower_name in ("text", "text_encoder"):
        return _text_units(vlm, tower_name, batch, hidden)
    packed = _packed(vlm, tower_name, batch)
    if packed:
        return _packed_units(tower_name, packed, hidden)
    if hidden.dim() != 3:
        raise _mismatch(tower_name, hidden, "images [I, N, D]")
    units, modality = _by_row(hidden, TEXT if tower_name == "qformer" else VISION)
    tiles = vlm.family.tiles(vlm.model, batch) if tower_name == "vision" else None
    if tiles is not None and batch.get("pixel_values_videos") is None:
        if int(tiles.sum()) != hidden.shape[0]:
            raise _mismatch(tower_name, hidden, f"{int(tiles.sum())} tiles of images")
        units = torch.repeat_interleave(tiles.to(hidden.device))[units]
    mask = batch.get("pixel_attention_mask")
    if tower_name == "vision" and mask is not None and mask.shape == hidden.shape[:2]:
        modality = _ignore(modality, mask != 0)
    return units, modality
