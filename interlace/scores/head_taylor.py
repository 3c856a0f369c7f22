"""head_taylor: how much the loss of a sample would change, to first order, without a query head.

Every query head gets a factor xi = 1 before the output projection. Its importance is

    mean over samples of | xi * d loss / d xi |

of the sample's own loss (see losses.py), whatever shares its batch; where a loss depends on the
batch, as the contrastive one does, of the sum of all its losses. It needs answers and a backward
pass; only the factors get gradients, never the parameters.

Source: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", eq. 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.scores.widths import Gauge

if TYPE_CHECKING:
    import torch


class HeadTaylor(Gauge):
    """Mean size of the first-order change of the loss; [0, inf), in units of the loss."""

    kind = "heads"
    gradient = True

    def read(self, columns: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """Nothing is known before the backward pass; see `Gauge`."""
        return None
