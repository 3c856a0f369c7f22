"""Qwen3-VL, dense and with experts: DeepStack ties vision layers to text layers by number.

The vision tower hands out a feature after each layer in `deepstack_visual_indexes`, through a
merger of its own; the text tower adds feature j to the image tokens after layer j, BY INDEX. So the
first text layers and the tapped vision layers are bound.
With experts, a text layer has them unless `mlp_only_layers` names it or `decoder_sparse_step` skips
it; after a cut the first states both.
Source: Meng et al. 2024, "DeepStack", and the Qwen3-VL technical report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from interlace.errors import PlanError
from interlace.models.family import Changes, Family, Shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = "deepstack_visual_indexes"
_PLAIN, _STEP = "mlp_only_layers", "decoder_sparse_step"


def _indexes(model: PreTrainedModel) -> list[int]:
    config: Any = model.config
    return list(getattr(config.vision_config, _KEY, ()) or ())


def _bound(model: PreTrainedModel, tower_name: str) -> dict[int, str]:
    indexes = _indexes(model)
    if tower_name == "vision":
        return {i: f"DeepStack takes a vision feature after vision layer {i}" for i in indexes}
    if tower_name == "text":
        return {
            j: f"DeepStack adds the feature of vision layer {i} after text layer {j}"
            for j, i in enumerate(indexes)
        }
    return {}


def _remap(cut: Shortened) -> Changes:
    before = _indexes(cut.model)
    if cut.tower_name == "text":
        # A feature goes with the text layer it belongs to: the others then still stand at their own
        # layers, since the kept ones among the first len(before) layers come first, in order.
        gone = {*range(cut.num_layers)} - {*cut.kept}
        rest = [j for j in range(len(before)) if j not in gone]
        for module in cut.model.modules() if len(rest) < len(before) else ():
            if "deepstack_merger_list" in dict(module.named_children()):
                mergers: Any = module.deepstack_merger_list
                module.deepstack_merger_list = nn.ModuleList([mergers[j] for j in rest])
        return cut.renumber(_KEY, before, [before[j] for j in rest])
    if cut.tower_name == "vision":
        # A dropped layer passes its input through, so its feature is read after the nearest kept
        # layer below.
        after = [cut.below(i + 1) - 1 for i in before]
        if min(after, default=0) < 0:
            raise PlanError(
                f"The plan drops vision layers 0..{min(before)}, so the DeepStack feature of layer "
                f"{min(before)} would be taken before the first layer, which Qwen3-VL cannot "
                "state. Keep one of them."
            )
        if len(set(after)) < len(after):
            raise PlanError(
                f"The plan would have two DeepStack features ({before}) taken after the same kept "
                f"vision layer (positions {after}), which Qwen3-VL cannot state. Keep a vision "
                "layer between them."
            )
        return cut.renumber(_KEY, before, after)
    return {}


def _remap_experts(cut: Shortened) -> Changes:
    changes = _remap(cut)
    if cut.tower_name != "text":
        return changes
    model_config: Any = cut.model.config
    config = model_config.text_config
    plain, step = list(config.mlp_only_layers), config.decoder_sparse_step
    without = [
        position
        for position, layer in enumerate(cut.kept)
        if layer in plain or (layer + 1) % step != 0
    ]
    for key, before, after in ((_PLAIN, plain, without), (_STEP, step, 1)):
        if before != after:
            setattr(config, key, after)
            changes[f"text_config.{key}"] = (before, after)
    return changes


QWEN3_VL = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    objective="chat",
    architectures=("Qwen3VLForConditionalGeneration",),
    bound=_bound,
    remapping=_remap,
)

QWEN3_VL_MOE = Family(
    name="qwen3_vl_moe",
    model_types=("qwen3_vl_moe",),
    objective="chat",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    bound=_bound,
    remapping=_remap_experts,
)
