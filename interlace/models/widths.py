"""Checkpoints whose layers differ in width, built from their manifest as transformers cannot.

transformers records the width of single layers as `per_layer_config`, but builds every layer from
the common fields. So the model is built from those, and the layers that the manifest names are
given their own widths before the weights are loaded into them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from interlace.models.attention import set_widths
from interlace.models.checkpoint import read_json
from interlace.models.discovery import find_towers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedConfig

    from interlace.models.handle import VLM
    from interlace.records import PruneRecord

PER_LAYER = "per_layer_config"
_FIELDS: dict[str, Callable[[tuple[int, ...]], int]] = {
    "num_attention_heads": sum,
    "num_key_value_heads": len,
    "intermediate_size": sum,
}
_SKIPPED = {"heads": "attention", "ffn": "mlp"}


def config_without_widths(folder: Path) -> PreTrainedConfig:
    """Read a config as its layers are built: without what it says of single ones."""
    return AutoConfig.for_model(**_without_widths(read_json(folder / "config.json")))


def _without_widths(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_widths(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if key != PER_LAYER
    }


def with_widths(model_class: Any, record: PruneRecord) -> Any:
    """Return a class that is built with the widths that a manifest states.

    Only for loading: the class of the loaded model is to be put back.
    """

    def build(self: Any, config: PreTrainedConfig, *args: Any, **settings: Any) -> None:
        model_class.__init__(self, config, *args, **settings)
        for name, stack in find_towers(self).items():
            layers = record.widths.get(name, {})
            kept = record.towers.get(name, ())
            set_widths(stack.layers, {kept.index(layer): sites for layer, sites in layers.items()})

    # transformers renames weights by the class's name and by the module it stands in
    own = {"__init__": build, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), own)


def per_layer_settings(vlm: VLM) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the configs of a model would say of single layers that differ in width.

    Returns:
        Dotted path of a config -> layer -> field -> value, for the towers whose config class knows
        such settings and counts its layers as it expects.
    """
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for name in vlm.record.widths if vlm.record is not None else {}:
        tower = vlm.towers[name]
        field = next(each for each in tower.depth_fields if ":" not in each.path)
        if not hasattr(type(field.config), PER_LAYER) or field.key != "num_hidden_layers":
            continue
        shapes = vlm.shape().towers[name].sites
        by_layer: dict[str, dict[str, Any]] = {}
        for position in range(tower.num_layers):
            own: dict[str, Any] = {}
            for key, count in _FIELDS.items():
                kind = "ffn" if key == "intermediate_size" else "heads"
                found = [s.groups[position] for s in shapes.values() if s.kind == kind]
                # transformers has a word of its own for parts that a layer lacks
                if found and found[0] and key in vars(field.config):
                    own[key] = count(found[0])
            skipped = {
                _SKIPPED[s.kind] for s in shapes.values() if not (s.cross or s.groups[position])
            }
            if any(getattr(field.config, key) != value for key, value in own.items()):
                by_layer[str(position)] = own
            if skipped:
                by_layer.setdefault(str(position), {})["skip"] = sorted(skipped)
        made[field.path.removesuffix(field.key).rstrip(".")] = by_layer
    return made
