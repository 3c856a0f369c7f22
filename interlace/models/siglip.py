"""SigLIP and SigLIP 2: two encoders; the text tower is bidirectional, pooled at its last place."""

from __future__ import annotations

from interlace.models.family import Family

_BIDIRECTIONAL = ("vision", "text")

SIGLIP = Family(
    name="siglip",
    model_types=("siglip",),
    objective="contrastive",
    architectures=("SiglipModel",),
    bidirectional=_BIDIRECTIONAL,
)

SIGLIP2 = Family(
    name="siglip2",
    model_types=("siglip2",),
    objective="contrastive",
    architectures=("Siglip2Model",),
    bidirectional=_BIDIRECTIONAL,
)
