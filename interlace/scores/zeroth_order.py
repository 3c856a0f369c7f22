"""Sensitivity without gradients, at the memory of inference, by two-sided finite differences.

Legend: w the weights of a layer, g the gradient of a sample's loss, x a vector of signs (+1 or -1,
equally likely), * element by element, R directions.

    d_r(u)         = [L_u(w * (1 + eps x_r)) - L_u(w * (1 - eps x_r))] / (2 eps)
                   = <g_u, w * x_r> + O(eps^2)
    sensitivity(i) = mean over samples u of sqrt(mean over r of d_r(u)^2)

Since the signs are independent, the mean square of d over directions is |w * g|^2: the root is the
2-norm of what `sensitivity` takes the 1-norm of. The directions are the same for all samples.

Source: zeroth-order layer importance of ECoFLaP (arXiv 2310.02998, section 3.2), which perturbs by
Gaussian noise of one absolute size and multiplies |d| by the sum of |w|. Here the noise is
relative to the weight, so that the product with the weight is inside the difference and no layer is
moved further than another.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from interlace.scores.probes import Probe, suffix_forwards
from interlace.scores.sensitivity import block_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from interlace.scores.probes import Trial

SEED = 0
# Relative change of a weight: far above the spacing of the weights' dtype, so that the weights
# really move, and small enough that the loss is close to straight.
EPS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-4}


@contextlib.contextmanager
def _moved(weights: Sequence[nn.Parameter], signs: int, step: float) -> Iterator[None]:
    # New tensors in the place of the weights: what is put back is the original memory, bit for bit.
    own = [weight.data for weight in weights]
    generator = torch.Generator(own[0].device).manual_seed(signs)
    try:
        for weight, data in zip(weights, own, strict=True):
            up = torch.randint(
                0, 2, data.shape, dtype=torch.int8, generator=generator, device=data.device
            ).bool()
            weight.data = torch.where(up, data * (1 + step), data * (1 - step))
        yield
    finally:
        for weight, data in zip(weights, own, strict=True):
            weight.data = data


def directional_derivative(
    weights: Sequence[nn.Parameter], loss: Callable[[], Tensor], *, eps: float, seed: int
) -> Tensor:
    """Differentiate losses along w * x, x random signs, without a gradient.

    Args:
        weights: w; as they were when the call returns.
        loss: computes [B] losses from the weights as they are.
        eps: relative step, above 0.
        seed: seed of the signs.

    Returns:
        [B] fp64.
    """
    values = []
    for step in (eps, -eps):
        with _moved(weights, seed, step):
            values.append(loss().double())
    return (values[0] - values[1]) / (2 * eps)


def _as_it_is(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


class ZerothOrderSensitivity(Probe):
    """Root mean square of directional derivatives per layer.

    Cost: for R directions, 2 R times a sweep that runs the model from every layer on, so about R L
    forward passes for the last tower of a model. Memory: inference, the recorded states of one
    batch, and the weights of one layer a second time.
    """

    def forwards(self) -> float:
        """See `Probe`."""
        sweeps = 2 * self.num_directions
        return sweeps * sum(suffix_forwards(self.vlm, name) for name in self.towers)

    def settings(self) -> dict[str, Any]:
        """See `Probe`."""
        return {
            "zeroth_order": {
                "num_directions": self.num_directions,
                "seed": SEED,
                "eps": self._eps(),
            }
        }

    def _eps(self) -> float:
        return EPS.get(self.vlm.dtype, EPS[torch.float32])

    def measure(self, trial: Trial) -> dict[str, Tensor]:
        """See `Probe`."""
        found: dict[str, Tensor] = {}
        for name, tower in self.towers.items():
            if not trial.replay.ran(name):
                continue
            found[name] = torch.zeros(tower.num_layers, dtype=torch.float64)
            for index, layer in enumerate(tower.layers):
                where = f"layer {index} of the tower '{name}'"
                weights = block_weights(layer, where.capitalize())

                def loss(name: str = name, index: int = index, where: str = where) -> Tensor:
                    losses = trial.replay.changed(name, index, _as_it_is, trial.loss)
                    return trial.check(losses, f"with the weights of {where} moved a little")

                squares = torch.stack(
                    [
                        directional_derivative(
                            weights, loss, eps=self._eps(), seed=SEED + direction
                        ).square()
                        for direction in range(self.num_directions)
                    ]
                )
                found[name][index] = squares.mean(0).sqrt().mean()
        return found
