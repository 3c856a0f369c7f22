"""VLM: a model with processor, family and towers; Tower: one stack of layers and its numbering."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interlace.errors import CheckpointError, ConfigError, FamilyError, ShapeError
from interlace.models.discovery import has_cross_attention
from interlace.models.sites import site_shapes
from interlace.records import ModelShape, TowerShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from interlace.models.discovery import DepthField, Stack
    from interlace.models.family import Family
    from interlace.records import Plan, PruneRecord

# Config entries that change without the model changing: where it lies, how it is run, who wrote it.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
    }
)
# Values of each parameter that go into the fingerprint one by one, so that their order counts.
_NUM_SAMPLED = 64
_PART = 1 << 18


@dataclass(frozen=True)
class Tower:
    """One stack of equal transformer layers of a model.

    Attributes:
        name: "text", "text_encoder", "vision", "qformer", ...
        path: dotted path of the module list in the model.
        layers: the module list itself.
        config: the nearest config that states its depth.
        depth_fields: every config field that states its depth.
        original: original layer number of every position.
        pinned: ORIGINAL layer -> why protection keeps it.
        bound: the part of `pinned` that other parts refer to by number; dropping one must be asked
            for.
        unread: ORIGINAL layers whose output nothing reads; they may go for free.
        cross_attention_layers: ORIGINAL layers with cross-attention; None where all layers are
            alike.
        causal: tokens see only earlier ones.
    """

    name: str
    path: str
    layers: nn.ModuleList = field(repr=False)
    config: PreTrainedConfig = field(repr=False)
    depth_fields: tuple[DepthField, ...] = field(repr=False)
    original: tuple[int, ...]
    pinned: dict[int, str]
    bound: dict[int, str]
    unread: tuple[int, ...]
    cross_attention_layers: tuple[int, ...] | None
    causal: bool

    @property
    def num_layers(self) -> int:
        """Number of layers the tower has now."""
        return len(self.layers)

    def position(self, layer: int) -> int:
        """Return where an original layer stands now.

        Raises:
            ShapeError: the layer was removed or never existed.
        """
        if layer not in self.original:
            raise ShapeError(
                f"Tower '{self.name}' has no layer {layer}: it holds the original layers "
                f"{list(self.original)}."
            )
        return self.original.index(layer)


class VLM:
    """A vision-language model as every stage takes it.

    Attributes:
        model: the transformers model.
        processor: its processor, or None.
        family: what is special about it.
        name: the name or path it was opened by.
        record: how it was pruned, or None for an unpruned model.
        plan: the plan that `prune` carried out on it, or None; healing reads which layers train
            from it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        *,
        processor: Any = None,
        name: str = "",
        record: PruneRecord | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Wrap a model of a known family.

        Args:
            model: the model.
            family: its family; `interlace.models.registry.family_of` finds it.
            processor: its processor, where there is one.
            name: the name or path it was opened by; its class name if empty.
            record: the manifest of a pruned model, which gives its layers their original numbers.
            plan: the plan that was carried out.

        Raises:
            FamilyError: the towers do not have the depths that the configs state.
            CheckpointError: the manifest does not fit the model.
        """
        self.model = model
        self.processor = processor
        self.family = family
        self.name = name or type(model).__name__
        self.record = record
        self.plan = plan
        self.towers: dict[str, Tower] = {
            stack.name: self._tower(stack) for stack in family.stacks(model).values()
        }

    def __repr__(self) -> str:
        """Name the model, its family and its towers."""
        towers = ", ".join(
            f"{name}: {tower.num_layers} layers" for name, tower in self.towers.items()
        )
        return f"VLM({self.name!r}, family '{self.family.name}', {towers})"

    def _tower(self, stack: Stack) -> Tower:
        num_layers = len(stack.layers)
        original = tuple(range(num_layers))
        if self.record is not None:
            original = tuple(self.record.towers.get(stack.name, original))
        if len(original) != num_layers:
            raise CheckpointError(
                f"{self.name}: the manifest says that tower '{stack.name}' keeps {len(original)} "
                f"layers, but the model has {num_layers}. The manifest and the weights are not of "
                "the same checkpoint."
            )

        def numbered(pins: Mapping[int, str]) -> dict[int, str]:
            return {original[i]: reason for i, reason in sorted(pins.items()) if i < num_layers}

        crossing = tuple(i for i, layer in enumerate(stack.layers) if has_cross_attention(layer))
        mixed = 0 < len(crossing) < num_layers
        return Tower(
            name=stack.name,
            path=stack.path,
            layers=stack.layers,
            config=stack.depth_fields[0].config,
            depth_fields=stack.depth_fields,
            original=original,
            pinned=numbered(self.family.pinned(self.model, stack.name)),
            bound=numbered(self.family.bound(self.model, stack.name)),
            unread=tuple(numbered(self.family.unread(self.model, stack.name))),
            cross_attention_layers=tuple(original[i] for i in crossing) if mixed else None,
            causal=stack.name not in self.family.bidirectional,
        )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most parameters, counted by value (BLIP-2 keeps its Q-Former in fp32)."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.model.parameters():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def widths(self) -> dict[str, dict[int, dict[str, tuple[int, ...]]]]:
        """What the config cannot state: path of a tower -> position -> place -> its groups."""
        stated = self.record.widths if self.record is not None else {}
        return {
            self.towers[name].path: {
                self.towers[name].position(layer): sites for layer, sites in layers.items()
            }
            for name, layers in stated.items()
        }

    def num_parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def shape(self) -> ModelShape:
        """Return the sizes that planning needs."""
        return ModelShape(
            towers={name: tower_shape(tower) for name, tower in self.towers.items()},
            total_parameters=self.num_parameters(),
            bytes_per_parameter=self.dtype.itemsize,
        )

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) over the config and every parameter: name, shape, checksum, samples.

        Values count as rounded to bfloat16, so that a model is the same one opened as float32 and
        as bfloat16; float16, which rounds small weights away, makes another of it. Computed anew on
        every access, since weights change under training; equal on every device.
        """
        digest = hashlib.sha256()
        config = _stable(self.model.config.to_dict())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            if parameter.device.type != "meta":
                digest.update(_values(parameter.detach()))
        return digest.hexdigest()


def to_model(batch: Mapping[str, Any], vlm: VLM | PreTrainedModel) -> dict[str, Any]:
    """Move the tensors of a batch to a model's device, floating ones (pixels) also to its dtype.

    Tensors made under `torch.inference_mode` are copied outside of it, so that writes are counted.

    Raises:
        ConfigError: the model has shapes alone (device "meta"), so it computes nothing.
    """
    moved: dict[str, Any] = dict(batch)
    device, dtype = vlm.device, vlm.dtype
    if device.type == "meta":
        raise ConfigError(
            "The model lies on the device 'meta', where weights have shapes but no values, so it "
            "cannot be run. Load its weights, such as by open_model on the checkpoint."
        )
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            kind = dtype if value.is_floating_point() else None
            own = value.to(device=device, dtype=kind, non_blocking=True)
            frozen = own.is_inference() and not torch.is_inference_mode_enabled()
            moved[name] = own.clone() if frozen else own
    return moved


def check_vlm(value: object, role: str) -> None:
    """Refuse anything but a `VLM`, such as the transformers model inside one.

    Raises:
        ConfigError: it is something else; `role` says what it was given as.
    """
    if not isinstance(value, VLM):
        raise ConfigError(
            f"The {role} is a {type(value).__name__}, not a VLM. Give what open_model or prune "
            "returns; open_model(model) also wraps a loaded transformers model."
        )


def check_compares(vlm: VLM, batch_size: int, num_samples: int) -> None:
    """Refuse batches of one sample where the loss tells samples of a batch apart.

    Raises:
        ConfigError: the loss would be the same whatever the model does.
    """
    if vlm.family.objective == "contrastive" and min(batch_size, num_samples) == 1:
        raise ConfigError(
            f"The loss of {vlm.name} tells the samples of a batch apart, and every batch would "
            f"hold one (batch_size={batch_size}, samples: {num_samples}). Give 2 or more."
        )


def check_one_device(vlm: VLM, what: str) -> None:
    """Refuse a model that accelerate has spread over several devices, or keeps on a disk.

    Raises:
        ConfigError: `what` says what cannot be done with it.
    """
    places = {str(place) for place in (getattr(vlm.model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 or "disk" in places:
        raise ConfigError(
            f"{vlm.name} is spread over {', '.join(sorted(places))} (device_map), and {what} takes "
            "a model on one device. Load it without a device_map, or with one of a single device."
        )


def _stable(value: Any) -> Any:
    """Drop the entries of a config dict that may change without the model changing."""
    if isinstance(value, dict):
        return {
            str(key): _stable(inner)
            for key, inner in value.items()
            if key not in _VOLATILE and not str(key).startswith("_attn")
        }
    return [_stable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bit patterns as integers, the same whatever floating-point dtype the model was opened in."""
    return values.to(torch.bfloat16).view(torch.int16) if values.is_floating_point() else values


def _values(tensor: torch.Tensor) -> bytes:
    """Sum all bit patterns as integers, which is exact in any order, and sample some values."""
    flat = tensor.reshape(-1)
    step = max(1, flat.numel() // _NUM_SAMPLED)
    total = torch.zeros(1, dtype=torch.int64, device=flat.device)
    # in parts, because summing as int64 widens its input
    for first in range(0, flat.numel(), _PART):
        total += _bits(flat[first : first + _PART]).sum(dtype=torch.int64)
    samples = _bits(flat[::step].contiguous()).to(torch.int64)
    return torch.cat([total, samples]).cpu().numpy().tobytes()


def tower_shape(tower: Tower) -> TowerShape:
    """Return the sizes of a tower, read from its config whatever the family calls them."""
    config: Any = tower.config

    def first(*keys: str) -> int | None:
        for key in keys:
            value = getattr(config, key, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    # Where a config gives the feed-forward width as a ratio, `embed_dim` is the width of its layers
    # and `hidden_size` that of its output (Qwen2-VL's vision tower).
    ratio = getattr(config, "mlp_ratio", None)
    by_ratio = isinstance(ratio, (int, float)) and first("embed_dim") is not None
    hidden = first("embed_dim") if by_ratio else first("hidden_size", "d_model", "n_embd")
    heads = first("num_attention_heads", "num_heads", "decoder_attention_heads", "n_head")
    if hidden is None or heads is None:
        raise FamilyError(
            f"Tower '{tower.name}': {type(config).__name__} states neither hidden_size nor "
            "d_model, or no number of attention heads, so its cost cannot be computed."
        )
    return TowerShape(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim", "d_kv") or hidden // heads,
        layer_parameters=tuple(
            sum(p.numel() for p in layer.parameters()) for layer in tower.layers
        ),
        causal=tower.causal,
        cross_attention=any(has_cross_attention(layer) for layer in tower.layers),
        sites=site_shapes(tower.layers),
    )
