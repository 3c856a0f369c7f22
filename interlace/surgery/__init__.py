"""Surgery: taking layers out of a model, as a transaction.

`prune` is loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.surgery.pruning import prune

__all__ = ["prune"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "prune": "pruning",
    },
)
