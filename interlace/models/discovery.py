"""Finding the towers of a model: stacks of equal layers, and the config fields that count them.

Nothing here knows a family. A tower is an `nn.ModuleList` whose modules are all of one class and
hold both an attention and a feed-forward part; its name follows from its path, its depth fields
from the configs above it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from interlace.errors import FamilyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

# Names of the field that counts the layers of a stack, in the order they are looked for.
DEPTH_KEYS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "n_layer")
# In the config of an encoder-decoder these count one of the two stacks.
ENCODER_KEYS = ("encoder_layers", "num_encoder_layers", "num_layers")
DECODER_KEYS = ("decoder_layers", "num_decoder_layers")
# Lists with one entry per layer, cut together with the layers.
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|ff$|feed_?forward|fc1|intermediate|dense|experts", re.IGNORECASE
)
_VISION = re.compile(r"vision|visual|image|vit\b", re.IGNORECASE)
_ENCODER = re.compile(r"(^|\.)(text_)?encoder(\.|$)")
_DECODER = re.compile(r"(^|\.)(text_)?decoder(\.|$)")


@dataclass(frozen=True)
class DepthField:
    """One config field that holds the depth of a tower.

    Attributes:
        config: the live config object.
        key: the field in it.
        path: dotted key from the model's config, such as "text_config.num_hidden_layers"; for a
            copy that the model keeps beside its config, the path of the module that holds it, such
            as "language_model.encoder:num_layers".
    """

    config: PreTrainedConfig
    key: str
    path: str

    @property
    def value(self) -> int:
        """The depth this field states."""
        return int(getattr(self.config, self.key))


@dataclass(frozen=True)
class Stack:
    """A tower as found in the model.

    Attributes:
        name: tower name.
        path: dotted path of the module list.
        layers: the module list itself.
        depth_fields: every config field that counts its layers; the first belongs to the nearest
            config.
    """

    name: str
    path: str
    layers: nn.ModuleList
    depth_fields: tuple[DepthField, ...]


def is_block(module: nn.Module) -> bool:
    """Tell whether a module looks like one layer: attention and feed-forward, no stack inside."""
    names = [name.rsplit(".", 1)[-1] for name, _ in module.named_modules() if name]
    if not any(_ATTENTION.search(name) for name in names):
        return False
    if not any(_FEED_FORWARD.search(name) for name in names):
        return False
    return not any(_is_stack(inner) for inner in module.modules() if inner is not module)


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    first = module[0]
    return all(type(layer) is type(first) for layer in module) and is_block(first)


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every stack of equal layers by its dotted path, in the order of the model."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if _is_stack(module) and isinstance(module, nn.ModuleList):
            found[path] = module
    return found


def default_name(path: str) -> str:
    """Name a tower by its path alone: vision, qformer, text_encoder or text."""
    if "qformer" in path.lower():
        return "qformer"
    if _VISION.search(path):
        return "vision"
    for part in ("audio", "perceiver", "resampler", "speech"):
        if part in path.lower():
            return part
    return "text"


def config_paths(
    config: PreTrainedConfig, prefix: str = ""
) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield every config of a config tree with its dotted path; the top one has the path ""."""
    yield prefix, config
    for key in getattr(config, "sub_configs", None) or {}:
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "to_dict"):
            yield from config_paths(inner, f"{prefix}.{key}" if prefix else key)


def _chain(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Modules from the owner of a path up to the model, nearest first."""
    parts = path.split(".")[:-1]
    chain = []
    for length in range(len(parts), -1, -1):
        name = ".".join(parts[:length])
        chain.append((name, model.get_submodule(name)))
    return chain


def _depth_keys(config: PreTrainedConfig, path: str, *, copy: bool) -> list[str]:
    """The fields of a config that count the stack at `path`.

    A config of an encoder-decoder counts its two stacks apart. A stack's own copy of such a config
    counts the stack in the plain field, and repeats the decoder's depth beside it.
    """
    renamed: dict[str, str] = getattr(config, "attribute_map", None) or {}
    own = vars(config)
    plain = next(
        (renamed.get(key, key) for key in DEPTH_KEYS if renamed.get(key, key) in own), None
    )
    role: tuple[str, ...] = ()
    if copy or getattr(config, "is_encoder_decoder", False):
        if _DECODER.search(path):
            role = DECODER_KEYS
        elif _ENCODER.search(path):
            role = ENCODER_KEYS
    counted = [key for key in role if key in own]
    keys = [plain, *counted] if copy or not counted else counted
    return list(dict.fromkeys(key for key in keys if key is not None))


def depth_fields(model: PreTrainedModel, path: str) -> tuple[DepthField, ...]:
    """Find every config field that counts the layers of the stack at `path`, nearest config first.

    Configs are looked for on the modules around the stack: copies that modules keep, up to the
    first one that belongs to the model's config tree. A composite config above it may repeat the
    depth of its text tower; any other depth it states is not that of this stack.
    """
    tree = {id(config): name for name, config in config_paths(model.config)}
    depth = sum(1 for _ in model.get_submodule(path).children())
    found: list[DepthField] = []
    seen: set[int] = set()
    in_tree = False
    for name, module in _chain(model, path):
        config: Any = getattr(module, "config", None)
        if config is None or id(config) in seen or not hasattr(config, "to_dict"):
            continue
        seen.add(id(config))
        where = tree.get(id(config))
        if in_tree and default_name(path) != "text":
            break
        for key in _depth_keys(config, path, copy=where is None):
            value = getattr(config, key)
            if not isinstance(value, int) or (found and value != depth):
                continue
            in_tree = in_tree or where is not None
            full = f"{name}:{key}" if where is None else f"{where}.{key}" if where else key
            found.append(DepthField(config, key, full))
    return tuple(found)


def find_towers(model: PreTrainedModel) -> dict[str, Stack]:
    """Find all towers of a model.

    Args:
        model: a transformers model.

    Returns:
        tower name -> stack, in the order text_encoder, text, vision, qformer, others.

    Raises:
        FamilyError: no stack was found, two would bear the same name, or a stack has no config
            field that states its depth.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise FamilyError(
            f"{type(model).__name__} holds no stack of equal transformer layers, so there is "
            "nothing to prune. Expected at least one nn.ModuleList of layers with attention and "
            "feed-forward parts."
        )
    encoder_decoder = {path for path in stacks if _DECODER.search(path)}
    towers: dict[str, Stack] = {}
    for path, layers in stacks.items():
        name = default_name(path)
        if name == "text" and _ENCODER.search(path) and encoder_decoder - {path}:
            name = "text_encoder"
        if name in towers:
            raise FamilyError(
                f"{type(model).__name__} has two stacks that would both be the tower '{name}': "
                f"{towers[name].path} and {path}. Towers are told apart by their paths alone."
            )
        fields = depth_fields(model, path)
        if not fields or fields[0].value != len(layers):
            stated = f"{fields[0].path} = {fields[0].value}" if fields else "no field"
            raise FamilyError(
                f"{type(model).__name__}: the stack {path} has {len(layers)} layers, but its "
                f"config states {stated}. The depth of a tower must be written in its config to "
                "survive saving."
            )
        towers[name] = Stack(name, path, layers, fields)
    order = {name: rank for rank, name in enumerate(("text", "text_encoder", "vision", "qformer"))}
    return dict(sorted(towers.items(), key=lambda item: order.get(item[0], len(order))))


def routes(module: nn.Module) -> bool:
    """Tell whether a module sends each token to some of its experts."""
    return isinstance(getattr(module, "experts", None), nn.Module)


def has_cross_attention(layer: nn.Module) -> bool:
    """Tell whether a layer also attends to another tower."""
    names = (name.rsplit(".", 1)[-1].lower() for name, _ in layer.named_modules())
    return any("cross" in name and _ATTENTION.search(name) for name in names) or any(
        name.rsplit(".", 1)[-1] in ("EncDecAttention", "encoder_attn")
        for name, _ in layer.named_modules()
    )
