"""Qwen2-VL and Qwen2.5-VL.

Qwen2.5-VL's vision layers attend inside windows, except those numbered in `fullatt_block_indexes`,
which see the whole image. The numbers follow a cut; a dropped full-attention layer leaves the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interlace.models.family import Changes, Family, Shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = "fullatt_block_indexes"


def _advised(model: PreTrainedModel, tower_name: str) -> dict[int, str]:
    config: Any = model.config
    full = list(getattr(config.vision_config, _KEY, ()) or ())
    # The last one that is left is the only place where windows exchange information.
    if tower_name == "vision" and len(full) == 1:
        return {full[0]: "the only vision layer that attends across windows"}
    return {}


def _remap(cut: Shortened) -> Changes:
    config: Any = cut.model.config
    if cut.tower_name != "vision" or not hasattr(config.vision_config, _KEY):
        return {}
    before = list(getattr(config.vision_config, _KEY))
    after = [cut.below(i) for i in before if i in cut.kept]
    return cut.renumber(_KEY, before, after)


QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    objective="chat",
    architectures=("Qwen2VLForConditionalGeneration",),
)

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    objective="chat",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    advised=_advised,
    remapping=_remap,
)
