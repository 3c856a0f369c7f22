"""ffn_norm: how much every neuron of a feed-forward part adds to the residual stream.

Legend: N tokens, F neurons.

For a neuron with activation a_j and the column w_j of the down projection that reads it,

    |a_j| |w_j|_2 / |hidden state at the input of the layer|_2

averaged over tokens; see head_norm.py for the denominator.

Source: activation times weight norm is the measure of Wanda (Sun et al. 2024, arXiv 2306.11695,
eq. 1), here for whole columns; mean activations rank neurons in Minitron (arXiv 2407.14679).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.scores.widths import Gauge

if TYPE_CHECKING:
    import torch

    from interlace.models.sites import Site


class FfnNorm(Gauge):
    """Mean relative norm of what a neuron adds; [0, inf)."""

    kind = "ffn"

    def __init__(self, site: Site) -> None:
        """Take the norms of the columns."""
        super().__init__(site)
        self.norms = site.output.weight.detach().float().norm(dim=0)

    def read(self, columns: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the norms, [N, F]; see `Gauge`."""
        norms: torch.Tensor = columns.float().abs() * self.norms / residual[:, None]
        return norms
