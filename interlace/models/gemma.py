"""Gemma 3 and PaliGemma: a SigLIP tower, a projector, and a Gemma.

Gemma 3's kinds of attention, sliding and full, stand in `layer_types`, which is cut with the
layers. Each has a table of positions of its own.
"""

from __future__ import annotations

from interlace.models.family import Family
from interlace.models.kinds import keep_one_of, last_of

_KINDS = ("full_attention", "sliding_attention")

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    objective="chat",
    architectures=("Gemma3ForConditionalGeneration",),
    advised=last_of(*_KINDS),
    remapping=keep_one_of(*_KINDS),
)

PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    objective="chat",
    architectures=("PaliGemmaForConditionalGeneration",),
)
