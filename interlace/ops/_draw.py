"""Random arguments for the samples of an op."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Draws arguments of one device and dtype, always the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start from a fixed seed.

        Args:
            device: where arguments go; they are drawn on the CPU.
            dtype: of what is drawn.
        """
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        """Draw from a normal distribution of that standard deviation."""
        return self.cast(torch.randn(*size, generator=self.generator) * scale)

    def cast(self, values: Tensor) -> Tensor:
        """Bring values to the device and the dtype."""
        return values.to(self.device, self.dtype)
