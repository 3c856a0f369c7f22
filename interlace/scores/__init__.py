"""Scores: how much every layer of a model changes what passes through it.

`score` runs the model over calibration data, once for what is read off hidden states and again for
every other kind of metric, and gives a `Scores` record. Names are loaded when they are first used,
so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.scores.metrics import METRICS, Meter
    from interlace.scores.scoring import score
    from interlace.scores.tap import Tap

__all__ = ["METRICS", "Meter", "Tap", "score"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "METRICS": "metrics",
        "Meter": "metrics",
        "Tap": "tap",
        "score": "scoring",
    },
)
