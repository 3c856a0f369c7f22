"""Learnable gates: a factor on every branch that a layer adds to the residual stream.

A layer of a transformer computes x + attention(x), then x + mlp(x); a gate g makes such a sum
x + g * branch(x). Under a penalty the gates of branches that matter little sink while the layers
are healed. Then g is folded into the last linear module of its branch, W <- g W and b <- g b, which
is the same function, so the model stays a standard checkpoint.

Where the sum passes a LayerNorm (BERT, BLIP's text part) it is still the branch alone that is
scaled, so folding holds there as well.

Legend: N gates.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from interlace.errors import ConfigError
from interlace.models.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from interlace.models import VLM, Tower

# The last linear module of a branch, by its path inside the layer. Families differ in names only.
_ATTENTION = re.compile(
    r"(self_attn|attn|attention(\.attention)?|SelfAttention|layer\.\d+\.SelfAttention)"
    r"\.(o_proj|out_proj|proj|projection|dense|output\.dense|o)"
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
# A norm on the branch itself (Gemma) undoes any factor before it.
_NORM_OF_BRANCH = "post_feedforward_layernorm"

# Stretch and temperature of the hard concrete distribution, as published.
_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2.0 / 3.0
# Where the gate of the expected noise, clamp(sigmoid(a) (high - low) + low), first reaches 1.
_OPEN = math.log((1.0 - _LOW) / (_HIGH - 1.0))
_SHIFT = _TEMPERATURE * math.log(-_LOW / _HIGH)


@dataclass(frozen=True)
class Branch:
    """One gated branch.

    Attributes:
        tower: tower name.
        layer: number of its layer in the original model.
        kind: "attention", "cross_attention" or "mlp".
        path: dotted path in the model of its last linear module.
    """

    tower: str
    layer: int
    kind: str
    path: str


def find_branches(vlm: VLM, towers: Iterable[str]) -> tuple[Branch, ...]:
    """Find the branches of every layer of some towers.

    Raises:
        ConfigError: a layer has no attention or feed-forward branch that ends in one linear module
            known by its name (experts, fused or adapted modules), normalises its branches, or
            shares the weights that a gate would be folded into.
    """
    found = [branch for name in towers for branch in _of_tower(vlm.towers[name])]
    owners: dict[int, list[str]] = {}
    for name, parameter in vlm.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for branch in found:
        for leaf in ("weight", "bias"):
            parameter = getattr(vlm.model.get_submodule(branch.path), leaf)
            names = owners.get(id(parameter), []) if parameter is not None else []
            if len(names) > 1:
                raise ConfigError(
                    f"A gate of {branch.path} cannot be folded: it shares its {leaf} with "
                    f"{', '.join(name for name in names if not name.startswith(branch.path))}. "
                    "Heal with gates='none'."
                )
    return tuple(found)


def _of_tower(tower: Tower) -> list[Branch]:
    branches = []
    for position, module in enumerate(tower.layers):
        if hasattr(module, _NORM_OF_BRANCH):
            raise ConfigError(
                f"The tower '{tower.name}' cannot be gated: a {type(module).__name__} normalises "
                "its branches, which undoes a factor on them. Heal with gates='none'."
            )
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

    Attributes:
        branches: what the gates stand on, in order.
        values: gates or logits, [N] fp32.
    """

    def __init__(self, branches: Iterable[Branch], kind: Literal["l1", "hard_concrete"]) -> None:
        """Make open gates: all of them 1.

        Args:
            branches: what they stand on.
            kind: their penalty.
        """
        super().__init__()
        self.branches = tuple(branches)
        self.kind = kind
        start = 1.0 if kind == "l1" else _OPEN
        self.values = nn.Parameter(torch.full((len(self.branches),), start))
        self._drawn: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Set hooks that scale the branches of a model, for good: give a shell."""
        for number, branch in enumerate(self.branches):
            model.get_submodule(branch.path).register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def scale(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            drawn = self._drawn
            return output if drawn is None else output * drawn[number].to(output.dtype)

        return scale

    def draw(self) -> Tensor:
        """Set the gates of the next forward pass and return their penalty, a number with gradient.

        Layers that are run again in the backward pass (gradient checkpointing) see the same gates.
        """
        values = self.values.float()
        if self.kind == "l1":
            self._drawn = values
            return values.abs().mean()
        noise = torch.rand_like(values).clamp(1e-6, 1.0 - 1e-6)
        concrete = torch.sigmoid((noise.logit() + values) / _TEMPERATURE)
        self._drawn = _stretched(concrete)
        return torch.sigmoid(values - _SHIFT).mean()


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def final_gates(values: Tensor, kind: str) -> list[float]:
    """Return what trained gates come to: from their values [N], N numbers."""
    values = values.detach().float().cpu()
    found: list[float] = (values if kind == "l1" else _stretched(torch.sigmoid(values))).tolist()
    return found


def fold(model: nn.Module, branches: Iterable[Branch], gates: Iterable[float]) -> None:
    """Multiply the last linear module of every branch, weight and bias, by its gate.

    The parameters get memory of their own: a student shares its frozen weights with its teacher.

    Args:
        model: changed in place.
        branches: where the gates stand.
        gates: their values.
    """
    with torch.no_grad():
        for branch, gate in zip(branches, gates, strict=True):
            module: Any = model.get_submodule(branch.path)
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.data = (parameter.detach().double() * gate).to(parameter.dtype)


def by_layer(
    branches: Iterable[Branch], gates: Iterable[float]
) -> dict[str, dict[int, dict[str, float]]]:
    """Return gates as tower -> original layer -> branch -> value."""
    table: dict[str, dict[int, dict[str, float]]] = {}
    for branch, gate in zip(branches, gates, strict=True):
        table.setdefault(branch.tower, {}).setdefault(branch.layer, {})[branch.kind] = gate
    return table


def importance(gates: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """Return one number per layer: the mean size of its gates; low = the layer matters little."""
    return {
        layer: sum(abs(gate) for gate in branches.values()) / len(branches)
        for layer, branches in gates.items()
    }
