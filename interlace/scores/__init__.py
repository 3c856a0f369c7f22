"""Scores: how much every layer of a model changes what passes through it.

`score` runs the model once over calibration data and gives a `Scores` record. Names are loaded when
they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.scores.metrics import METRICS, Meter
    from interlace.scores.scoring import score
    from interlace.scores.tap import Tap

_HOMES = {
    "METRICS": "interlace.scores.metrics",
    "Meter": "interlace.scores.metrics",
    "Tap": "interlace.scores.tap",
    "score": "interlace.scores.scoring",
}

__all__ = ["METRICS", "Meter", "Tap", "score"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
