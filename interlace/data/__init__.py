"""Data: any source of images and text, as one sequence of samples, and batches of them.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Collator": "interlace.data.collate",
    "Sample": "interlace.data.samples",
    "Samples": "interlace.data.samples",
    "Turn": "interlace.data.samples",
    "make_scenes": "interlace.data.scenes",
}

__all__ = ["Collator", "Sample", "Samples", "Turn", "make_scenes"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
