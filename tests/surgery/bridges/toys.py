"""Towers of plain layers, without any transformers model around them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from interlace.surgery.bridges.gaps import Gap

if TYPE_CHECKING:
    from collections.abc import Sequence


class Linear(nn.Module):
    """A linear layer beside the identity; its features hold its whole input."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, features)
        self.down = nn.Linear(features, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.up(hidden))


class PreNorm(Linear):
    """The feed-forward part of a transformer."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class PostNorm(PreNorm):
    """The same as BERT has it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden + self.down(torch.relu(self.up(hidden))))


class TwiceNormed(PostNorm):
    """The same where a part between two norms was taken out."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)
        self.second = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(super().forward(hidden) + 0.0)


class LayerScaled(Linear):
    """A learned scale behind the projection."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)
        self.scale = nn.Parameter(torch.linspace(-0.2, 1.5, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.scale * self.down(self.up(hidden))


class ToyRMSNorm(nn.Module):
    """As Gemma has it: its weight is what is added to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        size = (hidden.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return hidden / size * (1 + self.weight)


class Sandwiched(PreNorm):
    """A norm behind the part too, before its result is added."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)
        self.behind = ToyRMSNorm(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.behind(self.down(torch.relu(self.up(self.norm(hidden)))))


class Gated(PreNorm):
    """What is added is multiplied by something that hangs on the input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(hidden.mean(-1, keepdim=True))
        return hidden + gate * self.down(torch.relu(self.up(self.norm(hidden))))


class Scaled(PreNorm):
    """A learned scale on the residual stream itself."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.9 * hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class Tower(nn.Module):
    """Layers, then optionally a norm as the reader of the stream."""

    def __init__(self, layers: Sequence[nn.Module], *, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm or nn.Identity()

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        for layer in self.layers:
            hidden = layer(hidden)
        return (self.norm(hidden),)


WIDTH, FEATURES = 6, 10


def tower(
    kind: type[nn.Module], depth: int = 7, *, seed: int = 0, norm: nn.Module | None = None
) -> Tower:
    torch.manual_seed(seed)
    made = Tower([kind(WIDTH, FEATURES) for _ in range(depth)], norm=norm)
    return made.double().requires_grad_(False)


def without(dense: Tower, drop: Sequence[int], *, refit: bool = False) -> tuple[Tower, list[Gap]]:
    """The tower without some layers, over the same weights, and its gaps.

    With `refit` also the places behind the kept layers after the first gap.
    """
    shared: Any = {id(parameter): parameter for parameter in dense.parameters()}
    student = copy.deepcopy(dense, shared)
    kept = [i for i in range(len(dense.layers)) if i not in drop]
    student.layers = nn.ModuleList(student.layers[i] for i in kept)
    gaps = []
    for position, behind in enumerate((*kept, len(dense.layers))):
        first = kept[position - 1] + 1 if position else 0
        if behind > first or (refit and gaps):
            gone, after = tuple(range(first, behind)), first - 1 if first else None
            ends = behind == len(dense.layers)
            gaps.append(Gap("text", "layers", gone, after, position, behind, ends))
    return student, gaps


def calibration(num_batches: int = 4, rows: int = 24, seed: int = 1) -> Any:
    """Random hidden states, as `Calibration` gives batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        for _ in range(num_batches)
    ]
    return SimpleNamespace(batches=batches, probes=batches, run=lambda model, batch: model(batch))


class Weights:
    """Every row a sample, in two modalities of equal mass, one row padded."""

    def restart(self) -> None:
        pass

    def of(self, _: Any, hidden: torch.Tensor, _state: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.arange(len(hidden))
        weight = torch.where(row % 3 == 0, 2.0, 1.0).double()
        weight[-1] = 0.0
        return weight, row % 4 == 3
