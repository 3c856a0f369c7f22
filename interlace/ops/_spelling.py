"""How messages of the ops name a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def spell(tensor: Tensor) -> str:
    """Give dtype, shape and device of a tensor, as a user would say them."""
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
