"""CLIP: two encoders, no quirks. The text tower is causal and pooled at the end-of-text token."""

from __future__ import annotations

from interlace.models.family import Family

CLIP = Family(
    name="clip",
    model_types=("clip",),
    objective="contrastive",
    architectures=("CLIPModel",),
)
