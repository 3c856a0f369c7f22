"""Data: any source of images and text, as one sequence of samples, and batches of them.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.data.collate import Collator
    from interlace.data.samples import Sample, Samples, Turn
    from interlace.data.scenes import make_scenes

__all__ = ["Collator", "Sample", "Samples", "Turn", "make_scenes"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Collator": "collate",
        "Sample": "samples",
        "Samples": "samples",
        "Turn": "samples",
        "make_scenes": "scenes",
    },
)
