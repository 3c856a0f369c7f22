"""Learnable gates: a factor on every branch that a layer adds to the residual stream.

A layer of a transformer computes x + attention(x), then x + mlp(x); a gate g makes such a sum
x + g * branch(x). Under a penalty the gates of branches that matter little sink while the layers
are healed. Then g is folded into the last linear module of its branch, W <- g W and b <- g b, which
is the same function, so the model stays a standard checkpoint.

Where the sum passes a LayerNorm (BERT, BLIP's text part) it is still the branch alone that is
scaled, so folding holds there as well.

Gates of single heads and neurons, inside a branch, are in units.py; all train in one vector.

Legend: N gates.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from interlace.errors import ConfigError
from interlace.models.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from interlace.models import VLM, Tower
    from interlace.records import HealReport

BRANCHES = "branches"
# The last linear module of a branch, by its path inside the layer. Families differ in names only.
_ATTENTION = re.compile(
    r"(self_attn|linear_attn|attn|attention(\.attention)?|SelfAttention|layer\.\d+\.SelfAttention)"
    r"\.(o_proj|out_proj|proj|projection|projection_layer|dense|output\.dense|o)"
)
_CROSS = re.compile(
    r"(crossattention|encoder_attn|cross_attn|(layer\.\d+\.)?EncDecAttention)"
    r"\.(o_proj|out_proj|output\.dense|o)"
)
_FEED_FORWARD = re.compile(
    r"((mlp|ffn|feed_forward|layer\.\d+\.DenseReluDense)\.(down_proj|fc2|linear_fc2|c_proj|wo|w2))"
    r"|fc2|output(_query)?\.dense"
)
_BRANCHES = {"attention": _ATTENTION, "cross_attention": _CROSS, "mlp": _FEED_FORWARD}
_REQUIRED = ("attention", "mlp")
# A norm on the branch itself (Gemma, GLM) undoes any factor before it.
_NORMS_OF_BRANCH = ("post_feedforward_layernorm", "post_mlp_layernorm")

# Stretch and temperature of the hard concrete distribution, as published.
_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2.0 / 3.0
# Where the gate of the expected noise, clamp(sigmoid(a) (high - low) + low), first reaches 1.
_OPEN = math.log((1.0 - _LOW) / (_HIGH - 1.0))
_SHIFT = _TEMPERATURE * math.log(-_LOW / _HIGH)


@dataclass(frozen=True)
class Gated(ABC):
    """A linear module that gates stand on.

    Attributes:
        tower: tower name.
        layer: number of its layer in the original model.
        kind: what it is called in the layer.
        path: its dotted path in the model.
        unit: what each gate stands on: "branches", "heads" or "neurons".
        count: number of its gates.
    """

    tower: str
    layer: int
    kind: str
    path: str
    unit: str = BRANCHES
    count: int = 1

    @abstractmethod
    def attach(self, module: nn.Module, drawn: Callable[[], Tensor | None]) -> None:
        """Set a hook on the module that applies the gates drawn, [count] fp32, or None for none."""

    @abstractmethod
    def fold(self, module: Any, gates: Sequence[float]) -> None:
        """Multiply the module's parameters by its gates; they get memory of their own."""


class Branch(Gated):
    """One gated branch: "attention", "cross_attention" or "mlp", at its last linear module."""

    def attach(self, module: nn.Module, drawn: Callable[[], Tensor | None]) -> None:
        """Scale what the module gives."""

        def scale(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            gates = drawn()
            return output if gates is None else output * gates[0].to(output.dtype)

        module.register_forward_hook(scale)

    def fold(self, module: Any, gates: Sequence[float]) -> None:
        """Scale weight and bias."""
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.data = (parameter.detach().double() * gates[0]).to(parameter.dtype)


def find_branches(vlm: VLM, towers: Iterable[str]) -> tuple[Branch, ...]:
    """Find the branches of every layer of some towers.

    Raises:
        ConfigError: a layer has no attention or feed-forward branch that ends in one linear module
            known by its name (experts, fused or adapted modules), normalises its branches, or
            shares the weights that a gate would be folded into.
    """
    found = [branch for name in towers for branch in _of_tower(vlm.towers[name])]
    check_own(vlm, found, ("weight", "bias"))
    return tuple(found)


def check_own(vlm: VLM, places: Iterable[Gated], leaves: Sequence[str]) -> None:
    """Refuse gates whose module shares the parameters that they would be folded into.

    Raises:
        ConfigError: names both.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in vlm.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for place in places:
        for leaf in leaves:
            parameter = getattr(vlm.model.get_submodule(place.path), leaf)
            names = owners.get(id(parameter), []) if parameter is not None else []
            if len(names) > 1:
                raise ConfigError(
                    f"A gate of {place.path} cannot be folded: it shares its {leaf} with "
                    f"{', '.join(name for name in names if not name.startswith(place.path))}. "
                    "Heal with gates='none'."
                )


def check_unnormalised(tower: Tower) -> None:
    """Refuse a tower whose layers normalise what a gate scales.

    Raises:
        ConfigError: names the layer's class.
    """
    for module in tower.layers:
        if any(hasattr(module, name) for name in _NORMS_OF_BRANCH):
            raise ConfigError(
                f"The tower '{tower.name}' cannot be gated: a {type(module).__name__} normalises "
                "its branches, which undoes a factor on them. Heal with gates='none'."
            )


def _of_tower(tower: Tower) -> list[Branch]:
    check_unnormalised(tower)
    branches = []
    for position, module in enumerate(tower.layers):
        linears = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
        gone = {id(site.output) for site in find_sites(module).values() if not site.groups}
        for kind, pattern in _BRANCHES.items():
            ends = [name for name in linears if pattern.fullmatch(name)]
            if len(ends) == 1 and id(module.get_submodule(ends[0])) in gone:
                continue
            if len(ends) > 1 or (not ends and kind in _REQUIRED):
                many = f"several ({', '.join(ends)})" if ends else "none"
                raise ConfigError(
                    f"The tower '{tower.name}' cannot be gated: of the linear modules of a "
                    f"{type(module).__name__} ({', '.join(linears) or 'none'}) exactly one must "
                    f"end its {kind} branch, and {many} is known to. Heal with gates='none'."
                )
            branches += [
                Branch(tower.name, tower.original[position], kind, f"{tower.path}.{position}.{end}")
                for end in ends
            ]
    return branches


class Gates(nn.Module):
    """The gates of a model in training.

    "l1": the gates themselves are trained, from 1, under the penalty mean |g|, as in UPop (arXiv
    2301.13741). "hard_concrete": their logits a are trained, under the expected share of gates that
    are not 0; in training a gate is drawn as

        s = sigmoid((log u - log(1 - u) + a) / (2/3)),   g = clamp(1.2 s - 0.1, 0, 1),   u ~ U(0, 1)

    and its final value is clamp(1.2 sigmoid(a) - 0.1, 0, 1), which starts at 1. Source: Louizos,
    Welling, Kingma: Learning sparse neural networks through L0 regularization (arXiv 1712.01312),
    equations 10 to 13.

    The penalty is a mean over the gates of branches, of heads and of neurons each, and their sum.

    Attributes:
        places: what the gates stand on, in order.
        values: gates or logits, [N] fp32.
    """

    def __init__(self, places: Iterable[Gated], kind: Literal["l1", "hard_concrete"]) -> None:
        """Make open gates: all of them 1.

        Args:
            places: what they stand on, those of one `unit` next to each other.
            kind: their penalty.
        """
        super().__init__()
        self.places = tuple(places)
        self.kind = kind
        start = 1.0 if kind == "l1" else _OPEN
        groups = groupby(self.places, key=lambda place: place.unit)
        # how many gates stand on branches, on heads and on neurons
        self._sizes = [sum(place.count for place in group) for _, group in groups]
        self.values = nn.Parameter(torch.full((sum(self._sizes),), start))
        self._drawn: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Set hooks that apply the gates in a model, for good: give a shell."""
        for place, part in _parts(self.places):
            place.attach(model.get_submodule(place.path), self._reader(part))

    def _reader(self, part: slice) -> Callable[[], Tensor | None]:
        return lambda: None if self._drawn is None else self._drawn[part]

    def draw(self) -> Tensor:
        """Set the gates of the next forward pass and return their penalty, a number with gradient.

        Layers that are run again in the backward pass (gradient checkpointing) see the same gates.
        """
        values = self.values.float()
        if self.kind == "l1":
            self._drawn = values
            costs = values.abs()
        else:
            noise = torch.rand_like(values).clamp(1e-6, 1.0 - 1e-6)
            concrete = torch.sigmoid((noise.logit() + values) / _TEMPERATURE)
            self._drawn = _stretched(concrete)
            costs = torch.sigmoid(values - _SHIFT)
        return torch.stack([part.mean() for part in torch.split(costs, self._sizes)]).sum()


def _parts(places: Iterable[Gated]) -> Iterator[tuple[Gated, slice]]:
    """Give every place with where its gates stand among all."""
    start = 0
    for place in places:
        yield place, slice(start, start + place.count)
        start += place.count


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def final_gates(values: Tensor, kind: str) -> list[float]:
    """Return what trained gates come to: from their values [N], N numbers."""
    values = values.detach().float().cpu()
    found: list[float] = (values if kind == "l1" else _stretched(torch.sigmoid(values))).tolist()
    return found


def fold(model: nn.Module, places: Iterable[Gated], gates: Sequence[float]) -> None:
    """Multiply the parameters that gates stand on by them.

    The parameters get memory of their own: a student shares its frozen weights with its teacher.

    Args:
        model: changed in place.
        places: where the gates stand.
        gates: their values, [N].
    """
    with torch.no_grad():
        for place, part in _parts(places):
            place.fold(model.get_submodule(place.path), gates[part])


def reported(places: Iterable[Gated], gates: Sequence[float]) -> dict[str, Any]:
    """Return gates as the fields of a HealReport: "gates" and "unit_gates"."""
    tables: dict[str, dict[str, dict[int, dict[str, Any]]]] = {"gates": {}, "unit_gates": {}}
    for place, part in _parts(places):
        whole = place.unit == BRANCHES
        layers = tables["gates" if whole else "unit_gates"].setdefault(place.tower, {})
        own = gates[part]
        layers.setdefault(place.layer, {})[place.kind] = own[0] if whole else tuple(own)
    return tables


def importance(*tables: Mapping[int, Mapping[str, float | Sequence[float]]]) -> dict[int, float]:
    """Return one number per layer: the mean size of its gates; low = the layer matters little.

    Args:
        tables: of one tower, layer -> branch or site -> gate or gates. Each branch and each site
            counts once, as the mean of its gates.
    """
    sizes: dict[int, list[float]] = {}
    for table in tables:
        for layer, places in table.items():
            for gates in places.values():
                each = [gates] if isinstance(gates, float) else gates
                sizes.setdefault(layer, []).append(sum(map(abs, each)) / len(each))
    return {layer: sum(each) / len(each) for layer, each in sizes.items()}


def layer_importance(report: HealReport) -> dict[str, dict[int, float]]:
    """Return `importance` of every gated tower: tower -> original layer -> number."""
    tables = (report.gates, report.unit_gates)
    towers = dict.fromkeys(name for table in tables for name in table)
    return {name: importance(*(table.get(name, {}) for table in tables)) for name in towers}
