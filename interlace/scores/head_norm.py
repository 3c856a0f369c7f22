"""head_norm: how much every query head adds to the residual stream.

Legend: N tokens, H query heads, D size of a head.

For a token with head outputs x_h and the columns W_h of the output projection that read them,

    |W_h x_h|_2 / |hidden state at the input of the layer|_2

averaged over tokens. The norm of the hidden state makes layers comparable, whose streams grow with
depth.

Source: the L2 norm of what a head gives out, over calibration data, ranks heads in Minitron
(Muralidharan et al. 2024, arXiv 2407.14679, section 2.2); taken behind the output projection here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from interlace.scores.widths import Gauge

if TYPE_CHECKING:
    from interlace.models.sites import Site


class HeadNorm(Gauge):
    """Mean relative norm of what a query head adds; [0, inf)."""

    kind = "heads"

    def __init__(self, site: Site) -> None:
        """Prepare the products of the projection's columns, so that no head is projected."""
        super().__init__(site)
        weight = site.output.weight.detach().float()
        blocks = weight.view(-1, site.num_units, site.head_dim).transpose(0, 1)
        # [H, D, D]; |W x|^2 = x' (W' W) x
        self.gram = blocks.transpose(1, 2) @ blocks

    def read(self, columns: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the norms, [N, H]; see `Gauge`."""
        heads = columns.float().view(-1, self.site.num_units, self.site.head_dim)
        square = (torch.einsum("nhd,hde->nhe", heads, self.gram) * heads).sum(-1)
        norms: torch.Tensor = square.clamp_min(0).sqrt() / residual[:, None]
        return norms
