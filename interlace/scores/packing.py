"""Packing: the samples of a batch end to end in one row, each with positions of its own.

A decoder that is given positions which start again sees where a sample begins, and none looks
into another; no token is spent on padding. Whether a model really takes them so is tried out on
the first batch, since a model that does not would give wrong scores without a word.

Legend: T tokens of a sample, N of all samples of a row.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from interlace._torch_utils import accepts, rounding_tolerance
from interlace.errors import ConfigError
from interlace.models.handle import to_model
from interlace.models.predictor import for_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.models.handle import VLM

# Tensors with one row per text, laid end to end; anything else is per image and just follows.
_PER_TOKEN = ("input_ids", "mm_token_type_ids", "token_type_ids", "labels")


def pack(vlm: VLM, singles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make one row of the batches of single samples.

    Args:
        vlm: the model; it gives the positions where they depend on the images.
        singles: batches of one unpadded sample each, `input_ids` [1, T].

    Returns:
        A batch with `input_ids` [1, N] and `position_ids`, without attention mask.
    """
    names = dict.fromkeys(name for single in singles for name in single)
    row: dict[str, Any] = {}
    for name in names:
        parts = [single[name] for single in singles if name in single]
        if name in _PER_TOKEN:
            row[name] = torch.cat(parts, dim=1)
        elif name != "attention_mask":
            row[name] = _cat_images(parts)
    row["position_ids"] = torch.cat([_positions(vlm, single) for single in singles], dim=-1)
    return row


def check_packing(vlm: VLM, singles: Sequence[dict[str, Any]]) -> None:
    """Compare the last sample of a row with the same sample alone.

    Raises:
        ConfigError: the model mixes the samples of a row.
    """
    ours, theirs = (
        vlm.model(**to_model(for_states(vlm.model, each), vlm)).logits[0, -1]
        for each in (pack(vlm, singles), singles[-1])
    )
    distance = float((ours.double() - theirs.double()).abs().max() / theirs.abs().max().double())
    if not distance <= rounding_tolerance(vlm.dtype):
        raise ConfigError(
            f"{vlm.name} does not keep the samples of a packed row apart (its logits differ by "
            f"{distance:.1e} of their size), so packed=True would give wrong scores. Use "
            "packed=False, which pads."
        )


def refuse_if_unpackable(vlm: VLM) -> None:
    """Refuse models whose text part takes no positions that start again.

    Raises:
        ConfigError: packing cannot work for this family.
    """
    if vlm.family.objective != "chat" or not accepts(vlm.model, "position_ids"):
        raise ConfigError(
            f"packed=True lays prompts end to end in one row, which the family "
            f"'{vlm.family.name}' does not take: its text part has no positions that can start "
            "again within a row. Use packed=False, which pads."
        )


def _positions(vlm: VLM, single: dict[str, Any]) -> torch.Tensor:
    ids = single["input_ids"]
    text = torch.arange(ids.shape[1]).view(1, 1, -1)
    rope_index = getattr(getattr(vlm.model, "model", None), "get_rope_index", None)
    if rope_index is None:
        return text[0]
    if "image_grid_thw" not in single and "video_grid_thw" not in single:
        return text.expand(4, 1, -1)
    # What it reads differs between versions of transformers.
    spatial, _ = rope_index(
        **{
            name: single[name]
            for name in inspect.signature(rope_index).parameters
            if name in single
        }
    )
    # The first row tells the samples apart, the other three turn queries and keys.
    return torch.cat([text.to(spatial), spatial])


def _cat_images(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if parts[0].dim() < 2 or len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    # Images cut into different numbers of tiles: the surplus is padding, as processors do it.
    tiles = max(part.shape[1] for part in parts)
    padded = [
        torch.cat([part, part.new_zeros(part.shape[0], tiles - part.shape[1], *part.shape[2:])], 1)
        for part in parts
    ]
    return torch.cat(padded)
