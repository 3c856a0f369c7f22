"""Export: a standard transformers checkpoint with its records and a model card, proven to reload.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.export.card import model_card
    from interlace.export.checkpoint import export
    from interlace.export.verify import Verification, verify_checkpoint

__all__ = ["Verification", "export", "model_card", "verify_checkpoint"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Verification": "verify",
        "export": "checkpoint",
        "model_card": "card",
        "verify_checkpoint": "verify",
    },
)
