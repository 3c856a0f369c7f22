"""How far healing goes: to the point of its straight way that validation samples like best.

Legend: none; this file moves parameters, not activations.

A learning rate that a badly cut student needs moves one that is nearly whole too far, and nobody
knows beforehand which it is. The way back costs a few forward passes instead of another run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from interlace.data.samples import Samples
from interlace.errors import DataError
from interlace.heal.model import CONTRASTIVE
from interlace.heal.shell import like_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from interlace.config import HealSettings

# Tried shares of the way from the student as it came to the healed one.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def split_off(samples: Samples, settings: HealSettings, objective: str) -> tuple[Samples, Samples]:
    """Split samples at random into those to train on and those to validate with.

    Args:
        samples: all of them.
        settings: with the share to validate with, and the seed of the choice.
        objective: of the loss; a contrastive one takes two samples at least.

    Raises:
        DataError: none would be left to train on.
    """
    share = settings.validation_fraction
    if share == 0.0:
        return samples, Samples(())
    count = max(2 if objective == CONTRASTIVE else 1, round(share * len(samples)))
    if count >= len(samples):
        raise DataError(
            f"validation_fraction is {share:g}, which keeps back {count} samples, but there are "
            f"only {len(samples)}. Give more samples, or set validation_fraction to 0."
        )
    seeded = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(samples), generator=seeded).tolist()
    return samples.select(sorted(order[count:])), samples.select(sorted(order[:count]))


@torch.no_grad()
def interpolate(
    trained: Mapping[str, nn.Parameter],
    start: Callable[[str], torch.Tensor],
    validate: Callable[[], dict[str, float]],
) -> tuple[dict[str, float], ...]:
    """Leave trained parameters at the best of a few points between their start and where they are.

    Every process of the run must call this together.

    Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), section 3,
    with the coefficient chosen on validation samples.

    Args:
        trained: name -> parameter at its end, sharded or not; changed in place.
        start: gives the whole tensor that a name had before training.
        validate: gives the losses of the model as it is; the least "loss" is best, and of equal
            ones the furthest.

    Returns:
        "share" of the way and the losses there, point by point, the kept one first.
    """
    ends = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def move(share: float) -> None:
        for name, parameter in trained.items():
            end = ends[name]
            if share == 1.0:
                parameter.copy_(end)
                continue
            begin = like_parameter(start(name).to(end.device, end.dtype), parameter)
            parameter.copy_(begin + share * (end - begin))

    found = []
    for share in SHARES:
        move(share)
        found.append({"share": share, **validate()})
    found.sort(key=_worth)
    move(found[0]["share"])
    return tuple(found)


def _worth(point: Mapping[str, float]) -> tuple[float, float]:
    loss = point["loss"]
    return (loss if math.isfinite(loss) else math.inf, -point["share"])
