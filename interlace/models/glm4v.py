"""GLM-4.1V and GLM-4.6V, which share their layers: patches of all images in one row, as in Qwen."""

from __future__ import annotations

from interlace.models.family import Family

GLM4V = Family(
    name="glm4v",
    model_types=("glm4v", "glm46v"),
    objective="chat",
    architectures=("Glm4vForConditionalGeneration", "Glm46VForConditionalGeneration"),
)
