"""Heal: train the layers next to the cuts until the student speaks like its teacher again.

`heal` is the verb; the other names are its parts, for those who train in their own loop. Names are
loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.heal.healing import heal
    from interlace.heal.losses import head_terms, normalised_error, similarity_divergence
    from interlace.heal.model import HealModel
    from interlace.heal.trainer import HealTrainer

__all__ = [
    "HealModel",
    "HealTrainer",
    "head_terms",
    "heal",
    "normalised_error",
    "similarity_divergence",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "HealModel": "model",
        "HealTrainer": "trainer",
        "head_terms": "losses",
        "heal": "healing",
        "normalised_error": "losses",
        "similarity_divergence": "losses",
    },
)
