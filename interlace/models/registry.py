"""The known families, and how a model finds its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interlace.errors import FamilyError
from interlace.models.blip import BLIP_CAPTION, BLIP_VQA
from interlace.models.blip2 import BLIP2
from interlace.models.clip import CHINESE_CLIP, CLIP, METACLIP_2
from interlace.models.gemma import GEMMA3, PALIGEMMA
from interlace.models.generic import generic_family
from interlace.models.glm4v import GLM4V
from interlace.models.idefics import IDEFICS3, SMOLVLM
from interlace.models.llava import INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, MISTRAL3
from interlace.models.qwen2_vl import QWEN2_5_VL, QWEN2_VL
from interlace.models.qwen3_5 import QWEN3_5
from interlace.models.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from interlace.models.siglip import SIGLIP, SIGLIP2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from interlace.models.family import Family

FAMILIES: tuple[Family, ...] = (
    QWEN3_5,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN2_5_VL,
    QWEN2_VL,
    GLM4V,
    GEMMA3,
    PALIGEMMA,
    INTERNVL,
    MISTRAL3,
    IDEFICS3,
    SMOLVLM,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    CLIP,
    METACLIP_2,
    CHINESE_CLIP,
    SIGLIP,
    SIGLIP2,
    BLIP_CAPTION,
    BLIP_VQA,
    BLIP2,
)


def known_families() -> str:
    """Name every known family and the classes it covers, for messages."""
    return ", ".join(f"{family.name} ({', '.join(family.architectures)})" for family in FAMILIES)


def known_for(model_type: str) -> tuple[Family, ...]:
    """Return the known families of a `config.model_type`; several where the model class decides."""
    return tuple(family for family in FAMILIES if model_type in family.model_types)


def family_of(model: PreTrainedModel) -> Family:
    """Find the family of a loaded model; a model of unknown type is tried generically.

    Args:
        model: a transformers model.

    Returns:
        The known family, or a generic one after the self-check.

    Raises:
        FamilyError: the class is not covered by the families of its type, or the type is unknown
            and the model does not pass the self-check.
    """
    model_type = str(getattr(model.config, "model_type", ""))
    known = known_for(model_type)
    if not known:
        return generic_family(model, known_families())
    architecture = type(model).__name__
    classes = {cls.__name__ for cls in type(model).__mro__}
    for family in known:
        if classes.intersection(family.architectures):
            return family
    expected = ", ".join(name for family in known for name in family.architectures)
    raise FamilyError(
        f"{architecture} is a '{model_type}' model without the parts that pruning needs; expected "
        f"one of: {expected}. Load the checkpoint with that class."
    )
