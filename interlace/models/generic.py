"""Models of unknown type: accepted if no config field numbers layers and the self-check holds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from interlace.errors import FamilyError
from interlace.models import llava
from interlace.models.check import self_check
from interlace.models.discovery import (
    DECODER_KEYS,
    DEPTH_KEYS,
    ENCODER_KEYS,
    PER_LAYER_KEYS,
    config_paths,
    find_towers,
)
from interlace.models.family import Family, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config fields that refer to layers by number or by period.
_NUMBERS_LAYERS = re.compile(
    r"(layer|block|attn|attention|deepstack)"
    r".*(index|indices|indexes|idx|pattern|freq|frequency|interval)"
    r"|(_layers|_layer|_layers_indices|sparse_step|depths|dense_replace)$"
)
# Harmless beside an explicit `layer_types`, which they only serve to fill in.
_SUPERSEDED = ("max_window_layers", "sliding_window_pattern", "full_attention_interval")
_FEATURE_LAYER = "vision_feature_layer"


def _unhandled(model: PreTrainedModel) -> list[str]:
    """Config fields that number layers and that no generic rule can bring in line with a cut."""
    handled = {*DEPTH_KEYS, *ENCODER_KEYS, *DECODER_KEYS, *PER_LAYER_KEYS}
    found = []
    for path, config in config_paths(model.config):
        own = vars(config)
        for key, value in own.items():
            if key.startswith("_") or key in handled or not _NUMBERS_LAYERS.search(key):
                continue
            if key == _FEATURE_LAYER and path == "":
                continue
            if key in _SUPERSEDED and own.get("layer_types"):
                continue
            # Nothing, "every layer", or not a number of a layer at all.
            if (
                value in (None, 1, 0, "")
                or isinstance(value, (bool, float))
                or value in ([], (), {})
            ):
                continue
            found.append(f"{path}.{key}" if path else key)
    return found


def _objective(model: PreTrainedModel) -> Objective:
    if model.can_generate():
        return "chat"
    if any(name.rsplit(".", 1)[-1] == "logit_scale" for name, _ in model.named_parameters()):
        return "contrastive"
    raise FamilyError(
        f"{type(model).__name__} neither generates text nor holds a contrastive head. Load the "
        "checkpoint with the class that has its head, such as a ...ForConditionalGeneration."
    )


def generic_family(model: PreTrainedModel, known: str) -> Family:
    """Build the family of a model whose type is not known.

    Args:
        model: the model.
        known: the list of known families, for the message.

    Returns:
        A family without quirks, except that a `vision_feature_layer` is handled as in LLaVA.

    Raises:
        FamilyError: the model does not pass; says why, and lists the known families.
    """
    config: Any = model.config
    model_type = str(getattr(config, "model_type", ""))
    try:
        stacks = find_towers(model)
        unhandled = _unhandled(model)
        if unhandled:
            raise FamilyError(
                f"Its config numbers layers in {', '.join(unhandled)}, which cannot be renumbered "
                "without knowing what reads them."
            )
        objective = _objective(model)
        self_check(model, stacks)
    except FamilyError as error:
        raise FamilyError(
            f"The model type '{model_type}' ({type(model).__name__}) is not a known family and did "
            f"not pass the self-check. {error} Known families: {known}."
        ) from error
    family = Family(
        model_type,
        (model_type,),
        objective,
        (type(model).__name__,),
        patches=llava.LLAVA.patches,
    )
    if not isinstance(getattr(config, _FEATURE_LAYER, None), (int, list, tuple)):
        return family
    return replace(
        family,
        advised=llava.LLAVA.advised,
        unread=llava.LLAVA.unread,
        remapping=llava.LLAVA.remapping,
    )
