"""BLIP: the captioner and the question answerer share the model type "blip"; the class decides.

The question answerer builds its text encoder and its text decoder from one text config, so both
have one depth.
"""

from __future__ import annotations

from interlace.models.family import Family

BLIP_CAPTION = Family(
    name="blip_caption",
    model_types=("blip",),
    objective="caption",
    architectures=("BlipForConditionalGeneration",),
)

BLIP_VQA = Family(
    name="blip_vqa",
    model_types=("blip",),
    objective="vqa",
    architectures=("BlipForQuestionAnswering",),
    shared_depth=(("text", "text_encoder"),),
)
