"""Heal: train the layers next to the cuts until the student speaks like its teacher again.

`heal` is the verb; the other names are its parts, for those who train in their own loop. Names are
loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace.heal.healing import heal
    from interlace.heal.losses import head_terms, normalised_error, similarity_divergence
    from interlace.heal.model import HealModel
    from interlace.heal.trainer import HealTrainer

_HOMES = {
    "HealModel": "interlace.heal.model",
    "HealTrainer": "interlace.heal.trainer",
    "head_terms": "interlace.heal.losses",
    "heal": "interlace.heal.healing",
    "normalised_error": "interlace.heal.losses",
    "similarity_divergence": "interlace.heal.losses",
}

__all__ = [
    "HealModel",
    "HealTrainer",
    "head_terms",
    "heal",
    "normalised_error",
    "similarity_divergence",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
