"""Tables of the rotary embedding: cosines and sines of positions, and which axis a frequency reads.

Letters: T tokens, F frequencies (half of the rotated elements of a head).

Source: "RoFormer", Su et al. 2021, section 3.4.2; three axes (time, height, width) after
"Qwen2-VL", Wang et al. 2024, section 2.1 (chunked), and "Qwen3-VL Technical Report", 2025
(interleaved).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interlace.errors import ShapeError

__all__ = ["AXES", "axes", "check_sections", "merge", "rope_tables"]

AXES = 3


@torch.no_grad()
def rope_tables(
    positions: Tensor,
    inv_freq: Tensor,
    scaling: float = 1.0,
    *,
    sections: Sequence[int] | None = None,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tabulate cosines and sines of positions, once per forward pass of a model.

    cos[..., t, f] = scaling * cos(positions[..., t] * inv_freq[f]), and the same for the sine: the
    numbers that the rotary modules of transformers compute in fp32, each once and not twice.

    Args:
        positions: [T], [B, T], or with three axes (time, height, width) [3, T] or [3, B, T]; any
            integer or floating-point type.
        inv_freq: radians per position, [F], as the rotary module of a model holds it.
        scaling: factor on both tables; `attention_scaling` of the rotary module.
        sections: frequencies (time, height, width) that add up to F: each frequency is taken from
            its axis, so that every layer reads a third of the bytes. None keeps all axes.
        interleaved: the layout of the sections, see `qk_norm_rope`.

    Returns:
        cos and sin, fp32 [..., T, F]; without the first dimension of `positions` if `sections` is
        given.

    Raises:
        ShapeError: the sections do not add up to F, or positions lack the three axes.
    """
    if inv_freq.dim() != 1:
        raise ShapeError(f"inv_freq has shape {tuple(inv_freq.shape)}; expected [F].")
    angles = positions[..., None].float() * inv_freq.float()
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    if sections is None:
        return cos, sin
    check_sections(sections, inv_freq.shape[0])
    if positions.dim() < 2 or positions.shape[0] != AXES:
        raise ShapeError(
            f"positions has shape {tuple(positions.shape)}; expected [3, ..., T] with sections: "
            "time, height and width of every token."
        )
    return merge(cos, sections, interleaved), merge(sin, sections, interleaved)


def merge(table: Tensor, sections: Sequence[int], interleaved: bool) -> Tensor:
    """Take every frequency from its axis: [3, ..., F] -> [..., F]."""
    places = axes(table.shape[-1], sections, interleaved, table.device)
    return table.gather(0, places.expand(1, *table.shape[1:]))[0]


def axes(
    num_frequencies: int, sections: Sequence[int], interleaved: bool, device: torch.device
) -> Tensor:
    """Number the axis (0 time, 1 height, 2 width) that every frequency reads, [F] int64."""
    time, height, width = sections
    frequency = torch.arange(num_frequencies, device=device)
    if not interleaved:
        return (frequency >= time).long() + (frequency >= time + height)
    axis = frequency % AXES
    reach = torch.where(axis == 1, AXES * height, AXES * width)
    return torch.where(frequency < reach, axis, 0)


def check_sections(sections: Sequence[int], num_frequencies: int) -> None:
    """Refuse sections that are not three counts adding up to the number of frequencies."""
    if len(sections) != AXES or min(sections) < 0 or sum(sections) != num_frequencies:
        raise ShapeError(
            f"sections is {tuple(sections)}; expected three counts (time, height, width) that add "
            f"up to the {num_frequencies} frequencies of the tables."
        )
