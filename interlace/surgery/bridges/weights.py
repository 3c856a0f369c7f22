"""Weights of a linear module as one value: taken, put back, replaced by changed copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

# Weight and bias parameters; the bias is None where there is none.
Weights = tuple[Any, Any]


def weights_of(linear: nn.Linear) -> Weights:
    """Return the parameters of a linear module themselves."""
    return linear.weight, linear.bias


def put_weights(linear: nn.Linear, weights: Weights) -> None:
    """Give a linear module other parameters; the ones it had are not written to."""
    linear.weight, linear.bias = weights


def changed(parameter: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a new parameter: a function of an old one's fp64 values, rounded once.

    Args:
        parameter: the old one, only read; None gives None.
        change: of its values; gives a new tensor.
    """
    if parameter is None:
        return None
    value = change(parameter.detach().double()).to(parameter.dtype)
    return nn.Parameter(value.contiguous(), requires_grad=parameter.requires_grad)
