"""Opening models: towers, families and processors.

`open_model` gives a `VLM`; everything else in the package takes that. Names are loaded on first
use, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace._lazy import lazy_names

if TYPE_CHECKING:
    from interlace.models.family import Family
    from interlace.models.handle import VLM, Tower
    from interlace.models.opening import open_model
    from interlace.models.processor import load_processor
    from interlace.models.registry import FAMILIES, family_of, known_families
    from interlace.models.tokens import token_units

__all__ = [
    "FAMILIES",
    "VLM",
    "Family",
    "Tower",
    "family_of",
    "known_families",
    "load_processor",
    "open_model",
    "token_units",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FAMILIES": "registry",
        "Family": "family",
        "Tower": "handle",
        "VLM": "handle",
        "family_of": "registry",
        "known_families": "registry",
        "load_processor": "processor",
        "open_model": "opening",
        "token_units": "tokens",
    },
)
