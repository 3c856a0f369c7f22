"""Sites: the places of a layer whose width can be cut, found by the names of their projections.

Legend: D columns of a head, F neurons, H query heads, K key and value heads.

A site is an output projection whose input columns come in units, heads of D columns or single
neurons, with the projections whose rows feed them. A projection may feed a unit with more than one
row: those of gate and value, or of a head's query and gate. Nothing here knows a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from interlace.errors import ShapeError
from interlace.models.discovery import routes
from interlace.models.parts import take_out
from interlace.records import SiteShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Projections by the names they have below one module: (query, key, value), output.
_ATTENTION = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "projection_layer"),
    (("q", "k", "v"), "o"),
    (("qkv",), "proj"),
    (("qkv",), "projection"),
    (("self.query", "self.key", "self.value"), "output.dense"),
    (("attention.query", "attention.key", "attention.value"), "output.dense"),
)
_FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("linear_fc1",), "linear_fc2"),
    (("fc1",), "fc2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate_query.dense",), "output_query.dense"),
)
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
# What modules call their numbers of heads and widths, all of which follow a cut.
_QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_INNER_WIDTHS = ("all_head_size", "inner_dim")
# InternVL calls it by the width of the model, and may norm queries and keys of all heads as one.
_INTERNVL = "InternVLVisionAttention"
_NEURON_COUNTS = ("intermediate_size",)
# The KV head of every query head, where the groups are of unequal size.
KV_MAP = "kv_map"


@dataclass(frozen=True)
class Site:
    """One place of one layer.

    Attributes:
        name: path in the layer by which records name it.
        kind: "heads" or "ffn".
        module: what computes with the projections, and keeps their sizes as attributes.
        inputs: the projections that feed the units, in the order of the names above.
        output: the projection that reads them.
        head_dim: D; 1 for neurons.
        groups: the query heads of every KV head, or (F,); empty where the part was taken out.
        apart: the module computes this part and nothing else.
        cross: attends to another tower.
        biased: scores of attention get a learned bias per head that all layers share.
    """

    name: str
    kind: Literal["heads", "ffn"]
    module: nn.Module
    inputs: tuple[nn.Linear, ...]
    output: nn.Linear
    head_dim: int
    groups: tuple[int, ...]
    apart: bool = True
    cross: bool = False
    biased: bool = False

    @property
    def num_units(self) -> int:
        """H or F."""
        return sum(self.groups)

    @property
    def kv_of(self) -> tuple[int, ...]:
        """The KV head of every query head."""
        return tuple(kv for kv, count in enumerate(self.groups) for _ in range(count))

    @property
    def rows_per_unit(self) -> tuple[int, ...]:
        """Rows of every input projection that feed one column of the output, 1 or 2.

        Where query, key and value are one projection, its first part counts.
        """
        columns = self.output.in_features
        if (self.kind == "heads" and len(self.inputs) == 1) or not columns:
            return (1,) * len(self.inputs)
        if self.kind == "heads":
            return (self.inputs[0].out_features // columns, 1, 1)
        return tuple(each.out_features // columns for each in self.inputs)

    def parameters(self) -> tuple[int, int]:
        """Parameters of one unit, and of one key and value head."""
        per_row = [
            times * (layer.in_features + (layer.bias is not None))
            for times, layer in zip(self.rows_per_unit, self.inputs, strict=True)
        ]
        column = self.output.out_features
        if self.kind == "ffn":
            return sum(per_row) + column, 0
        query, key, value = per_row if len(per_row) == 3 else per_row * 3
        return self.head_dim * (query + column), self.head_dim * (key + value)

    def shared_parameters(self) -> int:
        """Parameters that no unit owns: the bias of the output, and norms of queries and keys."""
        bias = 0 if self.output.bias is None else self.output.bias.numel()
        if not self.apart:
            return bias
        linears = {id(each) for each in (*self.inputs, self.output)}
        others = (child for child in self.module.children() if id(child) not in linears)
        return bias + sum(p.numel() for child in others for p in child.parameters())


def find_sites(layer: nn.Module) -> dict[str, Site]:
    """Find the attentions and feed-forward parts of a layer by name; plain linear modules only.

    An expert that all tokens share is no part of a layer, but of one.
    """
    found: dict[str, Site] = {}
    for path, module in layer.named_modules():
        if routes(layer.get_submodule(path.rpartition(".")[0])):
            continue
        for kind, layouts in (("heads", _ATTENTION), ("ffn", _FEED_FORWARD)):
            for inputs, output in layouts:
                linears = [_linear(module, name) for name in (*inputs, output)]
                if all(linears) and not _normed_as_one(module):
                    site = _site(path, kind, module, inputs, linears)
                    found[site.name] = site
    return found


def _normed_as_one(module: Any) -> bool:
    return type(module).__name__ == _INTERNVL and not isinstance(module.q_norm, nn.Identity)


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module if type(module) is nn.Linear else None


def _site(
    path: str, kind: Any, module: nn.Module, inputs: Sequence[str], linears: Sequence[Any]
) -> Site:
    # where the projections lie deeper, the module that holds them computes
    inner = inputs[0].rpartition(".")[0]
    owner = module.get_submodule(inner) if inner and kind == "heads" else module
    name = path or inputs[0].split(".")[0]
    *feeding, output = linears
    apart = bool(path)
    if kind == "ffn":
        groups = (output.in_features,) if output.in_features else ()
        return Site(name, kind, owner, tuple(feeding), output, 1, groups, apart)
    head_dim = next(int(getattr(owner, key)) for key in _HEAD_DIM if hasattr(owner, key))
    num_heads = output.in_features // head_dim
    mapped = getattr(owner, KV_MAP, None)
    if mapped is not None:
        groups = tuple(mapped.count(kv) for kv in range(max(mapped) + 1))
    elif not num_heads:
        groups = ()
    else:
        num_kv = num_heads if len(feeding) == 1 else feeding[1].out_features // head_dim
        groups = (num_heads // num_kv,) * num_kv
    words = f"{path}.{type(owner).__name__}".lower()
    return Site(
        name=name,
        kind=kind,
        module=owner,
        inputs=tuple(feeding),
        output=output,
        head_dim=head_dim,
        groups=groups,
        apart=apart,
        cross=any(word in words for word in ("cross", "encdec", "encoder_attn")),
        biased=hasattr(owner, "has_relative_attention_bias"),
    )


def site_shapes(layers: Iterable[nn.Module]) -> dict[str, SiteShape]:
    """Return the widths of all sites of a tower, as planning takes them."""
    sites = [find_sites(layer) for layer in layers]
    names = dict.fromkeys(name for each in sites for name in each)
    shapes = {}
    for name in names:
        groups = tuple(each[name].groups if name in each else () for each in sites)
        everywhere = [each[name] for each in sites if name in each]
        found = [site for site in everywhere if site.groups]
        first = (found or everywhere)[0]
        unit, kv = first.parameters()
        # the first layer of T5 has more, and keeps it
        shared = min((site.shared_parameters() for site in found), default=0)
        shapes[name] = SiteShape(first.kind, groups, unit, kv, first.cross, shared)
    return shapes


def resize(site: Site, groups: Sequence[int]) -> None:
    """Give a site other widths; its projections are new and empty, on the device of the old ones.

    Args:
        site: as `find_sites` gave it; used up.
        groups: the query heads of every KV head, or (F,); empty to take the part out whole, with
            the bias of its output.

    Raises:
        ShapeError: unequal groups where query, key and value are one projection.
    """
    total, num_kv, width = sum(groups), len(groups), site.head_dim
    times = site.rows_per_unit
    if site.kind == "ffn":
        rows = [total * each for each in times]
        _set_known(site.module, _NEURON_COUNTS, total)
    else:
        if len(site.inputs) == 1 and set(groups) - {1}:
            raise ShapeError(
                f"{type(site.module).__name__} computes query, key and value in one projection, "
                f"so every KV head must have one query head, not {tuple(groups)}."
            )
        rows = [total * width * times[0], num_kv * width, num_kv * width]
        rows = [sum(rows)] if len(site.inputs) == 1 else rows
        _set_known(site.module, _QUERY_COUNTS, total)
        inner = ("embed_dim",) if type(site.module).__name__ == _INTERNVL else _INNER_WIDTHS
        _set_known(site.module, inner, total * width)
        _set_known(site.module, ("num_key_value_heads",), num_kv)
        ragged = len(set(groups)) > 1
        per_group = 1 if ragged else max(groups, default=0)
        _set_known(site.module, ("num_key_value_groups",), per_group)
        if ragged:
            pairs = ((kv, count) for kv, count in enumerate(groups))
            setattr(site.module, KV_MAP, tuple(kv for kv, count in pairs for _ in range(count)))
        elif hasattr(site.module, KV_MAP):
            delattr(site.module, KV_MAP)
    for linear, size in zip(site.inputs, rows, strict=True):
        _empty(linear, size, linear.in_features)
    _empty(site.output, site.output.out_features, total * width)
    if total == 0:
        _take_out(site)


def _take_out(site: Site) -> None:
    """Let a site whose projections are empty add nothing."""
    output: Any = site.output
    bias = output.bias
    inside = site.apart and any(each is output for each in site.module.modules())
    if bias is not None:
        # where it never runs, there is one for transformers to initialise
        output.bias = nn.Parameter(bias.new_empty(0), bias.requires_grad) if inside else None
    if site.apart:
        take_out(site.module, output.out_features if inside else 0, heads=site.kind == "heads")


def _set_known(module: Any, names: Sequence[str], value: int) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _empty(linear: nn.Linear, rows: int, columns: int) -> None:
    weight, bias = linear.weight, linear.bias
    linear.out_features, linear.in_features = rows, columns
    linear.weight = nn.Parameter(weight.new_empty(rows, columns), weight.requires_grad)
    if bias is not None and rows != len(bias):
        linear.bias = nn.Parameter(bias.new_empty(rows), bias.requires_grad)


def rows_of(site: Site, units: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return which rows of every input projection, and which columns of the output, units own.

    Args:
        site: the site.
        units: query heads or neurons, ascending. Their KV heads come along.

    Returns:
        Row numbers per projection in `site.inputs`, and column numbers; [n] int64.
    """
    own, times = _spread(units, site.head_dim), site.rows_per_unit
    if site.kind == "ffn":
        # gate and value of all units, one behind the other
        return [
            torch.cat([own + block * site.num_units for block in range(each)]) for each in times
        ], own
    shared = _spread(list(dict.fromkeys(site.kv_of[unit] for unit in units)), site.head_dim)
    if len(site.inputs) > 1:
        # query and gate of one head, one behind the other
        return [_spread(units, site.head_dim * times[0]), shared, shared], own
    heads = site.num_units * site.head_dim
    return [torch.cat([own, heads + shared, 2 * heads + shared])], own


def _spread(units: Sequence[int], width: int) -> torch.Tensor:
    first = torch.tensor(list(units), dtype=torch.int64)[:, None] * width
    return (first + torch.arange(width)).flatten()


def narrow(site: Site, units: Sequence[int]) -> None:
    """Keep only some units of a site, in place, with the rows and columns that belong to them.

    Args:
        site: as `find_sites` gave it; used up.
        units: query heads or neurons to keep, ascending, at least one.
    """
    rows, columns = rows_of(site, units)
    counts = [0] * len(site.groups)
    for unit in units:
        counts[site.kv_of[unit] if site.kind == "heads" else 0] += 1
    before = [(linear.weight.detach(), linear.bias) for linear in site.inputs]
    output = site.output.weight.detach()
    resize(site, [count for count in counts if count])
    with torch.no_grad():
        for linear, (weight, bias), chosen in zip(site.inputs, before, rows, strict=True):
            linear.weight.copy_(weight[chosen.to(weight.device)])
            if bias is not None:
                linear.bias.copy_(bias.detach()[chosen.to(bias.device)])
        site.output.weight.copy_(output[:, columns.to(output.device)])
