"""Sensitivity by gradients: how much the loss would change if the weights of a layer went.

Legend: w a weight, g = dL/dw, B samples of a batch.

    sensitivity(i) = mean over samples of  sum over weights w of layer i of |w g|

where g is the gradient of the mean loss of the batch that a sample is in: with larger batches,
gradients of different samples cancel, so compare values of one batch size. Weights are the matrices
of a layer and the gains of its norms; biases and embedding tables are left out.

Source: first-order Taylor importance of LLM-Pruner (arXiv 2305.11627, equation 5) and the "Taylor"
criterion of Shortened LLaMA (arXiv 2402.02834, equation 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from interlace.errors import ConfigError, DataError
from interlace.models.predictor import check_gradients
from interlace.models.states import hooked
from interlace.scores.probes import Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from interlace.scores.probes import Trial


def block_weights(layer: nn.Module, where: str) -> list[nn.Parameter]:
    """Return the matrices and norm gains of a layer, each once.

    Args:
        layer: the layer.
        where: its name, for the message.

    Raises:
        ConfigError: it has none in floating point (quantised models).
    """
    found: dict[int, nn.Parameter] = {}
    for module in layer.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            counts = parameter.dim() > 1 or name == "weight"
            if counts and parameter.is_floating_point():
                found[id(parameter)] = parameter
    if not found:
        raise ConfigError(
            f"{where} has no weights in floating point, so its sensitivity cannot be scored. Load "
            "the model without quantisation, or score 'relevance'."
        )
    return list(found.values())


class Sensitivity(Probe):
    """Sum of |w g| per layer. Cost: a forward and a backward pass, about 3 forward passes.

    Memory: the activations of the graph, and the gradient of one weight at a time.
    """

    replays: ClassVar[bool] = False

    def forwards(self) -> float:
        """See `Probe`."""
        return 3.0

    def measure(self, trial: Trial) -> dict[str, Tensor]:
        """See `Probe`."""
        sums = {
            name: torch.zeros(tower.num_layers, dtype=torch.float64)
            for name, tower in self.towers.items()
        }
        reached: set[str] = set()

        def reduce(name: str, layer: int) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                gradient, weight.grad = weight.grad, None
                if gradient is not None:
                    reached.add(name)
                    product = weight.detach().float() * gradient.float()
                    sums[name][layer] += product.abs_().sum(dtype=torch.float64).cpu()

            return hook

        def hooks() -> Iterator[RemovableHandle]:
            for name, tower in self.towers.items():
                for index, layer in enumerate(tower.layers):
                    for weight in block_weights(layer, f"Layer {index} of the tower '{name}'"):
                        weight.requires_grad_(True)
                        register: Any = weight.register_post_accumulate_grad_hook
                        yield register(reduce(name, index))

        model = trial.vlm.model
        check_gradients(trial.vlm, "'sensitivity' cannot be scored")
        before = [(each, each.requires_grad, each.grad) for each in model.parameters()]
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            with hooked(hooks()), torch.enable_grad():
                losses = trial.check(trial.loss())
                if losses.requires_grad:
                    losses.mean().backward()  # type: ignore[no-untyped-call]
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient
        for name in reached:
            bad = (~torch.isfinite(sums[name])).nonzero().flatten().tolist()
            if bad:
                raise DataError(
                    f"NaN or infinite gradients in layer {bad[-1]} of the tower '{name}', batch "
                    f"{trial.batch.number}. Open the model in bfloat16 or float32, or score "
                    "'sensitivity_zeroth_order', which needs no gradients."
                )
        return {name: sums[name] for name in self.towers if name in reached}
