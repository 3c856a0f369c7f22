"""CLIP and what is built as it is: MetaCLIP 2, and Chinese-CLIP with a BERT."""

from __future__ import annotations

from interlace.models.family import Family

CLIP = Family(
    name="clip",
    model_types=("clip",),
    objective="contrastive",
    architectures=("CLIPModel",),
)

METACLIP_2 = Family(
    name="metaclip_2",
    model_types=("metaclip_2",),
    objective="contrastive",
    architectures=("MetaClip2Model",),
)

CHINESE_CLIP = Family(
    name="chinese_clip",
    model_types=("chinese_clip",),
    objective="contrastive",
    architectures=("ChineseCLIPModel",),
    bidirectional=("vision", "text"),
)
