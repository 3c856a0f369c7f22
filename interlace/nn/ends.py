"""The first and the last product of a model: patches of images in, words out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from interlace.nn.swap import Fused, autocasting, hooked


def patches_why_not(embedding: Any) -> str | None:
    """Say why a patch embedding is no product of whole patches with a matrix; None if it is."""
    proj = getattr(embedding, "proj", None)
    if type(proj) is not nn.Conv3d or proj.groups != 1 or isinstance(proj.padding, str):
        return f"its projection is a {type(proj).__name__}, not a plain nn.Conv3d"
    if proj.kernel_size != proj.stride or any(proj.padding) or set(proj.dilation) != {1}:
        return "its convolution does not take every pixel once"
    return None


class FusedPatchEmbed(Fused):
    """Patches that come one per row, embedded by one product instead of a convolution."""

    proj: nn.Conv3d

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Embed patches [S, channels * times * height * width] -> [S, hidden]."""
        if autocasting(hidden_states) or hooked(self.proj):
            stock: Tensor = super().forward(hidden_states)
            return stock
        weight = self.proj.weight
        rows = hidden_states.reshape(-1, weight[0].numel()).to(weight.dtype)
        return linear(rows, weight.flatten(1), self.proj.bias)


class FusedHead(Fused):
    """A head that reads the rows that it is given as one matrix."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project [..., hidden] to words."""
        # the last tokens of a batch lie apart, and torch would read all weights once per text
        out: Tensor = super().forward(hidden_states.contiguous())
        return out
