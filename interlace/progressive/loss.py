"""The model's own loss without some of its layers: what loss-greedy rules choose by.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace._torch_utils import to_device
from interlace.config import HealSettings
from interlace.data.collate import Collator
from interlace.heal.model import HealModel
from interlace.heal.shell import make_shell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from interlace.data.samples import Sample
    from interlace.models import VLM


class TaskLoss:
    """The loss that healing trains on, without its distillation: cross-entropy, or contrastive.

    A skipped layer runs, and its output [B, T, D] is replaced by its input: the value is that of
    the pruned model, at the cost of the whole one. The batches are made once and stay in memory.
    """

    def __init__(self, vlm: VLM, data: Sequence[Sample], batch_size: int) -> None:
        """Prepare the batches and a shell of the model, which is left as it is.

        Args:
            vlm: the model.
            data: samples with their answers.
            batch_size: samples per forward pass; images and texts are compared within a batch.
        """
        collate = Collator.for_model(vlm)
        starts = range(0, len(data), batch_size)
        self._batches = [collate(data[start : start + batch_size]) for start in starts]
        self._device, self._dtype = vlm.device, vlm.dtype
        paths = {name: tower.path for name, tower in vlm.towers.items()}
        shell = make_shell(vlm.model)
        self._skipped: frozenset[tuple[str, int]] = frozenset()
        for name, path in paths.items():
            for position, layer in enumerate(shell.get_submodule(path).children()):
                layer.register_forward_hook(self._skip((name, position)), with_kwargs=True)
        settings = HealSettings(hidden_weight=0.0, kl_weight=0.0)
        self._model = HealModel(
            shell, objective=vlm.family.objective, settings=settings, paths=paths
        )
        counts: dict[str, float] = {}
        for batch in self._batches:
            for key, value in self._model.count(batch).items():
                counts[key] = counts.get(key, 0.0) + value
        self._counts = counts

    def _skip(self, place: tuple[str, int]) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if place not in self._skipped:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def __call__(self, tower: str = "", skipped: Iterable[int] = ()) -> float:
        """Return the mean loss over all samples, in nats, without some layers of a tower.

        Args:
            tower: name of the tower.
            skipped: positions of the layers to skip.
        """
        self._skipped = frozenset((tower, position) for position in skipped)
        total = 0.0
        with torch.no_grad():
            for batch in self._batches:
                inputs = to_device(batch, self._device, self._dtype)
                total += self._model(counts=self._counts, **inputs)["ce"].item()
        return total
