"""Export: a standard transformers checkpoint with its records and a model card, proven to reload.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.export.card import model_card
    from interlace.export.checkpoint import export
    from interlace.export.verify import Verification, verify_checkpoint

_HOMES = {
    "Verification": "interlace.export.verify",
    "export": "interlace.export.checkpoint",
    "model_card": "interlace.export.card",
    "verify_checkpoint": "interlace.export.verify",
}

__all__ = ["Verification", "export", "model_card", "verify_checkpoint"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
