"""Gemma 3 and PaliGemma: a SigLIP tower, a projector, and a Gemma.

Gemma 3's kinds of attention, sliding and full, stand in `layer_types`, which is cut with the
layers.
"""

from __future__ import annotations

from interlace.models.family import Family

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    objective="chat",
    architectures=("Gemma3ForConditionalGeneration",),
)

PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    objective="chat",
    architectures=("PaliGemmaForConditionalGeneration",),
)
