"""Relevance: how much the loss rises when one layer, or one part of a layer, is skipped.

    relevance(i) = mean over samples of loss(model without layer i) - loss(model)

Negative where the model is better without. A skipped layer hands on the hidden states that it was
given. Prefix states are reused (see replay.py): a sweep over the L layers of the last tower of a
model costs about L/2 forward passes, and gives exactly what skipping each layer in a whole pass
does.

A part is taken out as surgery does it (`interlace.surgery.heads`): its output projections give
zeros, their biases included, and a norm behind the sum with the residual stays. So its value is how
much higher the loss of the student is that lacks this part alone.

Source: the loss change of single blocks is what SLEB (arXiv 2402.09025, section 3) and Shortened
LLaMA (arXiv 2402.02834, equation 3, as perplexity) choose by; parts of blocks as in BlockPruner
(arXiv 2406.10594) and FinerCut (arXiv 2405.18218).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from interlace.models.sites import find_sites
from interlace.models.states import hooked
from interlace.scores.probes import Probe, suffix_forwards

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from interlace.models.handle import VLM, Tower
    from interlace.scores.probes import Trial
    from interlace.scores.replay import Change, Forward

Part = Literal["attention", "mlp"]

# Part -> kind of its sites
_KINDS: dict[Part, str] = {"attention": "heads", "mlp": "ffn"}


class Relevance(Probe):
    """Loss change without a layer. Cost: half of L forward passes for the last tower of a model."""

    part: ClassVar[Part | None] = None

    def __init__(self, vlm: VLM, towers: Mapping[str, Tower], num_directions: int) -> None:
        """See `Probe`."""
        super().__init__(vlm, towers, num_directions)
        # what runs in the place of every layer; None skips it
        self._changes: dict[str, list[Change | None]] = {}
        for name, tower in towers.items():
            if self.part is None:
                self._changes[name] = [None] * tower.num_layers
                continue
            self._changes[name] = [_without(layer, self.part) for layer in tower.layers]
            if None in self._changes[name]:
                self.notes[name] = (
                    f"no {self.part}_relevance: the output projection of this part was not found "
                    f"in layer {self._changes[name].index(None)}, so the part could not be taken "
                    "out"
                )

    def forwards(self) -> float:
        """See `Probe`."""
        return sum(suffix_forwards(self.vlm, name) for name in self.towers)

    def measure(self, trial: Trial) -> dict[str, Tensor]:
        """See `Probe`."""
        baseline = trial.baseline.double()
        found: dict[str, Tensor] = {}
        for name, tower in self.towers.items():
            if not trial.replay.ran(name):
                continue
            if name in self.notes:
                found[name] = torch.zeros(tower.num_layers)
                continue
            rises = torch.zeros(tower.num_layers, dtype=torch.float64)
            for layer, change in enumerate(self._changes[name]):
                skipped = trial.replay.changed(name, layer, change, trial.loss)
                what = "layer" if self.part is None else f"the {self.part} of layer"
                trial.check(skipped, f"without {what} {layer} of the tower '{name}'")
                rises[layer] = (skipped.double() - baseline).mean()
            found[name] = rises
        return found


class AttentionRelevance(Relevance):
    """Loss change without the attention of a layer, cross-attention included.

    Cost: about (L + 1) / 2 forward passes for the last tower of a model.
    """

    part: ClassVar[Part | None] = "attention"


class MlpRelevance(Relevance):
    """Loss change without the feed-forward part of a layer; its cost is that of the attention."""

    part: ClassVar[Part | None] = "mlp"


def _without(layer: nn.Module, part: Part) -> Change | None:
    """Return what runs in the place of a layer: the layer without one of its parts.

    None where the layer has no site of this kind that is known.
    """
    outputs = [site.output for site in find_sites(layer).values() if site.kind == _KINDS[part]]
    if not outputs:
        return None

    def zeros(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def change(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with hooked(output.register_forward_hook(zeros) for output in outputs):
            return forward(*args, **kwargs)

    return change
